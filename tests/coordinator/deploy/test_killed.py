"""A coordinator that is killed, or whose database fails, between any two steps of a deployment.

What was asked for comes about all the same, and what answers clients is not let go before its successor is ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from coordinator.deploy.deployer import Deployer
from coordinator.deploy.spec import Asked, Deployment, model_name
from coordinator.fleet import Fleet, Worker
from coordinator.store import SqliteStore, StoreError
from coordinator.store.threads import StoreThreads
from protocol.link_wire import Body, Capabilities, ModelOffer, OrderDone

OLD = Asked(name="chat", source="https://models.test/chat.gguf", sha256="a" * 64)
NEW = msgspec.structs.replace(OLD, sha256="b" * 64)
MOST_TICKS = 40
MANY = 20  # steps, at least, of a course


class KilledError(Exception):
    """The coordinator's process is no more."""


class NoPort:
    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("orders go through `give`")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("nobody is thrown out")


class Struck:
    """Counts the steps of coordinators, and raises at one of them."""

    def __init__(self, mark: int, blow: Exception) -> None:
        self._mark, self._blow = mark, blow
        self.steps, self.on = 0, False

    def step(self) -> None:
        self.steps += self.on
        if self.on and self.steps == self._mark:
            raise self._blow

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False


class FragileStore(SqliteStore):
    """One of which every transaction may be struck before it begins, and when it is committed."""

    def __init__(self, path: Path, struck: Struck) -> None:
        self._struck = struck
        super().__init__(path)

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[int]:
        self._struck.step()
        with super()._transaction(synced=synced) as now:
            yield now
        self._struck.step()


class World:
    """A store and a worker, which outlive their coordinators."""

    def __init__(self, store: SqliteStore, struck: Struck) -> None:
        self._store, self.struck = store, struck
        self.models: set[str] = set()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Another coordinator, to which the worker comes."""
        fleet = Fleet()
        self._deployer = Deployer(self._store, StoreThreads(), fleet, self._give)
        self._store.all_lost()
        self._fleet, self._worker = fleet, Worker("box", NoPort(), Capabilities(deploys=True))
        fleet.add(self._worker)
        self._announce()

    def _announce(self) -> None:
        offers = tuple(ModelOffer(name=model, kinds=("llm",), engine="llm") for model in sorted(self.models))
        self._fleet.announce(self._worker, Capabilities(deploys=True, models=offers))

    async def _give(self, worker: Worker, verb: str, arguments: dict[str, Any], patience_s: float) -> OrderDone:
        self.struck.step()
        model = arguments["name"]
        if verb == "serve":
            self.models.add(model)
        else:
            for one in self._store.deployments():
                assert one.leaving or model != model_name("chat", one.current), "it answers clients"
            self.models.discard(model)
        self.struck.step()  # it is done there, and nobody here has heard
        self._announce()
        return OrderDone(id="1", ok=True)

    async def asks(self, ask: Callable[[Deployer], Any]) -> None:
        """An admin asks until he is told that it was done."""
        while True:
            try:
                with self.struck.counting():
                    await ask(self._deployer)
            except KilledError:
                self.begin_anew()
            except StoreError:
                continue
            else:
                return

    async def until(self, done: Callable[[], bool]) -> None:
        for _ in range(MOST_TICKS):
            if done():
                return
            self._store.shift_clock(20_000)  # longer than the first pause of what failed
            try:
                with self.struck.counting():
                    async with anyio.create_task_group() as tasks:
                        await self._deployer.tick(tasks)
            except* KilledError:
                self.begin_anew()
            except* StoreError:
                pass
        raise AssertionError(f"it never came: {self._store.deployments()} {self._store.placements()} {self.models}")

    def serves(self, asked: Asked) -> bool:
        deployments, placements = self._store.deployments(), self._store.placements()
        return (
            [one.current for one in deployments] == [asked.revision]
            and [(one.revision, one.state) for one in placements] == [(asked.revision, "ready")]
            and self.models == {model_name("chat", asked.revision)}
        )

    def has_nothing(self) -> bool:
        return not (self._store.deployments() or self._store.placements() or self.models)


def _deploy(asked: Asked, deployer: Deployer) -> Awaitable[Deployment]:
    return deployer.deploy("chat", lambda _known: asked)


async def course(path: Path, mark: int, blow: Exception) -> int:
    """A deployment from its first order to its last, struck at one step; how many steps it took."""
    struck = Struck(mark, blow)
    store = FragileStore(path, struck)
    try:
        world = World(store, struck)
        for asked in (OLD, NEW):
            await world.asks(partial(_deploy, asked))
            await world.until(partial(world.serves, asked))
        await world.asks(lambda deployer: deployer.undeploy("chat"))
        await world.until(world.has_nothing)
    finally:
        store.close()
    return struck.steps


@pytest.mark.parametrize("blow", [KilledError(), StoreError("The server closed the connection.")], ids=["kill", "fail"])
async def test_at_whichever_step_it_is_struck_it_comes_about(tmp_path: Path, blow: Exception) -> None:
    mark, steps = 2, MANY  # what is struck before it begins differs little from what is struck after the step before
    while mark <= steps:
        steps = await course(tmp_path / f"{mark}.sqlite", mark, blow)
        mark += 2
    assert MANY < mark, "a course has many steps"
