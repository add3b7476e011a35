"""Versions of what is installed."""

from importlib import metadata


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def why_unknown(name: str, known: str, any_version: bool) -> str | None:
    """Why a plugin stays out of an installed project: it is absent, or its version does not start
    with the known one. None if neither, or if every version will do.
    """
    found = version(name.lower())
    if found is None:
        return f"{name} is not installed"
    if any_version or f"{found}.".startswith(f"{known}."):
        return None
    return f"{name} must be {known}, got {found}"
