"""How children are started and held together, per platform; see base.py."""

from __future__ import annotations

import sys

from supervisor.host.containment.base import Containment


def backend(platform: str = sys.platform) -> Containment:
    """The platform's backend.

    Raises:
        NotImplementedError: there is none for this platform.
    """
    if platform == "linux":
        from supervisor.host.containment.linux import Linux

        return Linux()
    raise NotImplementedError(f"children cannot be contained on {platform}; run the worker on Linux")
