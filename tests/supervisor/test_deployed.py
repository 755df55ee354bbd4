"""Orders to serve a model: what the owner allows, what is fetched, and what is answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from protocol.faults import Fault, refuse
from protocol.link_wire import Fetch
from supervisor import deployed
from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import Refused as PullRefused
from supervisor.deployed import STALL_S, Deployed
from supervisor.link.remote import Refused, Serve, Unserve
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest, Store
from supervisor.pull_source import folder_name
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
        self.size = 2**20
        self.says: Mapping[str, Any] = {"t": "plan", "total_bytes": self.size}
        self.left: set[str] = set()  # what pulls left that were called off
        self.under: set[str] = set()  # what is being pulled
        self.lines: dict[str, trio.Event] = {}  # over which it comes
        self.called_off: list[str] = []
        self._in_file: list[ModelTable] = []
        self.deployed = Deployed(lambda: self.settings, self, self, self.reload)  # type: ignore[arg-type]

    def pull(self, order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        if self.busy:
            raise PullRefused(429, "8 pulls are under way; wait for one of them.")
        self.pulled.append(order)
        return self._course(order)

    async def call_off(self, order: Pull) -> None:
        if order.name in self.under:
            self.under.discard(order.name)
            self.called_off.append(order.name)
            self.left.add(order.name)

    async def has_files(self, name: str) -> bool:
        return name in self.left

    async def _course(self, order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        self.under.add(order.name)
        yield self.says
        yield None
        await trio.lowlevel.checkpoint()
        if order.name in self.lines:
            await self.lines[order.name].wait()
            yield {"t": "progress", "done_bytes": self.size, "total_bytes": self.size}
        self.under.discard(order.name)
        if self.end["t"] == "done":
            self.keep(order.name, order.sha256)
        yield self.end

    def keep(self, name: str, sha256: str, pulled: bool = True) -> None:
        """Have it in worker.toml."""
        store, key = Store(self.folder), folder_name(name)
        store.folder(key).mkdir()
        (store.folder(key) / "model.gguf").write_bytes(bytes(self.size))
        if pulled:
            store.open_for_writing()
            kept = {"model.gguf": Kept(size_bytes=self.size, sha256=sha256)}
            manifest = Manifest(
                name=name, kind="url", source=SOURCE, origin=SOURCE, pulled_at=1.0, files=kept, guess=Guess()
            )
            (self.folder / ".store" / "manifests" / key).write_bytes(msgspec.json.encode(manifest))
        self._in_file.append(ModelTable(name=name, engine="llm", path=str(store.folder(key) / "model.gguf")))

    async def remove(self, order: Remove) -> str:
        self.removed.append(order.name)
        self.left.discard(order.name)
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


def ordered(digit: int) -> Serve:
    return Serve(name=f"m@{digit:010}", source=SOURCE, sha256=DIGEST)


class Answers:
    """What came of orders that were given at once."""

    def __init__(self, house: House) -> None:
        self._house, self.of = house, dict[str, str]()

    async def ask(self, order: Serve) -> None:
        try:
            self.of[order.name] = await self._house.deployed.serve(order)
        except Refused as refused:
            self.of[order.name] = str(refused)


async def test_many_orders_at_once_keep_to_the_disk_that_the_owner_gives_all_of_them(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, max_gb=2 / 1024))  # two of these models
    answers = Answers(house)
    async with trio.open_nursery() as nursery:
        for digit in range(4):
            house.lines[ordered(digit).name] = trio.Event()
            nursery.start_soon(answers.ask, ordered(digit))
        await wait_all_tasks_blocked()
        assert len(house.under) == 2
        for line in house.lines.values():
            line.set()
    assert sum("max_gb" in answer for answer in answers.of.values()) == 2
    assert sum(answer.endswith("is served.") for answer in answers.of.values()) == 2


async def test_one_whose_server_does_not_say_how_large_it_is_is_called_off_when_it_is_too_large(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, max_gb=1.5 / 1024))
    house.says = {"t": "plan", "total_bytes": None}
    answers, (one, other) = Answers(house), (ordered(1), ordered(2))
    async with trio.open_nursery() as nursery:
        for order in (one, other):
            house.lines[order.name] = trio.Event()
            nursery.start_soon(answers.ask, order)
        await wait_all_tasks_blocked()
        assert house.under == {one.name, other.name}, "neither is known to be too much yet"
        house.lines[one.name].set()
        await wait_all_tasks_blocked()
        house.lines[other.name].set()
    assert answers.of[one.name].endswith("is served.")
    assert "max_gb" in answers.of[other.name]
    assert house.called_off == [other.name]


async def test_some_are_fetched_side_by_side_and_one_that_hangs_or_fails_is_not_in_the_way(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, fetches=2))
    answers = Answers(house)
    async with trio.open_nursery() as nursery:
        hangs, then = ordered(0), [ordered(digit) for digit in (1, 2, 3)]
        house.lines = {order.name: trio.Event() for order in (hangs, *then)}
        for order in (hangs, *then):
            nursery.start_soon(answers.ask, order)
            await wait_all_tasks_blocked()
        assert house.under == {hangs.name, then[0].name}
        house.end = {"t": "failed", "message": "The server answered 404."}
        house.lines[then[0].name].set()
        await wait_all_tasks_blocked()
        assert "404" in answers.of[then[0].name]
        house.end = {"t": "done", "engine": "llm"}
        for order in then[1:]:
            house.lines[order.name].set()
        await wait_all_tasks_blocked()
        assert [answers.of[order.name].endswith("is served.") for order in then[1:]] == [True, True]
        assert hangs.name not in answers.of
        nursery.cancel_scope.cancel()


async def test_the_same_order_while_it_is_fetched_waits_for_it(house: House) -> None:
    house.lines[NAME] = trio.Event()
    answers = Answers(house)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(answers.ask, Serve(name=NAME, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        house.lines[NAME].set()
    assert len(house.pulled) == 1
    assert answers.of == {NAME: f"{NAME} is served."}


async def test_a_pull_whose_order_was_cancelled_is_called_off(house: House) -> None:
    house.lines[NAME] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.deployed.serve, Serve(name=NAME, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert house.called_off == [NAME]


async def test_what_is_wanted_no_more_while_it_is_fetched_is_called_off_and_deleted(house: House) -> None:
    house.lines[NAME] = trio.Event()
    answers = Answers(house)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(answers.ask, Serve(name=NAME, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        await house.deployed.unserve(Unserve(name=NAME))
    assert answers.of == {NAME: f"{NAME} is wanted no more."}
    assert (len(house.pulled), house.called_off, house.removed) == (1, [NAME], [NAME])
    assert not house.left
    house.lines[NAME].set()
    await answers.ask(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert answers.of == {NAME: f"{NAME} is served."}


async def test_how_far_each_model_is_stands_in_the_heartbeats(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, fetches=1))
    other, far = "draw@0000000000", trio.Event()

    async def half(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        yield {"t": "progress", "done_bytes": 5, "total_bytes": house.size}
        yield {"t": "note", "text": "nothing about how far it is"}
        await far.wait()
        house.keep(order.name, order.sha256)
        yield house.end

    async def proves(table: ModelTable) -> Fault | None:
        await proved.wait()
        return None

    house.pull = lambda order: half(order)  # type: ignore[method-assign]
    house.take_on, proved = proves, trio.Event()  # type: ignore[method-assign]
    assert house.deployed.fetches() == ()
    answers = Answers(house)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answers.ask, Serve(name=NAME, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        nursery.start_soon(answers.ask, Serve(name=other, source=SOURCE, sha256=DIGEST))
        await wait_all_tasks_blocked()
        fetching = Fetch(model=NAME, phase="fetching", done_bytes=5, total_bytes=house.size)
        assert house.deployed.fetches() == (fetching, Fetch(model=other, phase="waiting"))
        far.set()
        await wait_all_tasks_blocked()
        assert set(house.deployed.fetches()) == {
            Fetch(model=NAME, phase="proving"),
            Fetch(model=other, phase="proving"),
        }
        proved.set()
    assert house.deployed.fetches() == ()
    assert answers.of == {name: f"{name} is served." for name in (NAME, other)}


async def test_a_download_that_stalls_makes_way(house: House, autojump_clock: MockClock) -> None:
    async def trickle(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        house.under.add(order.name)
        for done in range(10_000):
            await trio.sleep(20)
            yield {"t": "progress", "done_bytes": done, "total_bytes": 2**30}

    house.pull = lambda order: trickle(order)  # type: ignore[method-assign]
    began = trio.current_time()
    with pytest.raises(Refused, match="stalls"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert STALL_S < trio.current_time() - began < STALL_S + 60
    assert house.called_off == [NAME]


async def test_a_download_that_starts_over_and_moves_does_not_stall(house: House, autojump_clock: MockClock) -> None:
    async def starts_over(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        yield {"t": "progress", "done_bytes": 2**30, "total_bytes": 2**30}
        yield {"t": "note", "text": "what was there from an earlier pull is damaged; starting over"}
        for done in range(0, 2 * int(STALL_S), 20):
            await trio.sleep(20)
            yield {"t": "progress", "done_bytes": done * 2**20, "total_bytes": 2**30}
        house.keep(order.name, order.sha256)
        yield house.end

    house.pull = lambda order: starts_over(order)  # type: ignore[method-assign]
    assert "is served" in await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


async def test_falling_back_is_no_progress(house: House, autojump_clock: MockClock) -> None:
    async def up_and_down(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        for done in range(10_000):
            await trio.sleep(20)
            yield {"t": "progress", "done_bytes": done % 2 * 1000, "total_bytes": 2**30}

    house.pull = lambda order: up_and_down(order)  # type: ignore[method-assign]
    with pytest.raises(Refused, match="stalls"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


async def test_one_whose_size_is_not_told_is_compared_with_the_disk_now_and_then(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.keep("other@0123456789", DIGEST)
    await house.reload()
    walks: list[Path] = []
    monkeypatch.setattr(deployed, "folder_bytes", lambda folder: walks.append(folder) or 0)

    async def sizeless(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        for done in range(1, 257):
            yield {"t": "progress", "done_bytes": done * 2**20, "total_bytes": None}
        house.keep(order.name, order.sha256)
        yield house.end

    house.pull = lambda order: sizeless(order)  # type: ignore[method-assign]
    await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert len(walks) == 1 + 1 + 256 * 2**20 // deployed.LOOK_BYTES  # before it, at its first bytes, at each step


async def test_one_whose_size_is_not_told_is_called_off_when_it_is_too_large(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, max_gb=1.0))

    async def sizeless(order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        house.under.add(order.name)
        for done in range(1, 2049):
            yield {"t": "progress", "done_bytes": done * 2**20, "total_bytes": None}

    house.pull = lambda order: sizeless(order)  # type: ignore[method-assign]
    with pytest.raises(Refused, match="max_gb"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert house.called_off == [NAME]


async def test_a_model_of_the_owners_is_his_whatever_it_is_called(house: House) -> None:
    house.keep(NAME, DIGEST, pulled=False)
    await house.reload()
    with pytest.raises(Refused, match="this worker's owner"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    with pytest.raises(Refused, match="this worker's owner"):
        await house.deployed.unserve(Unserve(name=NAME))
    assert [*house.gone, *house.removed, *house.pulled] == []


async def test_bytes_that_are_here_already_must_be_the_ones_that_are_wanted(house: House) -> None:
    house.keep(NAME, DIGEST)
    await house.reload()
    with pytest.raises(Refused, match="other bytes"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256="b" * 64))
    assert "is served" in await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


async def test_an_address_below_a_star_of_the_host_is_allowed(house: House) -> None:
    await house.deployed.serve(Serve(name=NAME, source="https://eu.files.test/a.b/chat.gguf", sha256=DIGEST))
    assert len(house.pulled) == 1


async def test_an_engine_that_the_owner_did_not_name_is_thrown_out(tmp_path: Path) -> None:
    house = House(tmp_path, msgspec.structs.replace(ALLOWED, engines=["whisper"]))
    with pytest.raises(Refused, match="engine: its files are for llm"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))
    assert house.removed == [NAME]


async def test_one_that_cannot_be_thrown_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def remove(_order: Remove) -> str:
        raise PullRefused(409, "worker.toml cannot be written.")

    house = House(tmp_path, msgspec.structs.replace(ALLOWED, engines=["whisper"]))
    monkeypatch.setattr(house, "remove", remove)
    with pytest.raises(Refused, match=r"engine: its files are for llm.*worker\.toml cannot be written"):
        await house.deployed.serve(Serve(name=NAME, source=SOURCE, sha256=DIGEST))


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
