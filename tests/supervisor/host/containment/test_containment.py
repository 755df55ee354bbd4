"""Which backend a platform gets, and that each of them has the whole interface."""

from __future__ import annotations

import inspect
import sys

import pytest

from supervisor.host.containment import backend, base
from supervisor.host.containment.linux import Linux, LinuxLeash
from supervisor.host.containment.macos import Macos, MacosLeash
from supervisor.host.containment.windows import Windows, WindowsLeash

LEASHES = [LinuxLeash, MacosLeash, WindowsLeash]


def test_platforms_have_their_backends():
    assert isinstance(backend("linux"), Linux)
    assert isinstance(backend("darwin"), Macos)
    assert backend("linux") is backend("linux")
    if sys.platform.startswith("linux"):
        assert isinstance(backend(), Linux)


def test_an_unknown_platform_is_told_which_ones_there_are():
    with pytest.raises(NotImplementedError, match="on plan9; there are backends for linux, darwin, win32"):
        backend("plan9")


@pytest.mark.skipif(sys.platform == "win32", reason="there it can be made")
def test_windows_cannot_be_made_elsewhere():
    with pytest.raises(OSError, match=r"no kernel32\.dll"):
        backend("win32")


@pytest.mark.parametrize("leash", LEASHES)
def test_every_leash_has_the_whole_interface_with_the_same_parameters(leash: type):
    for name, wanted in inspect.getmembers(base.Leash, inspect.isfunction):
        if name.startswith("_"):
            continue
        found = getattr(leash, name)
        assert list(inspect.signature(found).parameters) == list(inspect.signature(wanted).parameters), name
        assert inspect.iscoroutinefunction(found) == inspect.iscoroutinefunction(wanted), name


@pytest.mark.parametrize("made", [Linux, Macos, Windows])
def test_every_backend_has_the_whole_interface(made: type):
    for name, wanted in inspect.getmembers(base.Containment, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(made, name)).parameters) == list(
                inspect.signature(wanted).parameters
            ), name
    assert isinstance(made.name, str)


def test_ends_are_told_in_words():
    assert base.Exit(signal=11).describe() == "killed by SIGSEGV"
    assert base.Exit(code=3).describe() == "ended with exit code 3"
    assert base.Exit().unkillable
    assert base.signal_name(250) == "signal 250"
