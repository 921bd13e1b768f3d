"""What is installed: the wheel carries the code location inside the package and nothing else; an editable install finds it anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that sees neither the checkout nor a variable of ours; the assertion shows what it printed."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("FRAISEQL_", "PYTHON", "DAGSTER_", "VIRTUAL_"))
    }
    inherited |= {"DAGSTER_DISABLE_TELEMETRY": "yes", **environment}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", at, cwd=ROOT)
    (built,) = at.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_one_top_level_package(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"fraiseql_pipeline"}


def test_the_wheel_carries_every_module_and_every_sql_file(names: set[str]) -> None:
    files = {
        f.relative_to(ROOT).as_posix() for f in (ROOT / "fraiseql_pipeline").rglob("*") if f.suffix in {".py", ".sql", ".typed"}
    }
    files |= {f"fraiseql_pipeline/assets/{f.relative_to(ROOT / 'assets').as_posix()}" for f in (ROOT / "assets").rglob("*.py")}
    assert files <= names
    assert "fraiseql_pipeline/assets/definitions.py" in files


def test_the_wheel_says_that_it_is_typed(names: set[str]) -> None:
    assert "fraiseql_pipeline/py.typed" in names


def test_the_code_location_imports_from_any_directory(tmp_path: Path) -> None:
    run(sys.executable, "-c", "from assets.definitions import defs; defs.resolve_all_job_defs()", cwd=tmp_path)


def test_the_library_does_not_import_dagster(tmp_path: Path) -> None:
    run(
        sys.executable,
        "-c",
        "import sys, fraiseql_pipeline, fraiseql_pipeline.cli; assert 'dagster' not in sys.modules",
        cwd=tmp_path,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_empty_environment_with_only_the_wheel_loads_the_definitions(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python, constraints = tmp_path / "env/bin/python", ROOT / "constraints.txt"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints)

    run(*install, wheel, cwd=tmp_path)
    assert "materialize" in run(tmp_path / "env/bin/fraiseql-pipeline", "--help", cwd=tmp_path).stdout
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('dagster'), u.find_spec('assets'))", cwd=tmp_path)
    assert found.stdout.split() == ["None", "None"], "a plain install brings no orchestrator and no top-level `assets`"

    run(*install, f"{wheel}[dagster]", cwd=tmp_path)
    run(python, "-c", "from fraiseql_pipeline.assets.definitions import defs", cwd=tmp_path)
    validated = run(
        tmp_path / "env/bin/dagster", "definitions", "validate", "-m", "fraiseql_pipeline.assets.definitions", cwd=tmp_path
    )
    assert "Validation successful" in validated.stdout + validated.stderr
