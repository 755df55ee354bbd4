"""C functions without the module ctypes: what goes in, what comes out, and that the slow way does the same."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import sys
from types import ModuleType

import pytest

from engines.lockdown import foreign

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher calls the kernel on Linux")
_EBADF_CALL = 2**31 - 1  # no descriptor has this number


@pytest.fixture(params=["quick", "whole"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "quick":
        assert hasattr(foreign, "_QuickLong"), "this interpreter takes the slow way"
        return foreign
    monkeypatch.setitem(sys.modules, "_ctypes", None)
    spec = importlib.util.find_spec("engines.lockdown.foreign")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert not hasattr(made, "_QuickLong")
    return made


def test_integers_bytes_and_null(module: ModuleType):
    assert module.function("abs")(7) == 7
    assert module.function("strlen", long=True)(b"four") == 4
    assert module.function("getenv", long=True)(b"BULKHEAD_NO_SUCH_VARIABLE") == 0
    assert module.function("time", long=True)(None) > 1_600_000_000


def test_what_an_int_returns_keeps_its_sign_and_leaves_errno(module: ModuleType):
    """A negative int in a register of eight bytes is no negative long."""
    assert module.function("close")(_EBADF_CALL) == -1
    assert module.get_errno() == errno.EBADF


def test_a_long_is_whole(module: ModuleType):
    assert module.function("labs", long=True)(2**40) == 2**40


def test_an_address_is_where_the_bytes_are(module: ModuleType):
    data = os.urandom(64)
    assert ctypes.string_at(module.address(data), len(data)) == data


def test_a_name_that_is_not_there(module: ModuleType):
    with pytest.raises((OSError, AttributeError)):
        module.function("no_such_function_anywhere")
