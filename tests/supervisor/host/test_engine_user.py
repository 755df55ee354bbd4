"""Which user engines get: one that nobody else has."""

from __future__ import annotations

import grp
import os
import pwd
from types import SimpleNamespace

import pytest

from supervisor.host import engine_user as module
from supervisor.host.engine_user import NAMELESS, User, engine_user, found


@pytest.fixture(autouse=True)
def _fresh():
    engine_user.cache_clear()
    yield
    engine_user.cache_clear()


def test_a_user_made_for_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_uid=970, pw_gid=971) if name else None)
    assert found() == User(970, 971)
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: SimpleNamespace(pw_uid=0, pw_gid=0))
    assert found() is None


def test_else_a_number_that_nobody_has(monkeypatch: pytest.MonkeyPatch):
    def nobody(_name: str) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_uid=65521)])
    monkeypatch.setattr(grp, "getgrall", lambda: [SimpleNamespace(gr_gid=65522)])
    assert found() == User(65523, 65523)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_uid=number) for number in NAMELESS])
    assert found() is None
    assert 65534 not in NAMELESS


def test_only_root_has_a_user_to_drop_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert engine_user() is None
    engine_user.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert engine_user() == found()
