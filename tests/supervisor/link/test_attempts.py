"""Claims without a wire: what is delivered while nobody is there, and what is left to the next start."""

from __future__ import annotations

import contextlib
import hashlib
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault, refuse
from supervisor.host.ground import Ground
from supervisor.link import attempts as subject
from supervisor.link.attempts import Attempts
from supervisor.link.keeping import OnDisk, Parcel
from supervisor.link.outbox import Outbox
from supervisor.store import open_store
from supervisor.testing import FakeHost

PATIENCE_S = 0.01
STOPPING = Fault("worker_stopping", "The engine is restarted.")
OFFER = wire.Offer(kind="image", model="m", params=msgspec.Raw(msgspec.msgpack.encode({"prompt": "x"})), upload="/u")


class Delivery:
    """Takes nothing for as many tries, each of which takes all the patience that it gets."""

    def __init__(self, failing: float = 0, at_once: bool = False) -> None:
        self.failing, self.at_once = failing, at_once
        self.tries = 0
        self.under_way, self.over = trio.Event(), trio.Event()

    async def fetch(self, *_given: object) -> None:
        raise AssertionError

    async def upload(self, _template, _file, _source, _until, _moved, patience_s: float) -> None:
        self.tries += 1
        self.under_way.set()
        if self.tries <= self.failing:
            await trio.sleep(0 if self.at_once else patience_s)
            raise refuse("upload_failed", "nobody was there")
        self.over.set()


class Gated(Delivery):
    """Takes everything, once it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()

    async def upload(self, _template, _file, _source, _until, _moved, patience_s: float) -> None:
        self.under_way.set()
        await self.gate.wait()
        await super().upload(_template, _file, _source, _until, _moved, patience_s)


class Rig:
    def __init__(self, attempts: Attempts, delivery: Delivery, host: FakeHost) -> None:
        self.attempts, self.delivery, self.host = attempts, delivery, host
        self.posted: list[wire.Body] = []
        self.news = trio.Event()

    def post(self, body: wire.Body, _job: str, _attempt: int) -> None:
        self.posted.append(body)
        self.news.set()
        self.news = trio.Event()

    async def posts(self, type_: type[wire.Body]) -> wire.Body:
        with trio.fail_after(60):
            while not (found := [body for body in self.posted if isinstance(body, type_)]):
                await self.news.wait()
        return found[0]

    async def painted(self, away: bool) -> None:
        """An image is there; its upload begins."""
        self.attempts.attach(self.post)
        self.attempts.begin("j", 1, OFFER)
        run = await self.host.next_run()
        if away:
            self.attempts.detach()
        (run.request.folder / "out.png").write_bytes(b"x")
        run.start()
        run.done({}, [OutputFile("out.png", "image/png", 1, hashlib.sha256(b"x").hexdigest())])
        with trio.fail_after(60):
            await self.delivery.under_way.wait()


@contextlib.asynccontextmanager
async def rig(folder: Path, delivery: Delivery, kept: bool = False):
    async with contextlib.AsyncExitStack() as stack:
        keeping = None
        if kept:
            store = await stack.enter_async_context(open_store(folder / "records"))
            keeping = OnDisk(store, Outbox(folder / "outbox", 2**20))
        nursery = await stack.enter_async_context(trio.open_nursery())
        host, ground = FakeHost(), Ground(folder / "ground")
        attempts = Attempts(host, delivery, lambda _model: ground, nursery, keeping=keeping)
        if keeping is not None:
            attempts.restore(await keeping.restore())
        yield Rig(attempts, delivery, host)
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "UPLOAD_PATIENCE_S", PATIENCE_S)


async def test_what_a_full_disk_did_not_take_waits_for_a_coordinator_that_is_away(tmp_path: Path) -> None:
    async with rig(tmp_path, Delivery(failing=5)) as r:
        await r.painted(away=True)
        with trio.fail_after(60):
            await r.delivery.over.wait()
        assert r.delivery.tries == 6
        r.attempts.attach(r.post)
        await r.posts(wire.Complete)
        assert not [body for body in r.posted if isinstance(body, wire.Fail)]


@pytest.mark.parametrize(("away", "at_once"), [(False, False), (True, True), (False, True)])
async def test_one_that_is_there_gets_its_time_and_what_cannot_pass_ends_it(
    tmp_path: Path, away: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once:
        monkeypatch.setattr(subject, "UPLOAD_PATIENCE_S", 60.0)  # what is told at once is not patience that ran out
    async with rig(tmp_path, Delivery(math.inf, at_once)) as r:
        await r.painted(away)
        if away:
            r.attempts.attach(r.post)
        failed = await r.posts(wire.Fail)
        assert isinstance(failed, wire.Fail)
        assert failed.fault.code == "upload_failed"
        assert r.delivery.tries == 1


async def test_what_is_left_is_delivered_by_the_next_life(tmp_path: Path) -> None:
    slow = Delivery(failing=math.inf)  # its patience is without end for what is kept
    async with rig(tmp_path, slow, kept=True) as r:
        await r.painted(away=False)
        assert r.attempts.leave("j", 1)
        with trio.fail_after(60):
            await r.attempts.ledger.wait_empty()
        assert not [body for body in r.posted if isinstance(body, wire.Fail)]
        assert not r.attempts.leave("j", 1)
    async with rig(tmp_path, Delivery(), kept=True) as r:
        r.attempts.attach(r.post)
        await r.posts(wire.Complete)
        assert r.attempts.leave("j", 1), "delivered, and not acknowledged"
        assert len(r.attempts.ledger) == 0
    async with rig(tmp_path, Delivery(), kept=True) as r:
        assert r.attempts.ledger.held(), "it is still there"


async def test_what_is_kept_needs_its_model_no_more_and_is_delivered_without_it(tmp_path: Path) -> None:
    """A hold or a new start of the engine ends what runs. What is done was forgotten with it, and nobody was told."""
    slow = Gated()
    async with rig(tmp_path, slow, kept=True) as r:
        await r.painted(away=False)
        r.attempts.stop_models({"m"}, STOPPING)
        slow.gate.set()
        await r.posts(wire.Complete)
        assert not [body for body in r.posted if isinstance(body, wire.Fail)]


async def test_a_stop_that_comes_while_the_result_is_being_kept_is_told(tmp_path: Path, monkeypatch) -> None:
    """The worker lives on, so to leave it to the next life would be to say nothing."""
    keep = OnDisk.done
    async with rig(tmp_path, Gated(), kept=True) as r:

        async def stopped(*given: Any) -> Parcel:
            parcel = await keep(*given)
            r.attempts.stop_models({"m"}, STOPPING)
            return parcel

        monkeypatch.setattr(OnDisk, "done", stopped)
        await r.painted(away=False)
        failed = await r.posts(wire.Fail)
        assert isinstance(failed, wire.Fail)
        assert failed.fault.code == "worker_stopping"
        assert list((tmp_path / "outbox").iterdir()) == []


async def test_what_is_not_kept_cannot_be_left(tmp_path: Path) -> None:
    async with rig(tmp_path, Delivery()) as r:
        await r.painted(away=False)
        await r.posts(wire.Complete)
        assert not r.attempts.leave("j", 1)
        assert r.attempts.ledger.held()
