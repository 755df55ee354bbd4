"""Reads whether the network is metered: paid by volume, as a phone's is.

Linux: NetworkManager, over the system bus. Windows: the cost of the network list manager, over COM. macOS tells it
only to programs that watch paths with blocks of its own language: unknown there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import trio

from supervisor.intake.observed import Network, Unknown
from supervisor.machine.dbus import SYSTEM, Bus, DbusError
from supervisor.machine.presence import SIMULATED, Simulation

_SERVICE = "org.freedesktop.NetworkManager"
_PATH = "/org/freedesktop/NetworkManager"
# NetworkManager's NMMetered: 0 unknown, 1 yes, 2 no, 3 guessed yes, 4 guessed no.
_METERED = {
    1: Network(metered=True),
    2: Network(metered=False),
    3: Network(metered=True, guessed=True),
    4: Network(metered=False, guessed=True),
}


class NetworkReader(Protocol):
    """Who can tell."""

    async def read(self) -> Network | Unknown:
        """The network now. Cancellation: nothing is left behind."""

    def close(self) -> None:
        """Close what is open; a later `read` opens it again."""
        return


def network_reader(environ: Mapping[str, str] = os.environ) -> NetworkReader:
    """The one for this system."""
    if path := environ.get(SIMULATED):
        return SimulatedNetwork(Path(path))
    if sys.platform == "win32":
        return WindowsNetwork()
    if sys.platform == "darwin":
        return UntoldNetwork()
    return LinuxNetwork(environ.get("DBUS_SYSTEM_BUS_ADDRESS", SYSTEM))


class LinuxNetwork(NetworkReader):
    """Asks NetworkManager. `system`: address of the system bus."""

    def __init__(self, system: str = SYSTEM) -> None:
        self._bus = Bus(system)

    async def read(self) -> Network | Unknown:
        """See `NetworkReader`."""
        try:
            metered = await self._bus.get(_SERVICE, _PATH, _SERVICE, "Metered")
        except DbusError as error:
            return Unknown(str(error))
        known = _METERED.get(metered) if isinstance(metered, int) else None
        return known or Unknown("NetworkManager does not know")

    def close(self) -> None:
        """See `NetworkReader`."""
        self._bus.close()


class SimulatedNetwork(NetworkReader):
    """The network of `presence.Scene`."""

    def __init__(self, path: Path) -> None:
        self._simulation = Simulation(path)

    async def read(self) -> Network | Unknown:
        """See `NetworkReader`."""
        await trio.lowlevel.checkpoint()
        return self._simulation.network()


class UntoldNetwork(NetworkReader):
    """A system that does not tell."""

    async def read(self) -> Network | Unknown:
        """See `NetworkReader`."""
        await trio.lowlevel.checkpoint()
        return Unknown("this system does not tell programs like this one")


# netlistmgr.h
_CLASS = "DCB00C01-570F-4A9B-8D69-199FDBA5723B"
_INTERFACE = "DCB00008-570F-4A9B-8D69-199FDBA5723B"
_UNRESTRICTED, _RELEASE, _GET_COST = 1, 2, 3  # NLM_CONNECTION_COST; places in INetworkCostManager's table
_PAID = 0x2 | 0x4 | 0x10000 | 0x40000  # fixed, variable, over the data limit, roaming
_COM_EVERYWHERE = 0x17  # CLSCTX_ALL


class WindowsNetwork(NetworkReader):
    """Asks INetworkCostManager."""

    async def read(self) -> Network | Unknown:
        """See `NetworkReader`."""
        try:
            cost = await trio.to_thread.run_sync(windows_cost, abandon_on_cancel=True)
        except (OSError, AttributeError) as error:
            return Unknown(f"Windows does not tell the cost of the network: {error}")
        if cost & _PAID:
            return Network(metered=True)
        return Network() if cost & _UNRESTRICTED else Unknown("Windows does not know the cost of the network")


def windows_cost() -> int:
    """NLM_CONNECTION_COST of this machine's connection to the internet. Raises OSError."""
    ole: Any = ctypes.OleDLL("ole32")  # type: ignore[attr-defined,unused-ignore]
    ole.CoInitializeEx(None, 0)
    try:
        place = ctypes.c_void_p()
        class_id, interface = (uuid.UUID(text).bytes_le for text in (_CLASS, _INTERFACE))
        ole.CoCreateInstance(class_id, None, _COM_EVERYWHERE, interface, ctypes.byref(place))
        table = ctypes.cast(place, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
        prototype: Any = ctypes.WINFUNCTYPE  # type: ignore[attr-defined,unused-ignore]
        get_cost = prototype(ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(table[_GET_COST])
        release = prototype(ctypes.c_ulong, ctypes.c_void_p)(table[_RELEASE])
        cost = ctypes.c_uint32()
        result = get_cost(place, ctypes.byref(cost), None)
        release(place)
        if result:
            raise OSError(f"GetCost failed with {result & 0xFFFFFFFF:#x}")
        return int(cost.value)
    finally:
        ole.CoUninitialize()
