"""Capabilities dropped for good, and no way to gain any by exec."""

from __future__ import annotations

import struct

from engines.lockdown import kernel

_CAPABILITY_VERSION_3 = 0x20080522


def drop() -> None:
    """Drop every capability, the bounding set too, and set no_new_privs. Raises OSError."""
    capability = 0
    while (
        kernel.prctl(kernel.PR_CAPBSET_DROP, capability) == 0
    ):  # ends behind the last one, or at once when we have none
        capability += 1
    kernel.call("capset", struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    if kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1) != 0:
        raise OSError(1, "no_new_privs")
