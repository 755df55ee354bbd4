"""Pulls and removals that a running supervisor is asked for: the real command in a child, over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import KEEP_ALIVE_S, Refused
from supervisor.pulls import MOST, Pulls

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
BYTES = CHAT.read_bytes()
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text('# mine\n[worker]\nstate_dir = "state"\n')
    return path


def models(config: Path) -> list[str]:
    return [str(model["name"]) for model in tomllib.loads(config.read_text()).get("models", [])]


def words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""  # it has ended meanwhile


async def heard(events: Any) -> list[Mapping[str, Any]]:
    with trio.fail_after(60):
        async with contextlib.aclosing(events):
            return [said async for said in events if said is not None]


async def test_a_pull_brings_a_model_and_its_entry_and_says_how_far_it_is(config):
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        said = await heard(pulls.pull(Pull(source=str(CHAT), name="mine")))
        assert [said[0]["t"], said[0]["total_bytes"]] == ["plan", len(BYTES)]
        assert {one["t"] for one in said[1:-1]} == {"progress"}
        assert (said[-1]["t"], said[-1]["name"], said[-1]["engine"]) == ("done", "mine", "llm")
        assert models(config) == ["mine"]
        assert config.read_text().startswith("# mine\n"), "comments stay"
        again = await heard(pulls.pull(Pull(source=str(CHAT), name="mine")))
        assert again[-1] == said[-1], "who lost the connection at the end is told the end"
        assert pulls.running() == 0
        nursery.cancel_scope.cancel()


async def test_a_pull_goes_on_without_its_client_and_whoever_asks_again_follows_it(config, site):
    site.files["/chat.gguf"] = BYTES
    site.hold, site.hold_all = threading.Event(), True
    order = Pull(source=f"{site.url}/chat.gguf", sha256=DIGEST, name="mine")
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        first = pulls.pull(order)
        with trio.fail_after(60):
            assert (await anext(first))["t"] == "plan"
            await first.aclose()  # the client is gone
            assert pulls.running() == 1
            assert pulls.under_way(order)
            assert not pulls.under_way(Pull(source="owner/other", name="other"))
            with pytest.raises(Refused, match="'mine' is being pulled from") as refusal:
                pulls.pull(Pull(source="owner/other", name="mine"))
            assert refusal.value.status == 409
            second, third = pulls.pull(order), pulls.pull(order)
            assert (await anext(second))["t"] == "plan", "who comes late is told the plan, too"
            site.hold.set()
        ends = [(await heard(events))[-1] for events in (second, third)]
        assert [end["t"] for end in ends] == ["done", "done"]
        assert sum(asked["method"] == "GET" for asked in site.asked) == 1, "it was fetched once"
        nursery.cancel_scope.cancel()
    assert models(config) == ["mine"]


async def test_a_pull_ends_with_the_supervisor_and_the_next_one_goes_on(config, site):
    site.files["/chat.gguf"] = BYTES
    site.hold, site.hold_all = threading.Event(), True
    order = Pull(source=f"{site.url}/chat.gguf", sha256=DIGEST, name="mine")
    others = set(psutil.Process().children(recursive=True))  # a browser of other tests, say
    async with trio.open_nursery() as nursery:
        events = Pulls(config, nursery).pull(order)
        with trio.fail_after(60):
            assert (await anext(events))["t"] == "plan"
        below = [child for child in psutil.Process().children(recursive=True) if child not in others]
        assert any("pull" in words(child) for child in below)
        nursery.cancel_scope.cancel()
    said = await heard(events)
    assert said[-1] == {"t": "failed", "message": "The supervisor ends; ask again to go on where it stopped."}
    gone, left = await trio.to_thread.run_sync(lambda: psutil.wait_procs(below, timeout=60))
    assert left == [], gone
    assert models(config) == []
    site.hold.set()
    async with trio.open_nursery() as nursery:
        assert (await heard(Pulls(config, nursery).pull(order)))[-1]["t"] == "done"
        nursery.cancel_scope.cancel()


async def test_a_pull_that_is_called_off_ends_and_what_it_left_can_be_removed(config, site):
    site.files["/chat.gguf"] = BYTES
    site.hold, site.hold_all = threading.Event(), True
    order = Pull(source=f"{site.url}/chat.gguf", sha256=DIGEST, name="mine@0123456789")
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        assert not await pulls.has_files(order.name)
        events = pulls.pull(order)
        with trio.fail_after(60):
            assert (await anext(events))["t"] == "plan"
            await pulls.call_off(order)
        assert pulls.running() == 0
        assert "called off" in (await heard(events))[-1]["message"]
        await pulls.call_off(order)
        assert await pulls.has_files(order.name)
        assert "what a pull of it left is deleted" in await pulls.remove(Remove(name=order.name))
        assert not await pulls.has_files(order.name)
        with pytest.raises(Refused, match="has no model named"):
            await pulls.remove(Remove(name=order.name))
        site.hold.set()
        (*before, end) = await heard(pulls.pull(order))
        assert end["t"] == "done"
        assert before[-1]["total_bytes"] == len(BYTES), "known from the first answer on"
        nursery.cancel_scope.cancel()


async def test_a_pull_that_failed_says_why_and_is_tried_anew(config, site):
    order = Pull(source=f"{site.url}/chat.gguf", sha256=DIGEST, name="mine")
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        (*_rest, end) = await heard(pulls.pull(order))
        assert end["t"] == "failed"
        assert "404" in end["message"]
        site.files["/chat.gguf"] = BYTES
        assert (await heard(pulls.pull(order)))[-1]["t"] == "done"
        nursery.cancel_scope.cancel()


async def test_what_does_not_fit_on_the_disk_is_refused_before_a_byte_is_fetched(config, site, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.repos["owner/chat"] = {"chat.gguf": BYTES}
    site.listed["chat.gguf"] = 2**60
    async with trio.open_nursery() as nursery:
        (*_rest, end) = await heard(Pulls(config, nursery).pull(Pull(source="owner/chat", file="chat.gguf")))
        nursery.cancel_scope.cancel()
    assert end["t"] == "failed"
    assert "GiB free" in end["message"]
    assert models(config) == []


@pytest.mark.parametrize("source", ["--help", "-x", "--config=/etc/passwd", "a\nb", "../../nothing"])
async def test_a_source_is_never_an_option(config, source):
    async with trio.open_nursery() as nursery:
        (*_rest, end) = await heard(Pulls(config, nursery).pull(Pull(source=source)))
        nursery.cancel_scope.cancel()
    assert end["t"] == "failed"
    assert models(config) == []


async def test_a_source_with_a_nul_is_told_and_ends_nothing(config):
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        (*_rest, end) = await heard(pulls.pull(Pull(source="a\0b")))
        assert end["t"] == "failed"
        with pytest.raises(Refused):
            await pulls.remove(Remove(name="a\0b"))
        nursery.cancel_scope.cancel()


class Fake:
    """A child that says these lines, then waits for `go`."""

    def __init__(self, lines: list[bytes], go: trio.Event) -> None:
        self.lines, self.go = lines, go

    def __call__(self, _spec: object, **_named: object) -> Fake:
        return self

    async def __aenter__(self) -> Fake:
        return self

    async def __aexit__(self, *_how: object) -> None:
        await trio.lowlevel.checkpoint()

    def close_stdin(self) -> None:
        pass

    async def read(self) -> bytes:
        if self.lines:
            return self.lines.pop(0)
        await self.go.wait()
        return b""

    async def wait(self) -> Any:
        class How:
            def describe(self) -> str:
                return "ended with exit code 3"

        return How()

    def stderr_tail(self, _lines: int) -> list[str]:
        return ["last words"]

    def kill(self, _why: str) -> None:
        self.go.set()


async def test_a_quiet_pull_is_told_to_be_alive_and_an_unspoken_end_is_a_failure(config, autojump_clock):
    go = trio.Event()
    lines = [b"some library's words\n{", b'"t":"note","text":"x"}\n', b"[]\n", b'{"t":"other"}\n']
    async with trio.open_nursery() as nursery:
        events = Pulls(config, nursery, Fake(lines, go)).pull(Pull(source="x"))
        assert await anext(events) == {"t": "note", "text": "x"}
        began = trio.current_time()
        assert await anext(events) is None
        assert trio.current_time() - began == KEEP_ALIVE_S
        go.set()
        end = await anext(events)
        assert end["t"] == "failed"
        assert "ended with exit code 3: last words" in end["message"]
        await events.aclose()
        nursery.cancel_scope.cancel()


async def test_a_child_that_does_not_speak_in_lines_is_ended(config, autojump_clock):
    lines = [b"x" * 2**20, b"x", b"x" * 2**20]
    async with trio.open_nursery() as nursery:
        assert (await heard(Pulls(config, nursery, Fake(lines, trio.Event())).pull(Pull(source="x"))))[-1][
            "t"
        ] == "failed"
        nursery.cancel_scope.cancel()


async def test_only_so_many_pulls_at_once(config, autojump_clock):
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery, lambda spec, **_named: Fake([], trio.Event()))
        for number in range(MOST):
            pulls.pull(Pull(source=f"owner/m{number}"))
        pulls.pull(Pull(source="owner/m0"))  # the same again is no other
        with pytest.raises(Refused, match="8 pulls are under way") as refusal:
            pulls.pull(Pull(source="owner/more"))
        assert refusal.value.status == 429
        nursery.cancel_scope.cancel()


async def test_a_slow_reader_misses_progress_and_never_the_end(config, autojump_clock):
    go = trio.Event()
    lines = [b'{"t":"progress","done_bytes":%d}\n' % number for number in range(1000)] + [b'{"t":"done","name":"x"}\n']
    async with trio.open_nursery() as nursery:
        events = Pulls(config, nursery, Fake([b'{"t":"plan"}\n', b"".join(lines)], go)).pull(Pull(source="x"))
        said = await heard(events)
        assert said[0]["t"] == "plan"
        assert [one.get("done_bytes") for one in said[1:]] == [999, None]
        assert said[-1]["t"] == "done"
        go.set()
        nursery.cancel_scope.cancel()


# ---- removals


async def test_a_removal_takes_entry_and_files_away(config, tmp_path):
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        folder = Path((await heard(pulls.pull(Pull(source=str(CHAT), name="mine"))))[-1]["folder"])
        assert folder.is_dir()
        began = time.monotonic()
        said = await pulls.remove(Remove(name="mine"))
        assert time.monotonic() - began < 30
        assert "mine is out of" in said
        assert "is deleted" in said
        assert models(config) == []
        assert not folder.exists()
        assert CHAT.exists()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("named", ["mine", ""])
async def test_what_was_removed_is_pulled_anew_at_once(config, tmp_path, named):
    source = tmp_path / "mine.gguf"
    source.write_bytes(BYTES)
    order = Pull(source=str(source), name=named)
    async with trio.open_nursery() as nursery:
        pulls = Pulls(config, nursery)
        assert (await heard(pulls.pull(order)))[-1]["name"] == "mine"
        await pulls.remove(Remove(name="mine"))
        assert (await heard(pulls.pull(order)))[-1]["t"] == "done"
        assert models(config) == ["mine"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["nothing", "../../etc", "--keep-files", "-h", "a/b", "state"])
async def test_what_is_not_there_is_not_removed(config, name):
    config.write_text(config.read_text() + '[[models]]\nname = "synthetic"\nengine = "synthetic"\n')
    before = config.read_bytes()
    async with trio.open_nursery() as nursery:
        with pytest.raises(Refused, match="it has: synthetic") as refusal:
            await Pulls(config, nursery).remove(Remove(name=name))
        nursery.cancel_scope.cancel()
    assert refusal.value.status == 409
    assert config.read_bytes() == before
