"""The configuration of a running supervisor; over its socket: control/test_routes_config.py."""

from __future__ import annotations

import pytest
import trio

from supervisor.config import load
from supervisor.config_edit import StaleEdit
from supervisor.config_live import LiveConfig
from supervisor.reload import Reloader


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text("[limits]\nstall_s = 10\n")
    return path


@pytest.fixture
async def live(path):
    return LiveConfig(path, Reloader(path, load(path, {}), {}, environ={}), {})


async def test_what_the_watch_over_the_files_took_up_first_is_told_all_the_same(path):
    async def applies(_settings, _changes):
        await trio.lowlevel.checkpoint()

    class Overtaken(Reloader):
        async def reload(self, reason):
            await super().reload("the files changed")
            return await super().reload(reason)

    live = LiveConfig(path, Overtaken(path, load(path, {}), {"limits": applies}, environ={}), {})
    told, _etag = await live.edit({"limits.stall_s": 5, "worker.name": "other"}, "")
    assert [change["key"] for change in told["applied"]] == ["limits.stall_s"]
    assert [change["key"] for change in told["restart"]] == ["worker.name"]


async def test_a_file_that_is_a_link_is_edited_where_it_lies(path, tmp_path):
    link = tmp_path / "etc" / "link.toml"
    link.parent.mkdir()
    link.symlink_to(path)
    live = LiveConfig(link, Reloader(link, load(link, {}), {}, environ={}), {})
    _told, etag = await live.shown()
    _told, after = await live.edit({"limits.stall_s": 5}, etag)
    assert load(path, {}).limits.stall_s == 5
    assert link.is_symlink()
    assert (await live.shown())[1] == after


async def test_an_edit_of_what_was_not_seen_changes_nothing(live, path):
    before = path.read_bytes()
    with pytest.raises(StaleEdit, match="look at it again"):
        await live.edit({"limits.stall_s": 5}, "x")
    assert path.read_bytes() == before


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
