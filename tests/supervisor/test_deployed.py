"""Orders to serve a model: what the owner allows, what is fetched, and what is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from protocol.faults import Fault, refuse
from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import Refused as PullRefused
from supervisor.deployed import Deployed
from supervisor.link.remote import Refused, Serve, Unserve
from supervisor.settings import CoordinatorTable, DeployTable, ModelTable, Settings

NAME = "chat@0123456789"
DIGEST = "a" * 64
SOURCE = "https://models.test/chat.gguf"
ALLOWED = DeployTable(sources=["https://models.test/*", "https://*.files.test/*", "my-team/*"])


class House:
    """A worker of which only the orders are real."""

    def __init__(self, folder: Path, allowed: DeployTable) -> None:
        self.folder = folder
        self.settings = Settings(coordinator=CoordinatorTable(deploy=allowed))
        self.pulled: list[Pull] = []
        self.removed: list[str] = []
        self.served: list[str] = []
        self.gone: list[str] = []
        self.fault: Fault | None = None
        self.end: Mapping[str, Any] = {"t": "done", "engine": "llm"}
        self.busy = False
        self.under: set[str] = set()  # what is being pulled
        self.line = trio.Event()  # over which it comes
        self.line.set()
        self._in_file: list[ModelTable] = []
        self.deployed = Deployed(lambda: self.settings, self, self, self.reload)  # type: ignore[arg-type]

    def pull(self, order: Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        if self.busy:
            raise PullRefused(429, "8 pulls are under way; wait for one of them.")
        self.pulled.append(order)
        return self._course(order)

    def under_way(self, order: Pull) -> bool:
        return order.name in self.under

    async def _course(self, order: Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        yield {"t": "plan"}
        yield None
        self.under.add(order.name)
        await trio.lowlevel.checkpoint()
        await self.line.wait()
        self.under.discard(order.name)
        if self.end["t"] == "done":
            home = self.folder / order.name
            home.mkdir()
            (home / "model.gguf").write_bytes(bytes(2**20))
            self._in_file.append(ModelTable(name=order.name, engine="llm", path=str(home / "model.gguf")))
        yield self.end

    async def remove(self, order: Remove) -> str:
        self.removed.append(order.name)
        self._in_file = [table for table in self._in_file if table.name != order.name]
        return f"{order.name} was removed."

    async def reload(self) -> None:
        self.settings = msgspec.structs.replace(self.settings, models=list(self._in_file))

    async def take_on(self, table: ModelTable) -> Fault | None:
        self.served.append(table.name)
        return self.fault

    async def let_go(self, model: str, reason: str, *, within_s: float) -> Fault | None:
        self.gone.append(model)
        return None


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, ALLOWED)


async def test_a_model_is_fetched_taken_up_and_proved(house: House) -> None:
    order = Serve(name=NAME, source=SOURCE, sha256=DIGEST, engine="llm", options={"n_ctx": 512})
    assert await house.deployed.serve(order) == f"{NAME} is served."
    [pull] = house.pulled
    assert (pull.source, pull.sha256, pull.name, pull.engine) == (SOURCE, DIGEST, NAME, "llm")
    assert msgspec.json.decode(pull.options) == {"n_ctx": 512}
    assert 0 < pull.max_gb <= 100
    assert house.served == [NAME]


async def test_the_same_order_again_fetches_nothing(house: House) -> None:
    order = Serve(name=NAME, source=SOURCE, sha256=DIGEST)
    await house.deployed.serve(order)
    await house.deployed.serve(order)
    assert len(house.pulled) == 1
    assert house.served == [NAME, NAME]


async def test_one_that_does_not_pass_its_proof_says_so(house: House) -> None:
    house.fault = refuse("load_failed", "It is no GGUF file.").fault
    with pytest.raises(Refused, match="no GGUF"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "chat"}, "name"),
        ({"name": "../../etc@0123456789"}, "name"),
        ({"source": "https://elsewhere.test/chat.gguf"}, "none of the sources"),
        ({"source": "https://models.test.evil/chat.gguf"}, "none of the sources"),
        ({"source": "other-team/chat"}, "none of the sources"),
        ({"source": "https://elsewhere.test/x.files.test/chat.gguf"}, "none of the sources"),
        ({"source": "https://files.test/chat.gguf"}, "none of the sources"),
        ({"source": "https://models.test/../chat.gguf"}, "plain address"),
        ({"source": "https://models.test/a/%2E%2e/chat.gguf"}, "plain address"),
        ({"source": "https://models.test@elsewhere.test/chat.gguf"}, "plain address"),
        ({"source": "https://models.test/chat.gguf\nx"}, "plain address"),
        ({"source": "https://elsewhere.test\\.files.test/chat.gguf"}, "plain address"),
        ({"engine": "command"}, "engine"),
        ({"engine": "server"}, "engine"),
        ({"engine": "mine"}, "engine"),
    ],
)
async def test_what_the_owner_does_not_allow_is_refused(house: House, changes: dict[str, str], word: str) -> None:
    order = msgspec.structs.replace(Serve(name=NAME, source=SOURCE, sha256=DIGEST), **changes)
    with pytest.raises(Refused, match=word):
        await house.deployed.serve(order)
    assert not house.pulled


@pytest.mark.parametrize("source", ["/etc/passwd", "./my.gguf", "~/my.gguf", "my.gguf", "http://models.test/a.gguf"])
async def test_no_pattern_of_the_owner_opens_his_own_files(tmp_path: Path, source: str) -> None:
    house = House(tmp_path, DeployTable(sources=["*"]))
    with pytest.raises(Refused, match="source"):
        await house.deployed.serve(Serve(name=NAME, source=source, sha256=DIGEST))
    assert not house.pulled


async def test_without_sources_nothing_is_deployed(tmp_path: Path) -> None:
    house = House(tmp_path, DeployTable())
    with pytest.raises(Refused, match=r"coordinator\.deploy\.sources is empty"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


async def test_the_disk_that_the_owner_gives_is_bounded(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, max_gb=2.0 / 1024))
    await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    second = Serve(name="chat@1111111111", source=SOURCE, sha256=DIGEST)
    await house.deployed.serve(second)
    assert house.pulled[1].max_gb == pytest.approx(1.0 / 1024)
    with pytest.raises(Refused, match=r"coordinator\.deploy\.max_gb"):
        await house.deployed.serve(msgspec.structs.replace(second, name="chat@2222222222"))


async def test_many_orders_at_once_keep_to_the_disk_that_the_owner_gives_all_of_them(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, max_gb=2 / 1024))  # two of these models
    house.line = trio.Event()
    answers: list[str] = []

    async def ask(digit: int) -> None:
        try:
            answers.append(await house.deployed.serve(Serve(name=f"m@{digit:010}", source=SOURCE, sha256=DIGEST)))
        except Refused as refused:
            answers.append(str(refused))

    async with trio.open_nursery() as nursery:
        for digit in range(4):
            nursery.start_soon(ask, digit)
        await wait_all_tasks_blocked()
        assert len(house.under) == 1
        house.line.set()
    assert len(house.pulled) == 2
    assert sum("max_gb" in answer for answer in answers) == 2


async def test_a_pull_whose_order_was_cancelled_counts_as_well(tmp_path: Path) -> None:
    house = House(tmp_path, ALLOWED)
    house.line = trio.Event()
    async with trio.open_nursery() as nursery:
        first = Serve(name="first@0123456789", source=SOURCE, sha256=DIGEST)
        nursery.start_soon(house.deployed.serve, first)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert house.under == {first.name}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.deployed.serve, Serve(name=NAME, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        assert [pull.name for pull in house.pulled] == [first.name, first.name], "it is followed to its end"
        house.line.set()
    assert house.pulled[-1].name == NAME
    assert house.pulled[-1].max_gb < house.pulled[0].max_gb


async def test_an_address_below_a_star_of_the_host_is_allowed(house: House) -> None:
    await house.deployed.serve(Serve(name=NAME, source="https://eu.files.test/a.b/chat.gguf", sha256=DIGEST))
    assert len(house.pulled) == 1


async def test_an_engine_that_the_owner_did_not_name_is_thrown_out(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, engines=["whisper"]))
    with pytest.raises(Refused, match="engine: its files are for llm"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert house.removed == [NAME]


async def test_a_pull_that_fails_tells_why(house: House) -> None:
    house.end = {"t": "failed", "message": "The server answered 404."}
    with pytest.raises(Refused, match="404"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    house.busy = True
    with pytest.raises(Refused, match="8 pulls"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


async def test_what_is_wanted_no_more_goes_with_its_files(house: House) -> None:
    await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert "removed" in await house.deployed.unserve(Unserve(name=NAME))
    assert house.gone == [NAME]
    assert "not here" in await house.deployed.unserve(Unserve(name=NAME))
    assert house.removed == [NAME]
    with pytest.raises(Refused, match="name"):
        await house.deployed.unserve(Unserve(name="owners-own-model"))
