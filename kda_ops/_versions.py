"""Versions of what is installed."""

from importlib import metadata


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
