"""The version of this package, for whatever writes it down."""

from functools import cache
from importlib import metadata


@cache
def package_version() -> str:
    """As pip has it."""
    try:
        return metadata.version("fraiseql-pipeline")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
