"""What each Xid of the NVIDIA driver means for us: a table. Pure.

Source: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors), column "Resolution
Bucket (Immediate Action)", and the texts of Xids 43, 45, 63, 94 and 154 beside it. Where the catalog sends people
through a workflow, we take its cautious end: 48 and 74 end in a reset ("A GPU reset or node reboot is needed to clear
this error").
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple


class Action(enum.StrEnum):
    """What has to happen before the GPU can be relied on again."""

    IGNORE = "ignore"
    RESTART_APP = "restart-app"
    RESET_GPU = "reset-gpu"
    REBOOT = "reboot"


class Owner(enum.StrEnum):
    """Whose fault it most likely is."""

    APPLICATION = "application"
    DEVICE = "device"
    DRIVER = "driver"


class Xid(NamedTuple):
    """One line of the table."""

    name: str
    owner: Owner
    action: Action

    @property
    def fatal(self) -> bool:
        """Whether nothing can run on this GPU until somebody did something about it."""
        return self.action in (Action.RESET_GPU, Action.REBOOT)


_APP, _DEVICE, _DRIVER = Owner.APPLICATION, Owner.DEVICE, Owner.DRIVER
_IGNORE, _RESTART, _RESET, _REBOOT = Action.IGNORE, Action.RESTART_APP, Action.RESET_GPU, Action.REBOOT


def _each(numbers: range | tuple[int, ...], name: str, owner: Owner, action: Action) -> dict[int, Xid]:
    return {number: Xid(name, owner, action) for number in numbers}


XIDS: Mapping[int, Xid] = {
    8: Xid("GPU stopped processing", _DRIVER, _RESTART),
    11: Xid("invalid or corrupted push buffer stream", _APP, _RESTART),
    13: Xid("graphics engine exception", _APP, _RESTART),
    14: Xid("injected fault", _APP, _IGNORE),
    25: Xid("invalid or illegal push buffer stream", _APP, _RESTART),
    31: Xid("GPU memory page fault", _APP, _RESTART),
    32: Xid("invalid or corrupted push buffer stream", _DEVICE, _RESTART),  # "primarily involve quality issues on PCI"
    **_each((37, 38), "driver firmware error", _DRIVER, _IGNORE),
    **_each((39, 40, 41), "copy engine exception", _DEVICE, _RESTART),
    43: Xid("GPU stopped processing", _APP, _IGNORE),  # the application must end; "the GPU remains in a healthy state"
    44: Xid("graphics engine fault during context switch", _DRIVER, _IGNORE),
    45: Xid("preemptive cleanup", _APP, _IGNORE),  # also after every SIGKILL of a process with a context: ours, mostly
    46: Xid("GPU stopped processing", _DEVICE, _RESET),
    48: Xid("double bit ECC error", _DEVICE, _RESET),
    54: Xid("auxiliary power is not connected", _DEVICE, _REBOOT),
    60: Xid("video processor exception", _APP, _RESTART),
    62: Xid("internal micro-controller halt", _DEVICE, _RESET),
    63: Xid("memory row remapped or page retired", _DEVICE, _IGNORE),
    64: Xid("memory remapping failed", _DEVICE, _RESET),
    **_each((66, 67), "illegal access by the driver", _DRIVER, _IGNORE),
    68: Xid("video decoder exception", _APP, _RESTART),
    69: Xid("graphics engine class error", _APP, _RESTART),
    **_each((70, 71, 72, 75, 76, 77, 85), "copy engine error", _DEVICE, _RESTART),
    74: Xid("NVLink error", _DEVICE, _RESET),
    78: Xid("vGPU start error", _DRIVER, _IGNORE),
    79: Xid("GPU has fallen off the bus", _DEVICE, _REBOOT),
    80: Xid("corrupted data sent to the GPU", _APP, _RESTART),
    **_each((82, 83, 84, 86, 88, 89), "video engine error", _APP, _RESTART),
    92: Xid("high rate of single bit ECC errors", _DEVICE, _IGNORE),
    93: Xid("InfoROM wear limit", _DEVICE, _IGNORE),
    94: Xid("contained memory error", _DEVICE, _RESTART),  # "Applications can continue to be run until the reset"
    95: Xid("uncontained memory error", _DEVICE, _RESET),
    **_each(range(96, 106), "video engine error", _APP, _RESTART),
    **_each((106, 107), "test message", _DRIVER, _IGNORE),
    108: Xid("NVLink remote translation error", _DRIVER, _IGNORE),
    109: Xid("context switch timeout", _DEVICE, _RESET),
    110: Xid("security fault", _DEVICE, _RESET),
    119: Xid("GSP firmware does not answer", _DRIVER, _RESET),
    120: Xid("GSP firmware error", _DRIVER, _RESET),
    121: Xid("corrected C2C error", _DEVICE, _IGNORE),
    **_each(range(126, 136), "copy engine error", _DEVICE, _RESTART),
    136: Xid("link training failed", _DEVICE, _RESET),
    137: Xid("NVLink privilege error", _APP, _IGNORE),
    139: Xid("optical flow engine error", _APP, _RESTART),
    140: Xid("unrecovered ECC error", _DEVICE, _RESET),
    141: Xid("CUDA fast path error", _APP, _IGNORE),
    143: Xid("GPU initialisation error", _DEVICE, _RESET),
    **_each(range(144, 151), "NVLink error", _DEVICE, _IGNORE),  # most sub-codes heal; a bad one brings a 154 with it
    151: Xid("key rotation error", _DRIVER, _REBOOT),
    154: Xid("recovery action changed", _DRIVER, _IGNORE),  # the action itself comes with each reading
    155: Xid("NVLink went down", _DEVICE, _RESET),
    156: Xid("resource retired", _DEVICE, _RESET),
    157: Xid("resource retirement failed", _DEVICE, _IGNORE),
    158: Xid("GPU fatal timeout", _DEVICE, _RESET),
    **_each((160, 161), "channel retired", _DEVICE, _IGNORE),
    167: Xid("PCIe fatal timeout", _DEVICE, _REBOOT),
    169: Xid("internal micro-controller halt", _DEVICE, _RESET),
    # Beside a 48, with its particulars.
    **_each((171, 172), "uncorrectable memory error", _DEVICE, _IGNORE),
}
# One that we do not know is suspicious, but no reason to give up a GPU.
UNKNOWN = Xid("unknown fault", Owner.DRIVER, Action.RESTART_APP)


def xid(number: int) -> Xid:
    """The line of the table."""
    return XIDS.get(number, UNKNOWN)
