"""How children are started and held together, per platform; see base.py."""

from __future__ import annotations

import functools
import importlib
import sys

from supervisor.host.containment.base import Containment

# sys.platform -> module, class. Imported by name: each module needs what only its own system has.
_BACKENDS = {
    "linux": ("linux", "Linux"),
    "darwin": ("macos", "Macos"),
    "win32": ("windows", "Windows"),
}


@functools.cache
def backend(platform: str = sys.platform) -> Containment:
    """The platform's backend.

    Raises:
        NotImplementedError: there is none for this platform.
    """
    try:
        module, name = _BACKENDS[platform]
    except KeyError:
        known = ", ".join(_BACKENDS)
        raise NotImplementedError(
            f"Children cannot be contained on {platform}; there are backends for {known}."
        ) from None
    found: Containment = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    return found
