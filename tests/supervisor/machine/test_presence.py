"""Who is at the machine: logind and desktops on a private bus, and the files of a simulation."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from supervisor.intake.observed import Network, Presence, Unknown
from supervisor.machine import presence
from supervisor.machine.presence import Desktop, LinuxPresence, Simulation, presence_reader, session_address
from tests.supervisor.machine.fake_bus import Error, Service, private_bus

needs_unix = pytest.mark.skipif(sys.platform == "win32", reason="D-Bus is spoken over Unix sockets")

LOGIN = "org.freedesktop.login1"
NOW = 1_000_000.0


def session(idle_since: float | None = None, *, locked: bool = False, **more: str) -> tuple:
    values = {
        "IdleHint": ("b", idle_since is not None),
        "IdleSinceHint": ("t", int((idle_since or 0) * 1e6)),
        "LockedHint": ("b", locked),
        "Class": ("s", more.get("class_", "user")),
        "State": ("s", more.get("state", "active")),
        "Type": ("s", more.get("type_", "tty")),
        "Seat": ("(so)", ("seat0", "/seat0")),
    }
    return "a{sv}", (values,)


def logind(table: dict, seated: dict[str, tuple], inhibitors: list[tuple] = []) -> None:  # noqa: B006
    listed = [(str(number), 1000, "anna", "seat0", path) for number, path in enumerate(seated)]
    listed.append(("9", 1001, "ssh", "", "/ssh"))
    table[f"{LOGIN}.Manager", "ListSessions"] = "a(susso)", (listed,)
    table[f"{LOGIN}.Manager", "ListInhibitors"] = "a(ssssuu)", (inhibitors,)
    for path, found in seated.items():
        table[path, "org.freedesktop.DBus.Properties", "GetAll", f"{LOGIN}.Session"] = found


FILM = ("idle", "mpv", "playing a video", "block", 1000, 4242)


@pytest.mark.parametrize(
    ("seated", "inhibitors", "expected"),
    [
        ({}, [], Presence(idle_s=math.inf, told_by="logind")),
        ({"/s1": session()}, [], Presence(idle_s=0, told_by="logind")),
        ({"/s1": session(NOW - 90)}, [], Presence(idle_s=90, told_by="logind")),
        ({"/s1": session(NOW - 90), "/s2": session(NOW - 30)}, [], Presence(idle_s=30, told_by="logind")),
        ({"/s1": session(locked=True)}, [], Presence(idle_s=0, locked=True, told_by="logind")),
        ({"/s1": session(locked=True), "/s2": session()}, [], Presence(idle_s=0, told_by="logind")),
        # a greeter is no person, and neither is somebody who is leaving
        ({"/s1": session(class_="greeter")}, [], Presence(idle_s=math.inf, told_by="logind")),
        ({"/s1": session(state="closing")}, [], Presence(idle_s=math.inf, told_by="logind")),
        # one that ended since it was listed
        ({"/gone": Error("no such session"), "/s1": session(NOW - 5)}, [], Presence(idle_s=5, told_by="logind")),
        # a bare window manager: nobody ever told logind anything, and "busy since 1970" is no person
        (
            {"/s1": session(type_="x11")},
            [],
            Unknown("the desktop of this session tells nobody when input came last"),
        ),
        ({"/s1": session(type_="wayland", locked=True)}, [], Presence(idle_s=0, locked=True, told_by="logind")),
        (
            {"/s1": session(type_="x11")},
            [FILM],
            Presence(idle_s=0, occupied=("mpv keeps the screen on (playing a video)",), told_by="logind"),
        ),
        ({"/s1": session(NOW - 5, type_="x11")}, [], Presence(idle_s=5, told_by="logind")),
        # a clock that was set back
        ({"/s1": session(NOW + 60)}, [], Presence(idle_s=0, told_by="logind")),
        # a film; a delay, another purpose and ourselves are none
        (
            {"/s1": session(NOW - 90)},
            [
                FILM,
                ("idle", "x", "y", "delay", 1, 1),
                ("sleep:shutdown", "x", "y", "block", 1, 1),
                ("sleep:idle", "bulkhead", "work", "block", 1, os.getpid()),
            ],
            Presence(idle_s=90, occupied=("mpv keeps the screen on (playing a video)",), told_by="logind"),
        ),
    ],
)
@needs_unix
async def test_logind(tmp_path, nursery, seated, inhibitors, expected):
    with private_bus(tmp_path) as address:
        service = Service(address, LOGIN)
        logind(service.table, seated, inhibitors)
        await nursery.start(service.run)
        reader = LinuxPresence(address, now=lambda: NOW)
        assert await reader.read() == expected
        reader.close()
        nursery.cancel_scope.cancel()


GNOME = {("org.gnome.Mutter.IdleMonitor", "GetIdletime"): ("t", (1500,))}
KDE = {("org.freedesktop.ScreenSaver", "GetSessionIdleTime"): ("u", (77,))}
SAVER_ON = {("org.freedesktop.ScreenSaver", "GetActive"): ("b", (True,))}
INHIBITED = {("org.gnome.SessionManager", "IsInhibited", "8"): ("b", (True,))}
DESKTOP_NAMES = (
    "org.gnome.Mutter.IdleMonitor",
    "org.freedesktop.ScreenSaver",
    "org.gnome.SessionManager",
    "com.feralinteractive.GameMode",
)


def games(count: int) -> dict:
    return {
        ("org.freedesktop.DBus.Properties", "Get", "com.feralinteractive.GameMode", "ClientCount"): (
            "v",
            (("i", count),),
        )
    }


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (GNOME, Presence(idle_s=1.5, told_by="the GNOME desktop")),
        (KDE, Presence(idle_s=77, told_by="the desktop's screen saver")),
        (GNOME | KDE, Presence(idle_s=1.5, told_by="the GNOME desktop")),
        (KDE | SAVER_ON, Presence(idle_s=77, locked=True, told_by="the desktop's screen saver")),
        (
            GNOME | INHIBITED | games(2),
            Presence(
                idle_s=1.5,
                occupied=("a program keeps the desktop from being idle", "2 games run (GameMode)"),
                told_by="the GNOME desktop",
            ),
        ),
        (games(1), Presence(idle_s=0, occupied=("a game runs (GameMode)",), told_by="logind")),
        (games(0), Presence(idle_s=0, told_by="logind")),
    ],
)
@needs_unix
async def test_a_desktop_knows_more(tmp_path, nursery, table, expected):
    with private_bus(tmp_path) as address:
        service = Service(address, LOGIN, *DESKTOP_NAMES)
        logind(service.table, {"/s1": session()})
        service.table |= table
        await nursery.start(service.run)
        reader = LinuxPresence(address, address, now=lambda: NOW)
        assert await reader.read() == expected
        reader.close()
        nursery.cancel_scope.cancel()


@needs_unix
async def test_a_desktop_alone_is_enough(tmp_path, nursery):
    with private_bus(tmp_path) as address:
        service = Service(address, *DESKTOP_NAMES)
        service.table |= GNOME
        await nursery.start(service.run)
        reader = LinuxPresence(f"unix:path={tmp_path}/none", address)
        assert await reader.read() == Presence(idle_s=1.5, told_by="the GNOME desktop")
        reader.close()
        nursery.cancel_scope.cancel()


@needs_unix
async def test_nobody_who_could_tell_is_a_value(tmp_path):
    found = await LinuxPresence(f"unix:path={tmp_path}/none").read()
    assert isinstance(found, Unknown)
    assert "cannot be used" in found.reason


@needs_unix
async def test_answers_of_another_shape_are_unknown(tmp_path, nursery):
    with private_bus(tmp_path) as address:
        service = Service(address, LOGIN)
        service.table[f"{LOGIN}.Manager", "ListSessions"] = "s", ("none of your business",)
        await nursery.start(service.run)
        reader = LinuxPresence(address)
        found = await reader.read()
        assert isinstance(found, Unknown)
        assert "another shape" in found.reason
        reader.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ""),
        ({"DBUS_SESSION_BUS_ADDRESS": "unix:path=/x"}, "unix:path=/x"),
        ({"XDG_RUNTIME_DIR": "/nowhere"}, ""),
        ({"XDG_RUNTIME_DIR": "relative"}, ""),
    ],
)
def test_where_the_session_bus_is(environ, expected):
    assert session_address(environ) == expected


def test_the_session_bus_of_a_user_service(tmp_path):
    (tmp_path / "bus").touch()
    assert session_address({"XDG_RUNTIME_DIR": str(tmp_path)}) == f"unix:path={tmp_path}/bus"


# ---- the others


async def test_a_system_without_the_call_is_unknown():
    def missing() -> Presence:
        raise AttributeError("no such function")

    assert isinstance(await Desktop(missing).read(), Unknown)


class Windows:
    """The three libraries as this code uses them; 32-bit ticks that start again."""

    def __init__(self, *, session: int = 1, tick: int = 1000, last: int = 400, state: int = 5) -> None:
        def session_of(_pid: int, place: object) -> int:
            place._obj.value = session
            return 1

        def last_input(place: object) -> int:
            place._obj.tick = last
            return 1

        def state_of(place: object) -> int:
            place._obj.value = state
            return 0

        self.kernel32 = SimpleNamespace(ProcessIdToSessionId=session_of, GetTickCount=lambda: tick)
        self.user32 = SimpleNamespace(GetLastInputInfo=last_input)
        self.shell32 = SimpleNamespace(SHQueryUserNotificationState=state_of)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (Windows(), Presence(idle_s=0.6, told_by="Windows")),
        (Windows(tick=100, last=2**32 - 400), Presence(idle_s=0.5, told_by="Windows")),
        (Windows(state=3), Presence(idle_s=0.6, occupied=("a game fills the screen",), told_by="Windows")),
    ],
)
def test_windows_by_its_documented_calls(monkeypatch, windows, expected):
    """Against stand-ins of the libraries: what Windows itself answers can be seen on Windows only."""
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    assert presence.windows_presence() == expected


def test_a_windows_service_sees_nobody(monkeypatch):
    monkeypatch.setattr(ctypes, "windll", Windows(session=0), raising=False)
    found = presence.windows_presence()
    assert isinstance(found, Unknown)
    assert "session 0" in found.reason


@pytest.mark.skipif(sys.platform != "darwin", reason="macOS only")
def test_macos_tells():
    assert isinstance(presence.macos_presence(), Presence)


# ---- simulated


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        ({}, Presence(idle_s=math.inf, told_by="a simulation")),
        ({"idle_s": 3}, Presence(idle_s=3, told_by="a simulation")),
        ({"idle_s": 3, "locked": True}, Presence(idle_s=3, locked=True, told_by="a simulation")),
        (
            {"idle_s": 900, "fullscreen": True, "battery": 40},
            Presence(idle_s=900, occupied=("a program fills the screen",), told_by="a simulation"),
        ),
        (
            {"idle_s": 900, "fullscreen": "a game fills the screen"},
            Presence(idle_s=900, occupied=("a game fills the screen",), told_by="a simulation"),
        ),
    ],
)
async def test_a_scene(tmp_path, scene, expected):
    path = tmp_path / "scene.json"
    path.write_text(json.dumps(scene))
    reader = presence_reader({"BULKHEAD_SIMULATED_PRESENCE": str(path)})
    assert await reader.read() == expected


@pytest.mark.parametrize("text", ["", "{", '{"idle": 3}', '{"idle_s": "long"}', "[]"])
async def test_a_broken_scene_makes_everything_unknown(tmp_path, text):
    path: Path = tmp_path / "scene.json"
    path.write_text(text)
    simulation = Simulation(path)
    for found in (await simulation.read(), simulation.power(), simulation.network()):
        assert isinstance(found, Unknown)
        assert "is no scene" in found.reason


async def test_a_scene_that_is_not_there(tmp_path):
    assert isinstance(await Simulation(tmp_path / "none").read(), Unknown)


def test_a_simulated_network(tmp_path):
    path = tmp_path / "scene.json"
    path.write_text('{"metered": true}')
    assert Simulation(path).network() == Network(metered=True)


def test_without_a_simulation_it_is_this_system():
    kind = LinuxPresence if sys.platform == "linux" else Desktop
    assert isinstance(presence_reader({}), kind)
