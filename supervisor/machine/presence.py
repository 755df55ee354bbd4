"""Reads whether somebody uses this machine: input, the screen's lock, films and games.

Each system tells it in another way, and none tells it to everybody:

- Linux: the desktop knows when input came last (Mutter's and KDE's idle monitors, on the session bus); logind knows
  which sessions sit at this machine, whether they are locked, and a hint that a desktop sets after its own timeout.
  A program that plays or presents inhibits idleness, and GameMode knows of games. A supervisor that runs as a system
  service sees logind only, and so notices input as coarsely as the desktop tells logind.
- Windows: `GetLastInputInfo` is about the caller's session alone: a service in session 0 sees nobody, ever.
- macOS: the time since the last event of any kind, and the assertions that keep the display awake.

What cannot be told is `Unknown` with its reason, and shown to the owner; nothing is guessed. `BULKHEAD_SIMULATED_
PRESENCE` names a JSON file that is read instead, for trying things out and for tests.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from supervisor.intake.observed import Network, Power, Presence, Unknown
from supervisor.machine.dbus import SYSTEM, Bus, DbusError, Method
from supervisor.machine.load import descends

SIMULATED = "BULKHEAD_SIMULATED_PRESENCE"

_LOGIN = "org.freedesktop.login1"
_LOGIN_PATH = "/org/freedesktop/login1"
_SESSIONS = Method(_LOGIN, _LOGIN_PATH, f"{_LOGIN}.Manager", "ListSessions")
_INHIBITORS = Method(_LOGIN, _LOGIN_PATH, f"{_LOGIN}.Manager", "ListInhibitors")
_MUTTER = Method(
    "org.gnome.Mutter.IdleMonitor",
    "/org/gnome/Mutter/IdleMonitor/Core",
    "org.gnome.Mutter.IdleMonitor",
    "GetIdletime",
)
_SAVER = "org.freedesktop.ScreenSaver"
_SAVER_IDLE = Method(_SAVER, "/org/freedesktop/ScreenSaver", _SAVER, "GetSessionIdleTime")
_SAVER_ACTIVE = Method(_SAVER, "/org/freedesktop/ScreenSaver", _SAVER, "GetActive")
_GNOME = "org.gnome.SessionManager"
_GNOME_INHIBITED = Method(_GNOME, "/org/gnome/SessionManager", _GNOME, "IsInhibited")
_GNOME_IDLE = 8  # gsm-inhibitor-flag.h: inhibits the session being marked as idle
_GAMEMODE = "com.feralinteractive.GameMode"


class PresenceReader(Protocol):
    """Who can tell."""

    async def read(self) -> Presence | Unknown:
        """Presence now. Cancellation: nothing is left behind."""

    def close(self) -> None:
        """Close what is open; a later `read` opens it again."""
        return


def presence_reader(environ: Mapping[str, str] = os.environ) -> PresenceReader:
    """The one for this system."""
    if path := environ.get(SIMULATED):
        return Simulation(Path(path))
    if sys.platform == "win32":
        return Desktop(windows_presence)
    if sys.platform == "darwin":
        return Desktop(macos_presence)
    return LinuxPresence(environ.get("DBUS_SYSTEM_BUS_ADDRESS", SYSTEM), session_address(environ))


def session_address(environ: Mapping[str, str]) -> str:
    """Of the session bus; "" when there is none: a system service has no desktop."""
    if address := environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    socket = os.path.join(environ.get("XDG_RUNTIME_DIR", ""), "bus")
    return f"unix:path={socket}" if os.path.isabs(socket) and os.path.exists(socket) else ""


# ---- Linux


class LinuxPresence(PresenceReader):
    """Asks logind, and the desktop where there is one.

    Args:
        system, session: addresses of the two buses; `session` "" when there is none.
        now: wall clock, in seconds since the epoch.
    """

    def __init__(self, system: str, session: str = "", now: Callable[[], float] = time.time) -> None:
        self._system = Bus(system)
        self._session = Bus(session) if session else None
        self._now = now

    async def read(self) -> Presence | Unknown:
        """See `PresenceReader`."""
        try:
            return await self._read()
        except (TypeError, ValueError, AttributeError) as error:
            return Unknown(f"a service on the bus answers in another shape than it should: {error}")

    def close(self) -> None:
        """See `PresenceReader`."""
        for bus in (self._system, self._session):
            if bus is not None:
                bus.close()

    async def _read(self) -> Presence | Unknown:
        desktop = await self._desktop_idle_s()
        occupied = await self._desktop_occupied()
        try:
            seats = await self._seats()
            occupied += await self._inhibitors()
        except DbusError as error:
            if desktop is None:
                return Unknown(str(error))
            return Presence(idle_s=desktop[0], occupied=tuple(occupied), told_by=desktop[1])
        locked = bool(seats) and all(seat.get("LockedHint") for seat in seats)
        if not locked and self._session is not None:
            locked = await self._saver_active()
        if desktop is not None:
            return Presence(idle_s=desktop[0], locked=locked, occupied=tuple(occupied), told_by=desktop[1])
        if not locked and not occupied and any(_untold(seat) for seat in seats):
            return Unknown("the desktop of this session tells nobody when input came last")
        idle_s = min((self._idle_s(seat) for seat in seats), default=math.inf)
        return Presence(idle_s=idle_s, locked=locked, occupied=tuple(occupied), told_by="logind")

    async def _seats(self) -> list[dict[str, Any]]:
        """Properties of every session that sits at this machine; ssh sessions and greeters do not."""
        (sessions,) = await self._system.call(_SESSIONS)
        found = []
        for _name, _uid, _user, seat, path in sessions:
            if not seat:
                continue
            try:
                session = await self._system.get_all(_LOGIN, path, f"{_LOGIN}.Session")
            except DbusError as error:
                if not error.name:
                    raise
                continue  # it ended since it was listed
            if session.get("Class") == "user" and session.get("State") != "closing":
                found.append(session)
        return found

    def _idle_s(self, session: Mapping[str, Any]) -> float:
        if not session.get("IdleHint"):
            return 0.0
        return max(0.0, self._now() - float(session.get("IdleSinceHint", 0)) / 1e6)

    async def _inhibitors(self) -> list[str]:
        """Programs that keep the machine from being idle; ourselves not."""
        (inhibitors,) = await self._system.call(_INHIBITORS)
        return [
            f"{who} keeps the screen on ({why})"
            for what, who, why, mode, _uid, pid in inhibitors
            if "idle" in what.split(":") and mode == "block" and not descends(pid)
        ]

    async def _desktop_idle_s(self) -> tuple[float, str] | None:
        """Seconds since the last input, and who says so; None when no desktop tells."""
        if (idle_ms := await self._ask_desktop(_MUTTER)) is not None:
            return idle_ms / 1e3, "the GNOME desktop"
        if (idle_s := await self._ask_desktop(_SAVER_IDLE)) is not None:
            return float(idle_s), "the desktop's screen saver"
        return None

    async def _desktop_occupied(self) -> list[str]:
        found = []
        if await self._ask_desktop(_GNOME_INHIBITED, "u", _GNOME_IDLE):
            found.append("a program keeps the desktop from being idle")
        games = await self._ask_desktop(
            Method(_GAMEMODE, "/com/feralinteractive/GameMode", "org.freedesktop.DBus.Properties", "Get"),
            "ss",
            _GAMEMODE,
            "ClientCount",
        )
        if games:
            found.append("a game runs (GameMode)" if games == 1 else f"{games} games run (GameMode)")
        return found

    async def _saver_active(self) -> bool:
        return bool(await self._ask_desktop(_SAVER_ACTIVE))

    async def _ask_desktop(self, method: Method, signature: str = "", *arguments: Any) -> Any:
        """The first value of the answer; None when there is nobody to ask, or no answer."""
        if self._session is None:
            return None
        try:
            answer = await self._session.call(method, signature, *arguments)
        except DbusError:
            return None
        return answer[0] if answer else None


def _untold(session: Mapping[str, Any]) -> bool:
    """Whether a graphical session has never set its hint: logind then calls it busy for ever. It reads terminals."""
    graphical = session.get("Type") in ("x11", "wayland", "mir")
    return graphical and not session.get("IdleHint") and not session.get("IdleSinceHint")


# ---- Windows and macOS


class Desktop(PresenceReader):
    """A system that tells it at once, without waiting. `read_now` may block for a moment: it runs in a thread."""

    def __init__(self, read_now: Callable[[], Presence | Unknown]) -> None:
        self._read_now = read_now

    async def read(self) -> Presence | Unknown:
        """See `PresenceReader`."""
        try:
            return await trio.to_thread.run_sync(self._read_now, abandon_on_cancel=True)
        except (OSError, AttributeError) as error:
            return Unknown(f"the system does not tell when input came last: {error}")


class _LastInput(ctypes.Structure):
    """LASTINPUTINFO of winuser.h."""

    _fields_ = (("size", ctypes.c_uint32), ("tick", ctypes.c_uint32))


# shellapi.h, QUERY_USER_NOTIFICATION_STATE: what stands in the way of a notification.
_IN_THE_WAY = {2: "a program fills the screen", 3: "a game fills the screen", 4: "a presentation runs"}


def windows_presence() -> Presence | Unknown:
    """Of the session that this process belongs to. Raises OSError."""
    dlls: Any = ctypes.windll  # type: ignore[attr-defined,unused-ignore]
    session = ctypes.c_uint32()
    dlls.kernel32.ProcessIdToSessionId(os.getpid(), ctypes.byref(session))
    if session.value == 0:
        return Unknown("a service in session 0 cannot see the user: run the supervisor as a task of the user's session")
    last = _LastInput(size=ctypes.sizeof(_LastInput))
    if not dlls.user32.GetLastInputInfo(ctypes.byref(last)):
        return Unknown("GetLastInputInfo failed")
    # Both count milliseconds in 32 bits and start again every 49.7 days.
    idle_ms = (dlls.kernel32.GetTickCount() - last.tick) & 0xFFFFFFFF
    state = ctypes.c_int()
    failed = dlls.shell32.SHQueryUserNotificationState(ctypes.byref(state))
    occupied = () if failed or state.value not in _IN_THE_WAY else (_IN_THE_WAY[state.value],)
    return Presence(idle_s=idle_ms / 1e3, occupied=occupied, told_by="Windows")


_MAC = "/System/Library/Frameworks/{0}.framework/{0}"
_COMBINED_SESSION, _ANY_INPUT = 0, 0xFFFFFFFF  # CGEventSource.h
_UTF8, _INT32 = 0x08000100, 3  # CFString.h, CFNumber.h


def macos_presence() -> Presence | Unknown:
    """Of the login session. Raises OSError."""
    events = ctypes.CDLL(_MAC.format("ApplicationServices")).CGEventSourceSecondsSinceLastEventType
    events.restype, events.argtypes = ctypes.c_double, (ctypes.c_int32, ctypes.c_uint32)
    idle_s = float(events(_COMBINED_SESSION, _ANY_INPUT))
    kept = _mac_assertions("PreventUserIdleDisplaySleep") + _mac_assertions("NoDisplaySleepAssertion")
    occupied = ("a program keeps the display on",) if kept else ()
    return Presence(idle_s=idle_s, occupied=occupied, told_by="macOS")


def _mac_assertions(name: str) -> int:
    """How many power assertions of a name are held."""
    core, kit = ctypes.CDLL(_MAC.format("CoreFoundation")), ctypes.CDLL(_MAC.format("IOKit"))
    pointer = ctypes.c_void_p
    core.CFStringCreateWithCString.restype = core.CFDictionaryGetValue.restype = pointer
    core.CFStringCreateWithCString.argtypes = (pointer, ctypes.c_char_p, ctypes.c_uint32)
    core.CFDictionaryGetValue.argtypes = (pointer, pointer)
    core.CFNumberGetValue.argtypes = (pointer, ctypes.c_int, pointer)
    core.CFRelease.argtypes = (pointer,)
    held = pointer()
    if kit.IOPMCopyAssertionsStatus(ctypes.byref(held)) or not held:
        return 0
    key = core.CFStringCreateWithCString(None, name.encode(), _UTF8)
    try:
        count = ctypes.c_int32()
        if found := core.CFDictionaryGetValue(held, key):
            core.CFNumberGetValue(found, _INT32, ctypes.byref(count))
        return count.value
    finally:
        core.CFRelease(key)
        core.CFRelease(held)


# ---- simulated


class Scene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that stands for a person and their machine.

    Attributes:
        idle_s: null: nobody is logged in.
        fullscreen: true, or what fills the screen.
        battery: percent, on battery; null: plugged in.
    """

    idle_s: float | None = None
    locked: bool = False
    fullscreen: bool | str = False
    battery: float | None = None
    metered: bool = False


class Simulation(PresenceReader):
    """Reads the scene from a file, anew each time. A file that is not there or is broken makes all of it unknown."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def scene(self) -> Scene | Unknown:
        """What the file says now; it is small and local, and is read at once."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Scene)
        except OSError as error:
            return Unknown(f"{self._path} cannot be read: {error.strerror}")
        except msgspec.MsgspecError as error:
            return Unknown(f"{self._path} is no scene: {error}")

    async def read(self) -> Presence | Unknown:
        """See `PresenceReader`."""
        await trio.lowlevel.checkpoint()
        scene = self.scene()
        if isinstance(scene, Unknown):
            return scene
        text = scene.fullscreen if isinstance(scene.fullscreen, str) else "a program fills the screen"
        idle_s = math.inf if scene.idle_s is None else scene.idle_s
        occupied = (text,) if scene.fullscreen else ()
        return Presence(idle_s=idle_s, locked=scene.locked, occupied=occupied, told_by="a simulation")

    def power(self) -> Power | Unknown:
        """What feeds the simulated machine."""
        scene = self.scene()
        if isinstance(scene, Unknown):
            return scene
        return Power(on_battery=scene.battery is not None, percent=scene.battery)

    def network(self) -> Network | Unknown:
        """The simulated network."""
        scene = self.scene()
        return scene if isinstance(scene, Unknown) else Network(metered=scene.metered)
