"""Which release this is."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache  # it is announced often, and reading it parses a file
def version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("bulkhead-worker")
    except metadata.PackageNotFoundError:  # run from a bare checkout
        return "0+checkout"
