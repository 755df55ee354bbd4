"""The configuration by a real client: looking, editing what it has seen, and edits that collide."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from supervisor.config import MASK, load
from supervisor.config_live import LiveConfig
from supervisor.control.routes_config import MOST_KEYS
from supervisor.control.server import open_control
from supervisor.control.snapshot import Snapshot
from supervisor.control.surface import Surface
from supervisor.reload import Reloader
from supervisor.reload_plan import Change
from supervisor.settings import Settings
from tests.supervisor.control.reader import asked

TEXT = """\
# mine
config_version = 1
[limits]
stall_s = 10  # short
[engines.llm.env]
API_KEY = "hush"
"""
TARGET = "/v1/config"


class Live:
    """A served configuration, and what was applied of it."""

    def __init__(self, file: Path, acts: object) -> None:
        self.file = file
        self.socket = file.with_name("config.sock")
        self.applied: list[str] = []
        reloader = Reloader(file, load(file, {}), {"limits": self._apply}, environ={})
        self.config = LiveConfig(file, reloader, {})
        self.surface = Surface(lambda: Snapshot(version="1"), acts, config=self.config)

    async def _apply(self, _settings: Settings, changes: Sequence[Change]) -> None:
        await trio.lowlevel.checkpoint()
        self.applied += [change.key for change in changes]

    async def etag(self) -> str:
        return (await asked(self.socket, "GET", TARGET))[1]["etag"]

    async def patch(self, changes: object, **headers: str) -> tuple[int, dict[str, str], dict]:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return await asked(self.socket, "PATCH", TARGET, changes, named)


@pytest.fixture
async def live(tmp_path, box) -> AsyncIterator[Live]:
    file = tmp_path / "worker.toml"
    file.write_text(TEXT)
    made = Live(file, box.acts)
    async with open_control(made.socket, made.surface):
        yield made


async def test_what_is_in_force_where_it_comes_from_and_no_secrets(live):
    (live.file.parent / "conf.d").mkdir()
    (live.file.parent / "conf.d" / "50.toml").write_text("[limits]\nload_s = 77\n")
    status, headers, seen = await asked(live.socket, "GET", TARGET)
    assert status == 200
    assert headers["etag"].startswith('"')
    assert [os.path.basename(file) for file in seen["files"]] == ["worker.toml", "50.toml"]
    assert seen["settings"]["limits"]["stall_s"] == 10
    values = {row["key"]: row for row in seen["values"]}
    told = values["limits.stall_s"]
    assert (told["value"], told["source"], told["place"]) == (10.0, "file", f"{live.file}:4")
    assert values["limits.load_s"]["place"].endswith("50.toml:2")
    assert values["log.level"]["source"] == "default"
    assert values["engines.llm.env.API_KEY"]["value"] == MASK
    assert "hush" not in str(seen)
    assert (seen["problems"], seen["restart"]) == ([], [])


async def test_the_tag_follows_every_byte_of_every_file(live):
    tags = [await live.etag(), await live.etag()]
    assert tags[0] == tags[1]
    live.file.write_text(TEXT.replace("# mine", "# ours"))
    tags.append(await live.etag())
    (live.file.parent / "conf.d").mkdir()
    (live.file.parent / "conf.d" / "50.toml").write_text("")
    tags.append(await live.etag())
    assert len(set(tags)) == 3


async def test_the_schema(live):
    status, headers, seen = await asked(live.socket, "GET", "/v1/config/schema")
    assert (status, headers["content-type"]) == (200, "application/schema+json")
    assert seen["$defs"]["LimitsTable"]["properties"]["stall_s"]["x-apply"] == "live"


async def test_an_edit_says_what_is_in_force_and_what_waits(live):
    etag = await live.etag()
    status, headers, told = await live.patch(
        {"limits.stall_s": 33, "limits.load_s": 44, "worker.name": "other"}, if_match=etag
    )
    assert status == 200, told
    assert told["ok"] is True
    assert sorted(change["key"] for change in told["applied"]) == ["limits.load_s", "limits.stall_s"]
    assert [change["key"] for change in told["restart"]] == ["worker.name"]
    assert sorted(live.applied) == ["limits.load_s", "limits.stall_s"]
    text = live.file.read_text()
    assert text.startswith("# mine\n")
    assert "stall_s = 33  # short" in text
    assert headers["etag"] == await live.etag() != etag
    # With the tag of the answer it goes on; a null takes a key out again.
    status, _headers, told = await live.patch({"worker.name": None, "limits.stall_s": None}, if_match=headers["etag"])
    assert (status, told["restart"]) == (200, [])
    assert [change["key"] for change in told["applied"]] == ["limits.stall_s"]
    assert load(live.file, {}).limits.stall_s == Settings().limits.stall_s


async def test_an_edit_that_something_overrides_says_so(live):
    (live.file.parent / "conf.d").mkdir()
    drop_in = live.file.parent / "conf.d" / "50.toml"
    drop_in.write_text("[limits]\nload_s = 77\n")
    _status, _headers, told = await live.patch({"limits.load_s": 44}, if_match=await live.etag())
    assert told["stronger"] == {"limits.load_s": f"{drop_in}:2"}


async def test_an_edit_of_what_was_not_seen_is_refused(live):
    status, _headers, answer = await live.patch({"limits.stall_s": 33})
    assert status == 428
    assert "If-Match" in answer["error"]["message"]
    etag = await live.etag()
    live.file.write_text(TEXT.replace("10", "11"))
    for wrong in (etag, '"x"', '"x", "y"', f"W/{await live.etag()}", "nonsense", '""', f'"x", W/{await live.etag()}'):
        status, _headers, answer = await live.patch({"limits.stall_s": 33}, if_match=wrong)
        assert status == 412, wrong
        assert "look at it again" in answer["error"]["message"]
    assert live.file.read_text() == TEXT.replace("10", "11")
    assert live.applied == []
    for right in (f'"x", {await live.etag()}', "*"):
        assert (await live.patch({"limits.stall_s": 33}, if_match=right))[0] == 200


async def test_all_mistakes_at_once_and_nothing_is_written(live):
    etag = await live.etag()
    status, _headers, answer = await live.patch({"limits.stall_s": -5, "log.level": "loud"}, if_match=etag)
    assert status == 400
    problems = answer["error"]["problems"]
    assert len(problems) == 2
    assert f"{live.file}:4: limits.stall_s" in problems[0]
    assert "log.level" in problems[1]
    assert live.file.read_text() == TEXT
    for changes, word in (
        ({"limits.stal_s": 5}, "stall_s"),  # did you mean
        ({"limits": {"stall_s": 5}}, "table"),
        ({"models.chat.device": "cpu"}, "chat"),
        ({"engines.llm.env.API_KEY": MASK}, "secret"),
        ({"log.format": None}, "log.format"),
        ({"a b = 1": 1}, "no key"),
        ({"": 1}, "no key"),
    ):
        status, _headers, answer = await live.patch(changes, if_match=etag)
        assert status == 400, changes
        assert word in answer["error"]["message"], answer
    assert live.file.read_text() == TEXT


@pytest.mark.parametrize("body", [{}, {f"k{n}": n for n in range(MOST_KEYS + 1)}, [], b"{", b'"x"'])
async def test_a_wrong_body(live, body):
    status, _headers, answer = await live.patch(body, if_match="*")
    assert status == 400
    assert answer["error"]["message"]
    assert live.file.read_text() == TEXT


async def test_of_two_who_edit_at_once_one_is_refused(live):
    etag = await live.etag()
    found = []

    async def one(value: int) -> None:
        found.append((await live.patch({"limits.stall_s": value}, if_match=etag))[0])

    async with trio.open_nursery() as nursery:
        for value in range(20, 25):
            nursery.start_soon(one, value)
    assert sorted(found) == [200, 412, 412, 412, 412]


async def test_files_with_mistakes_are_shown_as_these_mistakes(live):
    live.file.write_text(TEXT + "[log]\nlevel = 'loud'\n")
    status, headers, seen = await asked(live.socket, "GET", TARGET)
    assert status == 200
    assert len(seen["problems"]) == 1
    assert "log.level" in seen["problems"][0]
    assert seen["settings"]["limits"]["stall_s"] == 10  # what is in force
    assert seen["values"] == []
    # It can be mended from here.
    status, _headers, _told = await live.patch({"log.level": "info"}, if_match=headers["etag"])
    assert status == 200
    live.file.write_text("[limits\n")
    status, headers, seen = await asked(live.socket, "GET", TARGET)
    assert (status, "etag" in headers) == (200, False)
    assert f"{live.file}:1" in seen["problems"][0]
    assert (await live.patch({"log.level": "info"}, if_match="*"))[0] == 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_file_that_cannot_be_written(live):
    live.file.parent.chmod(0o500)
    status, _headers, answer = await live.patch({"limits.stall_s": 33}, if_match="*")
    live.file.parent.chmod(0o700)
    assert status == 403
    assert "cannot be written" in answer["error"]["message"]
