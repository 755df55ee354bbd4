"""The configuration of a running supervisor; over its socket: control/test_routes_config.py."""

from __future__ import annotations

import pytest

from supervisor import config_live
from supervisor.config import load
from supervisor.config_edit import StaleEdit
from supervisor.config_live import LiveConfig
from supervisor.errors import ConfigError
from supervisor.reload import Reloader


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text("[limits]\nstall_s = 10\n")
    return path


@pytest.fixture
async def live(path):
    return LiveConfig(path, Reloader(path, load(path, {}), {}, environ={}), {})


async def test_what_another_program_wrote_meanwhile_is_no_mistake_of_the_edit(live, path, monkeypatch):
    """`edit` finds the right tag, and then another file under its hands."""

    def overtaken(at, _changes, if_match):
        at.write_text("[limits]\nstall_s = 11\n")
        raise ConfigError([f"{at}: was changed by another program meanwhile; nothing was written, try again"])

    monkeypatch.setattr(config_live, "edit", overtaken)
    _told, etag = await live.shown()
    with pytest.raises(StaleEdit, match="look at it again"):
        await live.edit({"limits.stall_s": 5}, etag)
    with pytest.raises(ConfigError, match="try again"):
        await live.edit({"limits.stall_s": 5}, "")


async def test_what_waits_for_a_restart_is_listed_until_it_is_changed_back(live):
    told, etag = await live.edit({"worker.name": "other"}, "")
    assert [change["key"] for change in told["restart"]] == ["worker.name"]
    seen, shown = await live.shown()
    assert (seen["restart"], shown) == (told["restart"], etag)
    told, _etag = await live.edit({"worker.name": None}, etag)
    assert (told["restart"], told["applied"], told["problems"]) == ([], [], [])


async def test_an_applier_that_fails_is_told_although_the_file_is_written(path):
    async def fails(_settings, _changes):
        raise OSError("no room")

    live = LiveConfig(path, Reloader(path, load(path, {}), {"limits": fails}, environ={}), {})
    told, _etag = await live.edit({"limits.stall_s": 5}, "")
    assert told["ok"] is False
    assert "no room" in told["problems"][0]
    assert [change["key"] for change in told["restart"]] == ["limits.stall_s"]
    assert load(path, {}).limits.stall_s == 5
