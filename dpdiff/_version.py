"""Versions of packages."""

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str, otherwise: str) -> str:
    """The version of a package; otherwise: what to say where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise
