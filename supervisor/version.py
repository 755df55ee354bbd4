"""Which release this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("bulkhead-worker")
    except metadata.PackageNotFoundError:  # run from a bare checkout
        return "0+checkout"
