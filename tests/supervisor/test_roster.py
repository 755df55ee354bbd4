"""Models that come and go in a running supervisor, under a virtual clock: host, scheduler and ledger are real code,
engines and proofs are played."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from protocol import engine_wire as wire
from protocol import link_wire
from protocol.faults import Fault
from supervisor.box import Box
from supervisor.config import build_models
from supervisor.host.fake import FakeChild, FakeEngines, fake_means, greet_and_load
from supervisor.host.host import Host, open_host
from supervisor.host.work import Done, ModelSpec, RunEnd, RunRequest
from supervisor.link.ledger import Claim, Ledger
from supervisor.link.register import Proof
from supervisor.observe.jobwatch import Watches
from supervisor.roster import Around, Origin, Roster
from supervisor.served import Served
from supervisor.settings import LimitsTable, ModelTable, Settings

LIMITS = LimitsTable(first_output_s=1000, stall_s=1000, cancel_grace_s=1, term_grace_s=1, job_s=5000)
HERE = ModelTable(name="synthetic-here", engine="synthetic")
NEW = ModelTable(name="synthetic-new", engine="synthetic")
OTHER = msgspec.structs.replace(NEW, vram_gb=2.0)


class FreeBox:
    """A machine that serves everything."""

    def barred(self, _spec: ModelSpec) -> str:
        return ""

    def cordons(self, _spec: ModelSpec) -> dict[str, Any]:
        return {}


class Proofs:
    """Proofs that take `takes_s` and end as `problems` say, the first first; then they pass."""

    def __init__(self) -> None:
        self.takes_s, self.problems = 5.0, list[str]()
        self.begun: list[str] = []
        self.cut = 0
        self.tell: Callable[[ModelSpec, Proof], None]

    async def once(self, spec: ModelSpec) -> Proof:
        self.begun.append(spec.name)
        problem = self.problems.pop(0) if self.problems else ""
        try:
            await trio.sleep(self.takes_s)
        except trio.Cancelled:
            self.cut += 1
            raise
        return Proof(ok=not problem, reason=problem, revision="r")

    async def prove(self, spec: ModelSpec) -> None:
        while True:
            proof = await self.once(spec)
            self.tell(spec, proof)
            if proof.ok:
                return
            await trio.sleep(30)


class World:
    """A roster with a host, and jobs as `Attempts` would have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(models=[HERE], limits=LIMITS)
        self.proofs = Proofs()
        self.served = Served(build_models(self.settings), cast("Box", FreeBox()))
        self.roster = Roster(lambda: self.settings, self.served, self.proofs)
        self.proofs.tell = self.roster.proved
        self.ledger, self.scopes = Ledger(), dict[Claim, trio.CancelScope]()
        self.ends: dict[str, RunEnd | Fault] = {}
        self.joined: list[str] = []
        self.kept: list[set[Path]] = []
        self.stopping = ""
        self.announced: list[tuple[str, ...]] = []
        self.pids: list[int] = []
        self.host: Host
        self.nursery: trio.Nursery

    async def play(self, child: FakeChild) -> None:
        self.pids.append(child.pid)
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
                await trio.sleep(float(msgspec.msgpack.decode(message.params)))
                child.send(wire.Result(run=message.run, body=message.params))

    def changed(self) -> None:
        now = tuple(offer.name for offer in self.served.offers())
        if not self.announced or self.announced[-1] != now:
            self.announced.append(now)

    def stop_models(self, models: Collection[str], fault: Fault) -> None:
        for claim in self.ledger:
            if claim.offer.model in models and claim.end is None:
                self.ends[claim.job] = fault
                self.scopes[claim].cancel()

    async def job(self, name: str, model: str, seconds: float) -> None:
        """What `Attempts` does with a claim."""
        offer = link_wire.Offer(kind="llm", model=model, params=msgspec.Raw(b""))
        watch = Watches().begin(job=name, attempt=1, kind="llm", model=model, traceparent="")
        claim = Claim(name, 1, offer, None, watch)
        self.ledger.record(claim)
        request = RunRequest(
            model=model, kind="llm", params=msgspec.msgpack.encode(str(seconds)), folder=Path("/nowhere")
        )
        with trio.CancelScope() as self.scopes[claim]:
            self.ends[name] = await self.host.run(request, lambda _event: None)
        self.ledger.forget(claim)

    async def begin(self, name: str, model: str, seconds: float) -> None:
        self.nursery.start_soon(self.job, name, model, seconds)
        await trio.testing.wait_all_tasks_blocked()

    def offered(self) -> list[str]:
        return [offer.name for offer in self.served.offers()]


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder)
    around = Around(
        joined=lambda spec: made.joined.append(spec.name),
        changed=made.changed,
        keep_files=made.kept.append,
        stopping=lambda: made.stopping,
    )
    means = fake_means(FakeEngines(made.play))
    async with (
        open_host(build_models(made.settings), LIMITS, folder / "s", means=means) as made.host,
        trio.open_nursery() as made.nursery,
    ):
        made.served.instances = made.host.snapshot
        await made.nursery.start(made.roster.run, made.host, made, around)
        yield made
        made.nursery.cancel_scope.cancel()


@pytest.fixture
async def it(tmp_path, autojump_clock):
    async with world(tmp_path) as made:
        await trio.sleep(10)
        assert made.offered() == [HERE.name]
        yield made


async def test_a_model_is_announced_when_it_was_proved_and_serves(it, autojump_clock):
    async with trio.open_nursery() as nursery:
        answers: list[Fault | None] = []

        async def ask() -> None:
            answers.append(await it.roster.take_on(NEW))

        nursery.start_soon(ask)
        await trio.sleep(1)
        assert it.offered() == [HERE.name]
        assert it.served.why_not(NEW.name) == "it is still being checked"
        assert [one.model for one in it.host.snapshot()] == [HERE.name, NEW.name]
    assert answers == [None]
    assert it.announced[-1] == (HERE.name, NEW.name)
    assert (it.joined, it.roster.origin(NEW.name)) == ([NEW.name], Origin.ORDER)
    await it.job("a", NEW.name, 1)
    assert isinstance(it.ends["a"], Done)
    assert await it.roster.take_on(NEW) is None, "twice the same is one"
    assert it.proofs.begun.count(NEW.name) == 1


async def test_pins_are_loaded_once_they_are_proved(it, autojump_clock):
    assert await it.roster.take_on(msgspec.structs.replace(NEW, pin=True)) is None
    await trio.sleep(2)
    assert {one.model: one.state for one in it.host.snapshot()}[NEW.name] == "ready"


async def test_two_who_want_the_same_at_once_share_one_proof_and_others_are_refused(it, autojump_clock):
    answers: list[Fault | None] = []

    async def ask(table: ModelTable) -> None:
        answers.append(await it.roster.take_on(table))

    async with trio.open_nursery() as nursery:
        for table in (NEW, NEW, OTHER):
            nursery.start_soon(ask, table)
            await trio.testing.wait_all_tasks_blocked()
    assert [fault and fault.code for fault in answers] == ["conflict", None, None]
    assert it.proofs.begun.count(NEW.name) == 1


async def test_what_does_not_pass_its_proof_has_gone_and_may_come_again(it, autojump_clock):
    it.proofs.problems = ["the GPU is gone"]
    fault = await it.roster.take_on(NEW)
    assert fault is not None
    assert (fault.code, fault.may_retry) == ("load_failed", False)
    assert "the GPU is gone" in fault.message
    assert [one.model for one in it.host.snapshot()] == [HERE.name]
    assert set(it.announced) == {(HERE.name,)}, "it was never announced"
    assert it.kept == [set()]
    assert await it.roster.take_on(NEW) is None


async def test_what_cannot_be_served_is_refused_before_anything_begins(it, autojump_clock):
    for table, words in (
        (ModelTable(name="x", engine="nothing"), 'no engine "nothing"'),
        (ModelTable(name="x", engine="llm"), "needs the file"),
        (ModelTable(name="x", engine="synthetic"), "must be named synthetic"),
    ):
        fault = await it.roster.take_on(table)
        assert fault is not None
        assert (fault.code, words in fault.message) == ("invalid_request", True), fault.message
    assert len(it.host.snapshot()) == 1
    it.stopping = "SIGTERM was received"
    fault = await it.roster.take_on(NEW)
    assert fault is not None
    assert (fault.code, fault.may_retry) == ("worker_stopping", True)


async def test_who_gives_up_takes_the_model_back_unless_somebody_else_waits(it, autojump_clock):
    with trio.move_on_after(2):
        await it.roster.take_on(NEW)
    await trio.sleep(1)
    assert [one.model for one in it.host.snapshot()] == [HERE.name]
    assert it.proofs.cut == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.roster.take_on, NEW)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(2):
            await it.roster.take_on(NEW)
    assert NEW.name in it.offered()


async def test_a_model_that_is_let_go_finishes_what_was_accepted_and_is_announced_no_more_at_once(it, autojump_clock):
    await it.roster.take_on(NEW)
    await it.begin("a", NEW.name, 20)
    await it.begin("b", NEW.name, 5)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(it.roster.let_go, NEW.name, "its owner says so")
        await trio.testing.wait_all_tasks_blocked()
        assert it.announced[-1] == (HERE.name,)
        assert it.served.why_not(NEW.name) == "it is let go: its owner says so"
        assert (it.roster.origin(NEW.name), it.roster.leaving(NEW.name)) == (Origin.ORDER, "its owner says so")
    assert 24 < trio.current_time() - began < 40
    assert isinstance(it.ends["a"], Done)
    assert isinstance(it.ends["b"], Done)
    assert NEW.name not in it.served.states()
    assert it.kept == [set()]
    fault = await it.roster.let_go(NEW.name, "again")
    assert fault is not None
    assert fault.code == "model_not_found"


async def test_a_deadline_ends_what_runs_and_a_second_word_may_hurry(it, autojump_clock):
    await it.roster.take_on(NEW)
    await it.begin("a", NEW.name, 500)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.roster.let_go, NEW.name, "its owner says so")
        await trio.sleep(20)
        assert await it.roster.let_go(NEW.name, "at once", within_s=3) is None
    assert 20 < trio.current_time() - began < 35
    fault = it.ends["a"]
    assert isinstance(fault, Fault)
    assert (fault.code, fault.may_retry) == ("worker_stopping", True)


async def test_a_model_that_is_let_go_during_its_proof_goes_at_once_and_who_waits_is_told(it, autojump_clock):
    answers: list[Fault | None] = []

    async def ask() -> None:
        answers.append(await it.roster.take_on(NEW))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        assert await it.roster.let_go(NEW.name, "it was a mistake") is None
    (fault,) = answers
    assert fault is not None
    assert (fault.code, fault.message) == (
        "worker_stopping",
        "The model synthetic-new is let go: it was a mistake.",
    )
    assert it.proofs.cut == 1
    assert len(it.host.snapshot()) == 1


async def test_who_wants_a_model_that_leaves_waits_for_its_end(it, autojump_clock):
    await it.roster.take_on(NEW)
    await it.begin("a", NEW.name, 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.roster.let_go, NEW.name, "its owner says so")
        await trio.testing.wait_all_tasks_blocked()
        assert await it.roster.take_on(OTHER) is None
    assert isinstance(it.ends["a"], Done)
    assert [spec.vram_bytes for spec in it.roster.specs] == [0, 2 * 2**30]
    await it.job("b", NEW.name, 1)
    assert isinstance(it.ends["b"], Done)


async def test_the_end_of_the_supervisor_answers_everybody(tmp_path, autojump_clock):
    answers: dict[str, Fault | None] = {}

    async def ask(name: str, call: Callable[[], Any]) -> None:
        answers[name] = await call()

    async with trio.open_nursery() as around:
        async with world(tmp_path) as it:
            await trio.sleep(10)
            await it.begin("a", HERE.name, 500)
            around.start_soon(ask, "on", lambda: it.roster.take_on(NEW))
            around.start_soon(ask, "go", lambda: it.roster.let_go(HERE.name, "its owner says so"))
            await trio.testing.wait_all_tasks_blocked()
            around.start_soon(ask, "back", lambda: it.roster.take_on(HERE))
            await trio.testing.wait_all_tasks_blocked()
    for name in ("on", "back"):
        fault = answers[name]
        assert fault is not None
        assert fault.code == "worker_stopping"
    assert answers["go"] is None


# ---- worker.toml


def write(it: World, *tables: ModelTable) -> None:
    it.settings = msgspec.structs.replace(it.settings, models=list(tables))
    it.roster.follow(it.settings)


async def test_worker_toml_adds_removes_and_changes_models(it, autojump_clock):
    write(it, NEW, HERE)
    assert [spec.name for spec in it.roster.specs] == [NEW.name, HERE.name]
    await trio.sleep(10)
    assert it.offered() == [NEW.name, HERE.name]
    await it.begin("a", HERE.name, 20)
    await it.begin("b", NEW.name, 20)
    write(it, OTHER)
    assert it.offered() == []
    write(it, msgspec.structs.replace(NEW, vram_gb=3.0))
    await trio.sleep(1)
    assert it.served.why_not(NEW.name) == "it is let go: its settings have changed"
    await trio.sleep(40)
    assert isinstance(it.ends["a"], Done)
    assert isinstance(it.ends["b"], Done)
    assert [(spec.name, spec.vram_bytes) for spec in it.roster.specs] == [(NEW.name, 3 * 2**30)]
    assert it.offered() == [NEW.name]


async def test_a_change_that_is_taken_back_before_the_model_has_left_still_loads_it_anew(it, autojump_clock):
    await it.begin("a", HERE.name, 20)
    write(it)
    write(it, HERE)
    await trio.sleep(40)
    assert it.offered() == [HERE.name]
    assert it.proofs.begun.count(HERE.name) == 2
    await it.begin("a", HERE.name, 20)
    write(it, msgspec.structs.replace(HERE, vram_gb=1.0))
    write(it)
    await trio.sleep(40)
    assert it.offered() == []


async def test_what_the_host_changes_by_itself_leaves_the_model_where_it_is(it, autojump_clock):
    await it.job("a", HERE.name, 1)
    write(it, msgspec.structs.replace(HERE, stall_s=7.0, keep_alive_s=9.0, preload=True))
    await trio.sleep(20)
    assert it.offered() == [HERE.name]
    assert (it.proofs.begun, len(it.pids)) == ([HERE.name], 1)


async def test_what_worker_toml_names_is_proved_until_it_passes(it, autojump_clock):
    it.proofs.problems = ["no", "not yet"]
    write(it, HERE, NEW)
    await trio.sleep(8)
    assert it.served.why_not(NEW.name) == "no"
    fault = await it.roster.take_on(NEW)
    assert fault is not None
    assert fault.code == "load_failed"
    await trio.sleep(100)
    assert NEW.name in it.offered()
    assert await it.roster.take_on(NEW) is None


async def test_a_model_that_somebody_asked_for_stays_when_worker_toml_changes_and_may_become_its_own(
    it, autojump_clock
):
    await it.roster.take_on(NEW)
    write(it, HERE)
    assert NEW.name in it.offered()
    write(it, HERE, NEW)
    assert it.roster.origin(NEW.name) is Origin.CONFIG
    write(it, HERE)
    await trio.sleep(5)
    assert it.offered() == [HERE.name]


async def test_a_model_of_worker_toml_that_was_let_go_stays_away_until_its_table_changes(it, autojump_clock):
    assert await it.roster.let_go(HERE.name, "the coordinator says so") is None
    write(it, HERE, NEW)
    await trio.sleep(10)
    assert it.offered() == [NEW.name]
    assert await it.roster.take_on(HERE) is None
    assert it.offered() == [HERE.name, NEW.name] or it.offered() == [NEW.name, HERE.name]
    assert await it.roster.let_go(HERE.name, "the coordinator says so") is None
    write(it, msgspec.structs.replace(HERE, vram_gb=1.0), NEW)
    await trio.sleep(10)
    assert HERE.name in it.offered()


async def test_a_proof_that_fails_after_worker_toml_took_the_model_over_is_tried_again(it, autojump_clock):
    it.proofs.problems = ["no"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.roster.take_on, NEW)
        await trio.sleep(1)
        write(it, HERE, NEW)
        await trio.sleep(8)
        assert it.served.why_not(NEW.name) == "no"
        await trio.sleep(60)
    assert it.roster.origin(NEW.name) is Origin.CONFIG
    assert it.offered() == [HERE.name, NEW.name]


async def test_a_change_that_is_taken_back_after_the_model_was_let_go_leaves_it_away(it, autojump_clock):
    await it.begin("a", HERE.name, 20)
    it.nursery.start_soon(it.roster.let_go, HERE.name, "the coordinator says so")
    await trio.sleep(1)
    write(it, msgspec.structs.replace(HERE, vram_gb=1.0))
    write(it, HERE)
    await trio.sleep(60)
    assert it.offered() == []
    assert list(it.roster.specs) == []


async def test_what_was_to_come_instead_is_let_go_as_well(it, autojump_clock):
    changed = msgspec.structs.replace(HERE, vram_gb=1.0)
    await it.begin("a", HERE.name, 20)
    write(it, changed)
    assert await it.roster.let_go(HERE.name, "the coordinator says so") is None
    write(it, changed, NEW)  # names it still, as it did when somebody let it go
    await trio.sleep(30)
    assert it.offered() == [NEW.name]
    write(it, HERE, NEW)
    await trio.sleep(30)
    assert it.offered() == [HERE.name, NEW.name]


async def test_a_hundred_edits_while_jobs_run_end_where_the_last_one_says(it, autojump_clock):
    await it.begin("a", HERE.name, 200)
    for number in range(100):
        tables = [HERE, NEW] if number % 3 else [NEW]
        write(it, *(msgspec.structs.replace(table, vram_gb=1.0 + number % 7) for table in tables))
        await trio.sleep(0.5 if number % 5 else 7)
    last = msgspec.structs.replace(HERE, vram_gb=2.5)
    write(it, last)
    await trio.sleep(300)
    assert isinstance(it.ends["a"], Done)
    assert [(spec.name, spec.vram_bytes) for spec in it.roster.specs] == [(HERE.name, int(2.5 * 2**30))]
    assert it.offered() == [HERE.name]
    await it.job("b", HERE.name, 1)
    assert isinstance(it.ends["b"], Done)
