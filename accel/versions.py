"""The versions that figures depend on, read from package metadata; nothing is imported for it."""

from __future__ import annotations

from importlib import metadata

from ditune import __version__
from ditune.db.records import Software


def software() -> Software:
    """Return the versions of what a figure depends on; loads none of the packages."""
    return Software(
        torch=metadata.version("torch"),
        triton=_version_or_none("triton"),
        diffusers=metadata.version("diffusers"),
        transformers=metadata.version("transformers"),
        ditune=__version__,
    )


def _version_or_none(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
