"""Orders of a deployment: given to the workers that are here, written down, and given again when an answer is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from coordinator.deploy import deployer
from coordinator.deploy.deployer import MOST_AT_ONCE, MOST_OF_ONE, Deployer
from coordinator.deploy.plan import GRACE_MS
from coordinator.deploy.spec import Asked, model_name
from coordinator.fleet import Fleet, HeldAttempt, Worker
from coordinator.store import SqliteStore
from coordinator.store.threads import StoreThreads
from protocol.faults import refuse
from protocol.link_wire import Body, Capabilities, Fetch, ModelOffer, OrderDone

ASKED = Asked(name="chat", source="https://models.test/chat.gguf", sha256="a" * 64, options={"n_ctx": 512})
MODEL = model_name("chat", ASKED.revision)


class NoPort:
    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("orders go through `give`")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("nobody is thrown out")


class House:
    """A coordinator with workers that obey, refuse or say nothing."""

    def __init__(self, store: SqliteStore) -> None:
        self.store, self.fleet = store, Fleet()
        self.orders: list[tuple[str, str, dict[str, Any]]] = []
        self.refusals: dict[tuple[str, str], str] = {}
        self.silent = anyio.Event()
        self.silence: set[str] = set()
        self.deaf: set[str] = set()
        self.deployer = Deployer(store, StoreThreads(), self.fleet, self.give)

    def worker(self, name: str, *, deploys: bool = True) -> Worker:
        worker = Worker(name, NoPort(), Capabilities(deploys=deploys))
        self.fleet.add(worker)
        return worker

    def announce(self, worker: Worker, *models: str) -> None:
        offers = tuple(ModelOffer(name=model, kinds=("llm",), engine="llm") for model in models)
        self.fleet.announce(worker, msgspec.structs.replace(worker.capabilities, models=offers))

    async def give(self, worker: Worker, verb: str, arguments: dict[str, Any], patience_s: float) -> OrderDone:
        self.orders.append((worker.id, verb, arguments))
        if worker.id in self.deaf:
            raise refuse("unsupported", f"The worker {worker.id} is too old to take orders; update it.")
        if worker.id in self.silence:
            await self.silent.wait()
        if message := self.refusals.get((worker.id, verb)):
            return OrderDone(id="1", ok=False, message=message)
        if verb == "serve":
            self.announce(worker, arguments["name"])
        else:
            self.announce(worker)
        return OrderDone(id="1", ok=True)

    async def deploy(self, asked: Asked) -> None:
        await self.deployer.deploy(asked.name, lambda _known: asked)

    async def ticks(self, count: int = 4) -> None:
        for _ in range(count):
            async with anyio.create_task_group() as tasks:
                await self.deployer.tick(tasks)

    def states(self) -> dict[str, str]:
        return {one.worker: one.state for one in self.store.placements()}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    yield House(store)
    store.close()


async def test_workers_are_ordered_to_serve_and_ready_when_they_announce_it(house: House) -> None:
    house.worker("a")
    house.worker("b", deploys=False)
    await house.deploy(ASKED)
    await house.ticks()
    assert [(worker, verb) for worker, verb, _ in house.orders] == [("a", "serve")]
    assert house.orders[0][2] == {
        "name": MODEL,
        "source": ASKED.source,
        "sha256": ASKED.sha256,
        "file": "",
        "engine": "",
        "options": {"n_ctx": 512},
    }
    assert house.states() == {"a": "ready"}
    assert house.deployer.model_of("chat") == MODEL
    assert house.deployer.name_of(MODEL) == "chat"
    assert house.deployer.name_of("somebody's own") == "somebody's own"


@pytest.mark.parametrize(
    ("fetch", "words"),
    [
        (Fetch(model=MODEL, phase="waiting"), "the worker fetches other models first"),
        (Fetch(model=MODEL, phase="fetching", done_bytes=5, total_bytes=10**6), "the worker has fetched 0.0 of 1.0 MB"),
        (
            Fetch(model=MODEL, phase="fetching", done_bytes=2**63 - 1, total_bytes=4 * 10**9),
            "the worker has fetched 9223372036.9 of 4.0 GB",
        ),
        (
            Fetch(model=MODEL, phase="fetching", done_bytes=10**7),
            "the worker has fetched 10.0 MB, of a size that nobody told",
        ),
        (Fetch(model=MODEL, phase="proving"), "the worker has fetched it, and loads and proves it"),
        (Fetch(model=MODEL, phase="what a later release says"), ""),
        (Fetch(model="another", phase="proving"), ""),
    ],
)
async def test_how_far_a_worker_is_is_written_for_all_replicas(house: House, fetch: Fetch, words: str) -> None:
    worker = house.worker("a")
    house.silence.add("a")
    await house.deploy(ASKED)
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        worker.fetches = (fetch,)
        await house.deployer.tick(tasks)
        [placement] = house.store.placements()
        assert (placement.state, placement.reason) == ("fetching", words)
        house.silent.set()
    await house.ticks()
    [placement] = house.store.placements()
    assert (placement.state, placement.reason) == ("ready", "")


async def test_how_far_a_worker_is_is_not_written_at_every_beat(house: House) -> None:
    def fetched(done: int) -> tuple[Fetch, ...]:
        return (Fetch(model=MODEL, phase="fetching", done_bytes=done * 10**6, total_bytes=10**9),)

    worker = house.worker("a")
    house.silence.add("a")
    await house.deploy(ASKED)
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        for done in (1, 400):
            worker.fetches = fetched(done)
            await house.deployer.tick(tasks)
        assert "0.0 of 1.0 GB" in house.store.placements()[0].reason
        house.store.shift_clock(60_000)
        worker.fetches = fetched(500)
        await house.deployer.tick(tasks)
        assert "0.5 of 1.0 GB" in house.store.placements()[0].reason
        house.silent.set()


async def test_a_refusal_is_kept_and_tried_again_after_a_pause(house: House) -> None:
    house.worker("a")
    house.refusals["a", "serve"] = "No room on the disk."
    await house.deploy(ASKED)
    await house.ticks()
    [placement] = house.store.placements()
    assert (placement.state, placement.reason, placement.failures) == ("failed", "No room on the disk.", 1)
    assert len(house.orders) == 1
    house.store.shift_clock(20_000)
    house.refusals.clear()
    await house.ticks()
    assert house.states() == {"a": "ready"}
    assert house.store.placements()[0].failures == 0


async def test_what_a_worker_says_can_be_kept_by_any_database(house: House) -> None:
    house.worker("a")
    house.refusals["a", "serve"] = "No\0 room."
    await house.deploy(ASKED)
    await house.ticks()
    assert [one.reason for one in house.store.placements()] == ["No room."]


async def test_an_answer_that_is_lost_with_the_session_is_asked_for_again(house: House) -> None:
    first = house.worker("a")
    house.silence.add("a")
    await house.deploy(ASKED)
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        house.fleet.remove(first)
        house.silence.clear()
        house.worker("a")
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
    await house.ticks()
    assert [verb for _, verb, _ in house.orders] == ["serve", "serve"]
    assert house.states() == {"a": "ready"}


async def test_a_model_that_is_served_no_more_is_ordered_again(house: House) -> None:
    worker = house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.announce(worker)
    await house.ticks()
    assert [verb for _, verb, _ in house.orders] == ["serve", "serve"]
    assert house.states() == {"a": "ready"}
    assert house.store.placements()[0].failures == 0


async def test_what_is_given_up_is_let_go_when_its_jobs_are_done(house: House) -> None:
    worker = house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    held = HeldAttempt("job_1", 1, "llm", MODEL, "running")
    worker.attempts[held.key] = held
    await house.deployer.undeploy("chat")
    await house.ticks()
    assert [verb for _, verb, _ in house.orders] == ["serve"]
    del worker.attempts[held.key]
    await house.ticks()
    assert [verb for _, verb, _ in house.orders] == ["serve", "unserve"]
    assert house.store.deployments() == []
    assert house.deployer.model_of("chat") == "chat"


async def test_what_is_given_up_while_it_is_fetched_is_called_off_at_once(house: House) -> None:
    house.worker("a")
    house.silence.add("a")
    await house.deploy(ASKED)
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            await house.deployer.tick(tasks)
        await house.deployer.undeploy("chat")
        house.silence.clear()
        with anyio.fail_after(60):
            while house.store.placements():
                await house.deployer.tick(tasks)
        assert [verb for _, verb, _ in house.orders] == ["serve", "unserve"]
        tasks.cancel_scope.cancel()


async def test_an_order_that_is_answered_amid_a_look_is_not_given_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look has read that it is to leave; then the worker answers, and the row goes."""
    house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.silence.add("a")
    await house.deployer.undeploy("chat")
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(60):
            while not [verb for _, verb, _ in house.orders if verb == "unserve"]:
                await house.deployer.tick(tasks)
        write = house.deployer._threads.write

        async def amid(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            if (
                function == house.store.redirect and not house.silent.is_set()
            ):  # between what was read and what is ordered
                house.deployer._bell = anyio.Event()
                house.silent.set()
                with anyio.fail_after(60):
                    await house.deployer._bell.wait()  # rung when an order is answered
            return await write(function, *arguments, **named)

        monkeypatch.setattr(house.deployer._threads, "write", amid)
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
    assert [verb for _, verb, _ in house.orders] == ["serve", "unserve"]


async def test_who_was_away_when_it_was_given_up_is_asked_when_it_comes_back(house: House) -> None:
    worker = house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.fleet.remove(worker)
    await house.deployer.undeploy("chat")
    await house.ticks()
    house.store.shift_clock(GRACE_MS)
    await house.ticks()
    assert house.store.deployments() == []
    house.deployer = Deployer(house.store, StoreThreads(), house.fleet, house.give)  # the coordinator began anew
    worker = house.worker("a")
    house.announce(worker, MODEL, "chat@home", model_name("theirs", "0123456789"))
    assert house.deployer.name_of(MODEL) == MODEL, "nobody has looked yet"
    await house.ticks(1)
    assert house.deployer.name_of(MODEL) is None, "it is nothing to clients"
    await house.ticks()
    assert [(verb, said["name"]) for _, verb, said in house.orders] == [("serve", MODEL), ("unserve", MODEL)]
    assert house.store.placements("a") == []


async def test_who_comes_back_after_another_took_its_place_is_asked_to_let_go(house: House) -> None:
    worker = house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.fleet.remove(worker)
    await house.ticks(1)
    house.store.shift_clock(GRACE_MS)
    house.worker("b")
    await house.ticks()
    house.announce(house.worker("a"), MODEL)
    await house.ticks()
    assert [(worker, verb) for worker, verb, _ in house.orders] == [("a", "serve"), ("b", "serve"), ("a", "unserve")]
    assert house.states() == {"b": "ready"}


async def test_a_worker_that_does_not_let_go_is_not_asked_for_ever(house: House) -> None:
    house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.refusals["a", "unserve"] = "Its owner keeps it."
    await house.deployer.undeploy("chat")
    await house.ticks()
    assert house.store.placements() == []


async def test_a_worker_that_takes_no_orders_any_more_is_not_asked_without_a_pause(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployer, "AGAIN_S", 600.0)  # longer than a slow machine needs
    house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    house.deaf.add("a")  # it came back in an older version
    await house.deployer.undeploy("chat")
    await house.ticks(6)
    assert [verb for _, verb, _ in house.orders] == ["serve", "unserve"]
    assert house.states() == {"a": "leaving"}


async def test_another_revision_comes_beside_the_old_one_and_takes_its_name(house: House) -> None:
    worker = house.worker("a")
    await house.deploy(ASKED)
    await house.ticks()
    newer = msgspec.structs.replace(ASKED, sha256="b" * 64)
    house.silence.add("a")
    await house.deploy(newer)
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
        assert house.deployer.model_of("chat") == MODEL
        house.announce(worker, MODEL, model_name("chat", newer.revision))
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
        assert house.deployer.model_of("chat") == model_name("chat", newer.revision)
        assert house.deployer.name_of(MODEL) is None
        tasks.cancel_scope.cancel()


async def test_an_owners_model_of_that_name_answers_before_and_after_the_deployment(
    house: House,
) -> None:
    own = house.worker("owner", deploys=False)
    house.announce(own, "chat")
    worker = house.worker("a")
    house.silence.add("a")
    await house.deploy(ASKED)
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
        assert house.deployer.model_of("chat") == "chat"
        assert house.deployer.name_of("chat") == "chat"
        house.silent.set()
    await house.ticks()
    assert house.deployer.model_of("chat") == MODEL
    assert house.deployer.name_of("chat") is None, "listed once"
    assert house.deployer.name_of(MODEL) == "chat"
    held = HeldAttempt("job_1", 1, "llm", MODEL, "running")
    worker.attempts[held.key] = held  # it may not go yet
    await house.deployer.undeploy("chat")
    await house.ticks()
    assert house.deployer.model_of("chat") == "chat"
    assert house.deployer.name_of("chat") == "chat"


async def test_orders_that_one_worker_does_not_answer_keep_no_other_waiting(house: House) -> None:
    house.worker("a")
    house.silence.add("a")
    for n in range(MOST_AT_ONCE + 1):
        await house.deploy(msgspec.structs.replace(ASKED, name=f"m{n}", on={"worker": "a"}))
    async with anyio.create_task_group() as tasks:
        await house.deployer.tick(tasks)
        await house.deployer.tick(tasks)
        assert 0 < len(house.orders) <= MOST_OF_ONE
        house.worker("b")
        await house.deploy(msgspec.structs.replace(ASKED, name="wanted", on={"worker": "b"}))
        for _ in range(3):
            await house.deployer.tick(tasks)
            await anyio.wait_all_tasks_blocked()
        assert house.states()["b"] in ("fetching", "ready")
        assert [worker for worker, _, _ in house.orders].count("b") == 1
        tasks.cancel_scope.cancel()


async def test_a_worker_whose_row_was_lost_or_taken_over_is_written_down_again(house: House) -> None:
    """By a database that failed over, or by the replica from which the worker came."""
    house.worker("a")
    await house.ticks()
    house.store.lost("a")
    await house.ticks(1)
    assert house.store.candidates()["a"].connected
    await house.deploy(ASKED)
    await house.ticks()
    assert house.states() == {"a": "ready"}


async def test_trouble_with_the_store_ends_nothing_and_fills_no_log(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house.worker("a")
    await house.deploy(ASKED)
    broken = iter([True, True])
    real: Callable[..., Any] = house.store.standing

    def standing(plan: Any) -> Any:
        if next(broken, False):
            raise refuse("storage_full", "The disk is full.")
        return real(plan)

    monkeypatch.setattr(house.store, "standing", standing)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.deployer.run)
        with anyio.fail_after(20):
            while house.states() != {"a": "ready"}:
                house.deployer.ring()
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    lines = [
        (one.getMessage(), bool(one.exc_info))
        for one in caplog.records
        if one.name == deployer.log.name and one.levelname == "ERROR"
    ]
    assert lines == [("The deployments wait for the store: The disk is full.", False)] * 2
