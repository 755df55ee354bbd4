"""Three coordinators over one database, each of which plans and orders: together they give each order once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import anyio
import msgspec
import pytest

from coordinator.deploy.deployer import Deployer
from coordinator.deploy.spec import Asked, model_name
from coordinator.fleet import Fleet, Worker
from coordinator.store import StoreError
from coordinator.store.threads import StoreThreads
from protocol.link_wire import Body, Capabilities, ModelOffer, OrderDone

pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

import psycopg

from coordinator.store.postgres import PostgresStore

NAMES = ("chat", "hear", "paint", "speak")
REPLICAS = 5
BOXES = 9
MOST_ROUNDS = 60
STANDS_STILL_MS = 600_000  # a machine that stands still is no replica that is gone


class NoPort:
    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("orders go through `give`")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("nobody is thrown out")


class Replica:
    """One coordinator; its workers obey unless they are in `silent`."""

    def __init__(self, url: str, orders: Counter[tuple[str, str, str]], silent: set[str]) -> None:
        self.store, self.fleet = PostgresStore(url, silent_ms=STANDS_STILL_MS), Fleet()
        self._orders, self._silent, self._spoken = orders, silent, anyio.Event()
        self.deployer = Deployer(self.store, StoreThreads(), self.fleet, self._give)

    def takes(self, box: str, *models: str) -> Worker:
        worker = Worker(box, NoPort(), Capabilities(deploys=True))
        self.fleet.add(worker)
        self._announce(worker, set(models))
        return worker

    def _announce(self, worker: Worker, models: set[str]) -> None:
        offers = tuple(ModelOffer(name=model, kinds=("llm",), engine="llm") for model in sorted(models))
        self.fleet.announce(worker, msgspec.structs.replace(worker.capabilities, models=offers))

    async def _give(self, worker: Worker, verb: str, arguments: dict[str, Any], patience_s: float) -> OrderDone:
        self._orders[worker.id, verb, arguments["name"]] += 1
        if worker.id in self._silent:
            await self._spoken.wait()
        has = {offer.name for offer in worker.capabilities.models}
        self._announce(worker, has | {arguments["name"]} if verb == "serve" else has - {arguments["name"]})
        return OrderDone(id="1", ok=True)


class House:
    def __init__(self, url: str) -> None:
        self.orders, self.silent = Counter[tuple[str, str, str]](), set[str]()
        self.replicas = [Replica(url, self.orders, self.silent) for _ in range(3)]
        self.store = self.replicas[0].store

    async def deploy(self, name: str, replicas: int) -> None:
        asked = Asked(name=name, source="https://models.test/a.gguf", sha256="a" * 64, replicas=replicas)
        while True:
            try:
                await self.replicas[0].deployer.deploy(name, lambda _known: asked)
            except StoreError:  # of a connection that broke: whoever asked asks again
                continue
            return

    async def rounds(self, count: int = 1) -> None:
        """All look at the same time."""
        for _ in range(count):
            async with anyio.create_task_group() as looking:
                for replica in self.replicas:
                    looking.start_soon(self._look, replica)

    async def _look(self, replica: Replica) -> None:
        try:
            replica.store.beat()
            async with anyio.create_task_group() as tasks:
                await replica.deployer.tick(tasks)
        except* StoreError:  # as `Deployer.run` does: the next look is another try
            pass

    async def until_ready(self, total: int) -> None:
        for _ in range(MOST_ROUNDS):
            if Counter(one.state for one in self.store.placements()) == Counter(ready=total):
                return
            await self.rounds()
        raise AssertionError(f"{self.store.placements()} never were {total} that are ready")


@pytest.fixture
def house(space: str) -> Iterator[House]:
    house = House(space)
    yield house
    for replica in house.replicas:
        replica.store.close()


async def test_each_order_is_given_once_whoever_looks(house: House) -> None:
    for box in range(BOXES):
        house.replicas[box % 3].takes(f"box-{box}")
    for name in NAMES:
        await house.deploy(name, REPLICAS)
    await house.until_ready(len(NAMES) * REPLICAS)
    await house.rounds(2)
    assert len(house.orders) == len(NAMES) * REPLICAS
    assert set(house.orders.values()) == {1}


async def test_who_comes_to_another_replica_is_ordered_by_that_one(house: House) -> None:
    """In the middle of a download; and once it is served, it stays so wherever the worker goes."""
    first, second, third = house.replicas
    worker = first.takes("box")
    house.silent.add("box")
    await house.deploy("chat", 1)
    model = model_name("chat", house.store.deployments()[0].asked.revision)
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            await first.deployer.tick(tasks)
            await anyio.wait_all_tasks_blocked()
        assert house.orders == {("box", "serve", model): 1}
        first.fleet.remove(worker)
        await first.deployer.tick(tasks)  # the order is nobody's any more
    house.silent.clear()
    worker = second.takes("box")
    await house.until_ready(1)
    assert house.orders == {("box", "serve", model): 2}
    second.fleet.remove(worker)
    third.takes("box", model)
    await house.rounds(3)
    await house.until_ready(1)
    assert house.orders == {("box", "serve", model): 2}
    assert house.store.candidates()["box"].connected


async def test_a_replica_that_lets_go_of_a_worker_late_takes_it_from_nobody(house: House) -> None:
    first, second, _ = house.replicas
    old = first.takes("box")
    await house.rounds()
    second.takes("box")
    await house.rounds(2)
    first.fleet.remove(old)
    await house.rounds(2)
    assert house.store.candidates()["box"].connected
    assert second.store.present() == {"box"}
    await house.deploy("chat", 1)
    await house.until_ready(1)
    assert list(house.orders.values()) == [1]


async def test_connections_that_break_amid_the_looks_lose_nothing(house: House, space: str) -> None:
    for box in range(BOXES):
        house.replicas[box % 3].takes(f"box-{box}")
    with psycopg.connect(space, autocommit=True) as killer:
        for name in NAMES:
            await house.deploy(name, REPLICAS)
            killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await house.rounds()
    await house.until_ready(len(NAMES) * REPLICAS)
    assert {box for box, _, _ in house.orders} == {f"box-{box}" for box in range(BOXES)}
