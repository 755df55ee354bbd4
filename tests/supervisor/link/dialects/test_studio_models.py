"""Models that a studio's jobs bring the address of: what is asked, fetched, kept and let go. The files come from a real
server through the real child; who serves them is played."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from protocol.faults import Fault
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects.studio_models import Failed, Models, Source, _Fetch, source_of
from supervisor.link.dialects.studio_offers import Unfit
from supervisor.model_guess import Guess
from supervisor.model_store import Store
from supervisor.pull_wire import Finished, Plan, Progress, Request
from supervisor.roster import Origin
from supervisor.settings import ModelTable
from supervisor.settings_dialects import StudioTable
from tests.supervisor.stand_in_hub import Site, serving

DATA = b"a model of no known kind" * 100
GIB = 2**30


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file(url: str = "https://models.example/m.bin", name: str = "m.bin", **more: Any) -> dict[str, Any]:
    return {"role": "model", "url": url, "filename": name, **more}


def claim(*files: dict[str, Any], model: str = "synthetic-m", engine: str = "synthetic", **more: Any) -> frames.Claim:
    raw = {
        "jobId": "j1",
        "model": model,
        "task": {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]},
        "modelSource": {"engine": engine, "files": list(files), **more},
    }
    return msgspec.json.decode(msgspec.json.encode(raw), type=frames.Claim)


# ---- what is asked


@pytest.mark.parametrize(
    ("files", "more", "words"),
    [
        ([file()], {"engine": "sd-cpp"}, "loads what 'sd-cpp' does"),
        ([file()], {"engine": "onnx"}, "for llm"),
        ([], {"engine": "llama-cpp"}, "1 to 64 files"),
        ([file(), file()], {}, "different names"),
        ([file(name="../m")], {}, "no plain file name"),
        ([file(name="/etc/passwd")], {}, "no plain file name"),
        ([file(name="a/./b")], {}, "no plain file name"),
        ([file(name=".lock")], {}, "no plain file name"),
        ([file(name="m.part")], {}, "no plain file name"),
        ([file(role="lora")], {}, "no engine of this worker takes a lora"),
        ([file(role="engine")], {}, "none of"),
        ([file("ftp://models.example/m")], {}, "expected an https address"),
        ([file("https://user:secret@models.example/m")], {}, "without a password"),
        ([file("file:///etc/passwd")], {}, "expected an https address"),
        ([file("http://models.example/m", sha256="0" * 64)], {}, "http needs"),
        ([file("http://near.example/m")], {}, "http needs"),
        ([file(sha256="xyz")], {}, "modelSource: "),
        ([file(approxBytes=-1)], {}, "modelSource: "),
        ([file(approxBytes=3 * GIB)], {}, "more than this worker keeps"),
        (["nonsense"], {}, "modelSource: "),
    ],
)
def test_what_cannot_be_fetched_is_said_before_anything_begins(files, more, words):
    table = StudioTable(models="download", models_gb=2.0, hosts=["near.example"])
    with pytest.raises(Unfit, match=words):
        source_of(claim(*files, **more), "llm", table)


def test_what_is_fetched():
    table = StudioTable(models="download", hosts=["Near.example"])
    found = source_of(
        claim(
            file("http://near.example:80/m", name="a/m.gguf", sha256="AB" * 32, approxBytes=5),
            file(name="p.gguf", role="text-encoder-vision"),
            engine="llama-cpp",
            cliDefaults={"contextSize": 4096, "mmap": False, "steps": 4, "cfgScale": 1.5},
        ),
        "llm",
        table,
    )
    assert (found.main, found.options) == ("a/m.gguf", {"n_ctx": 4096, "use_mmap": False})
    assert [(each.name, each.sha256, each.approx_bytes) for each in found.files] == [
        ("a/m.gguf", "ab" * 32, 5),
        ("p.gguf", "", 0),
    ]


# ---- fetched, served, kept


class Roll:
    """Serves what it is told."""

    def __init__(self) -> None:
        self.tables: dict[str, ModelTable] = {}
        self.origins: dict[str, Origin] = {}
        self.fault: Fault | None = None
        self.let: list[str] = []
        self.news = trio.Event()

    def origin(self, model: str) -> Origin | None:
        return self.origins.get(model)

    async def take_on(self, table: ModelTable, origin: Origin = Origin.ORDER) -> Fault | None:
        await trio.lowlevel.checkpoint()
        if self.fault is None:
            self.tables[table.name], self.origins[table.name] = table, origin
            self.news.set()
        return self.fault

    async def let_go(self, model: str, reason: str) -> Fault | None:
        await trio.lowlevel.checkpoint()
        self.let.append(model)
        del self.origins[model], self.tables[model]
        return None


class Desk:
    """One life of the fetching part."""

    def __init__(self, folder: Path, models: Models, roll: Roll, table: StudioTable) -> None:
        self.folder, self.models, self.roll, self.table = folder, models, roll, table

    async def ask(self, what: frames.Claim, job: str = "j1") -> str | None:
        """Why the model of a claim cannot be had; "" when nothing had to be fetched."""
        source = self.models.missing(what, "llm")
        return "" if source is None else await self.fetched(source, job)

    async def fetched(self, source: Source, job: str = "j1") -> str | None:
        over = trio.Event()
        told: list[str | None] = []

        def done(problem: str | None) -> None:
            told.append(problem)
            over.set()

        self.models.begin(source, job, done)
        with trio.fail_after(60):
            await over.wait()
        assert len(told) == 1
        return told[0]


@contextlib.asynccontextmanager
async def desk(folder: Path, *, gb: float = 1.0, roll: Roll | None = None, **more: Any) -> AsyncIterator[Desk]:
    table = StudioTable(models="download", models_gb=gb, hosts=["127.0.0.1"], kinds=["llm"])
    roll = roll or Roll()
    models = Models(folder / "models", table, roll, **more)
    async with trio.open_nursery() as nursery:
        await nursery.start(models.run)
        yield Desk(folder / "models", models, roll, table)
        nursery.cancel_scope.cancel()


def keys(folder: Path) -> list[str]:
    return Store(folder).keys()


async def test_a_model_is_fetched_resumed_after_a_cut_checked_and_served_again_after_a_restart(tmp_path, caplog):
    caplog.set_level("INFO")
    with serving(Site()) as site:
        site.files["/m"] = DATA
        site.cut_after["/m"] = [1000]
        asked = claim(file(f"{site.url}/m", sha256=sha(DATA), approxBytes=len(DATA)))
        async with desk(tmp_path) as it:
            assert await it.ask(asked) is None
            table = it.roll.tables["synthetic-m"]
            assert Path(table.path).read_bytes() == DATA
            assert (table.engine, table.sha256) == ("synthetic", {"model": sha(DATA)})
            assert site.ranges_asked() == ["", "bytes=1000-"]
            assert await it.ask(asked) == "", "it is here"
        told = [record.getMessage() for record in caplog.records if getattr(record, "job", "") == "j1"]
        assert "synthetic-m is fetched: 1 files, about 0.00 GiB" in told
        assert any("resuming at 1000 bytes" in line for line in told)
        roll = Roll()
        async with desk(tmp_path, roll=roll) as it:
            with trio.fail_after(30):
                await roll.news.wait()
            assert roll.origins == {"synthetic-m": Origin.DOWNLOAD}
            assert await it.ask(asked) == ""
        assert len(site.asked) == 2, "nothing is fetched twice"


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/m", {"sha256": "0" * 64}, "where 0000"),
        ("/none", {}, "404"),
        ("/away", {}, "no public address"),
        ("/large", {}, "are granted for it"),
    ],
)
async def test_each_way_in_which_a_fetch_fails_has_its_sentence(tmp_path, path, more, words):
    with serving(Site()) as site:
        site.files["/m"], site.files["/large"] = DATA, b"x" * 200_000
        site.redirects["/away"] = "https://169.254.169.254/latest/meta-data"
        given = {"sha256": sha(site.files.get(path, b"")), **more}
        async with desk(tmp_path, gb=100_000 / GIB) as it:
            problem = await it.ask(claim(file(f"{site.url}{path}", **given)))
            assert problem is not None
            assert words in problem
            assert it.roll.tables == {}
            assert keys(it.folder) == []
            assert await it.ask(claim(file(f"{site.url}/m", sha256=sha(DATA)))) is None, "the next one is not harmed"


async def test_a_server_that_is_not_there_and_a_full_disk_are_told(tmp_path):
    async def full(_request: Request, _line: Any) -> Any:
        raise OSError(28, "No space left on device")

    async def wrong(_request: Request, _line: Any) -> Any:
        raise ZeroDivisionError

    for fetch, words in ((full, "No space left"), (wrong, "a mistake of this worker's program")):
        async with desk(tmp_path, fetch=fetch) as it:
            problem = await it.ask(claim(file()))
            assert problem is not None
            assert words in problem


class Fetches:
    """Fetches at once, or when `go` is set."""

    def __init__(self, size: int = 1000) -> None:
        self.size, self.requests, self.go = size, list[Request](), trio.Event()
        self.begun = trio.Event()
        self.go.set()
        self.guess = Guess(why="it is of no known layout")

    async def __call__(self, request: Request, line: Any) -> tuple[Plan, Finished]:
        self.requests.append(request)
        self.begun.set()
        plan = Plan(files=tuple(each.name for each in request.files), total_bytes=None, origin=request.source)
        line.say(plan)
        line.say(Progress(done_bytes=1, total_bytes=None, file="x"))
        await self.go.wait()
        digests = {}
        for each in request.files:
            path = Path(request.staging) / each.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * self.size)
            digests[each.name] = each.sha256 or sha(path.read_bytes())
        return plan, Finished(files=digests, guess=self.guess)


async def test_the_same_asked_twice_is_fetched_once_and_another_waits_its_turn(tmp_path):
    fetches = Fetches()
    fetches.go = trio.Event()
    ends: dict[str, str | None] = {}

    async def ask(name: str, what: frames.Claim) -> None:
        ends[name] = await it.ask(what, name)

    async with desk(tmp_path, fetch=fetches) as it, trio.open_nursery() as nursery:
        nursery.start_soon(ask, "a", claim(file()))
        with trio.fail_after(30):
            await fetches.begun.wait()
        nursery.start_soon(ask, "again", claim(file()))
        nursery.start_soon(ask, "b", claim(file(), model="synthetic-b"))
        await trio.testing.wait_all_tasks_blocked()
        assert (len(fetches.requests), ends) == (1, {})
        fetches.go.set()
    assert ends == {"a": None, "again": None, "b": None}
    assert len(fetches.requests) == 2


async def test_the_longest_unused_goes_and_models_of_others_are_left_alone(tmp_path, monkeypatch):
    fetches = Fetches(400)
    async with desk(tmp_path, gb=1000 / GIB, fetch=fetches) as it:
        used = {"synthetic-a": 3.0, "synthetic-b": 1.0}
        monkeypatch.setattr(Store, "last_loaded", lambda _self, key: used.get(key))
        for name in ("synthetic-a", "synthetic-b"):
            assert await it.ask(claim(file(approxBytes=400), model=name)) is None
        assert it.roll.let == []
        assert await it.ask(claim(file(approxBytes=400), model="synthetic-c")) is None
        assert it.roll.let == ["synthetic-b"]
        assert keys(it.folder) == ["synthetic-a", "synthetic-c"]
        assert await it.ask(claim(file(), model="synthetic-d")) is None, "nobody said how large it is"
        assert it.roll.let == ["synthetic-b", "synthetic-a"]
        lock = Store(it.folder).use("synthetic-c")
        it.roll.origins["synthetic-d"] = Origin.CONFIG  # by now worker.toml names it
        assert it.models.missing(claim(file(name="other"), model="synthetic-d"), "llm") is None
        problem = await it.ask(claim(file(approxBytes=900), model="synthetic-e"))
        assert lock is not None
        assert problem is not None
        assert "in use by another program" in problem


async def test_other_files_under_the_same_name_replace_it_and_odd_claims_leave_it(tmp_path):
    fetches = Fetches()
    async with desk(tmp_path, fetch=fetches) as it:
        assert await it.ask(claim(file(sha256="1" * 64))) is None
        assert await it.ask(claim(file("https://elsewhere.example/m", sha256="1" * 64))) == "", "the same bytes"
        assert await it.ask(claim(file("nonsense"))) == ""
        assert await it.ask(claim(file(sha256="2" * 64))) is None
        assert it.roll.let == ["synthetic-m"]
        assert it.roll.tables["synthetic-m"].sha256 == {"model": "2" * 64}


async def test_what_somebody_has_deleted_by_hand_is_fetched_again(tmp_path):
    fetches, roll = Fetches(), Roll()
    async with desk(tmp_path, fetch=fetches, roll=roll) as it:
        assert await it.ask(claim(file())) is None
        path = Path(roll.tables["synthetic-m"].path)
    for harm in (path.unlink, lambda: path.write_bytes(b"short")):
        harm()
        roll = Roll()
        roll.fault = Fault("load_failed", "it is not there")  # what the next start says of it
        async with desk(tmp_path, fetch=fetches, roll=roll) as it:
            roll.fault = None
            roll.origins.clear()
            assert await it.ask(claim(file())) is None
            assert path.stat().st_size == 1000
    assert len(fetches.requests) == 3


async def test_what_no_engine_takes_or_does_not_pass_its_proof_is_told(tmp_path):
    fetches = Fetches()
    async with desk(tmp_path, fetch=fetches) as it:
        problem = await it.ask(claim(file(), model="m", engine="llama-cpp"))
        assert problem == "No engine here does llm with the files of 'm': it is of no known layout."
        fetches.guess = Guess(engine="llm", main="m.bin", why="it is a GGUF")
        it.roll.fault = Fault("load_failed", "The model m did not pass its proof: no.")
        what = claim(file(), model="m", engine="llama-cpp", cliDefaults={"contextSize": 512, "mmap": True})
        assert await it.ask(what) == "The model m did not pass its proof: no."
        it.roll.fault = None
        count = len(fetches.requests)
        assert await it.ask(what) is None
        assert (it.roll.tables["m"].options, len(fetches.requests)) == ({"n_ctx": 512, "use_mmap": True}, count)
        assert await it.ask(claim(model="synthetic-plain")) is None
        assert it.roll.tables["synthetic-plain"] == ModelTable(name="synthetic-plain", engine="synthetic")
        assert await it.ask(claim(file(), model="synthetic/odd name")) is None
        assert await it.ask(claim(file(), model="synthetic--odd--name")) is None
        assert len(keys(it.folder)) == 3


async def test_the_end_of_the_worker_is_the_end_of_a_fetch_and_is_told(tmp_path):
    fetches = Fetches()
    fetches.go = trio.Event()
    told: list[str | None] = []
    async with desk(tmp_path, fetch=fetches) as it:
        source = it.models.missing(claim(file()), "llm")
        assert source is not None
        it.models.begin(source, "j1", told.append)
        await trio.testing.wait_all_tasks_blocked()
    assert told == ["The worker stopped before the model was there."]


class Trickle:
    """Sends so much each minute, for so many minutes; then it ends."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    async def __call__(self, _request: Request, line: Any) -> tuple[Plan, Finished]:
        for done in self.steps:
            line.say(Progress(done_bytes=done, total_bytes=None, file="x"))
            await trio.sleep(60)
        return Plan(files=(), total_bytes=None, origin="x"), Finished(files={}, guess=Guess(why="x"))


MIB = 2**20


@pytest.mark.parametrize(
    ("steps", "fails"),
    [
        ([1000 * minute for minute in range(100)], True),
        ([0] * 11, True),
        ([0] * 9, False),
        ([MIB * minute // 5 for minute in range(100)], False),
        ([50 * MIB] + [MIB * minute // 5 for minute in range(100)], False),
        ([50 * MIB] * 12, True),
    ],
)
async def test_a_server_that_trickles_does_not_keep_the_others_waiting(tmp_path, autojump_clock, steps, fails):
    models = Models(tmp_path, StudioTable(models="download"), Roll(), Trickle(*steps))
    source = source_of(claim(file()), "llm", StudioTable(models="download"))
    request = Request(kind="files", source="x", staging=str(tmp_path))
    if not fails:
        assert await models._paced(request, _Fetch(source))
        return
    with pytest.raises(Failed, match="too slowly: less than 1 MiB in 10 minutes"):
        await models._paced(request, _Fetch(source))


async def test_what_worker_toml_names_by_now_is_neither_let_go_nor_deleted(tmp_path):
    async with desk(tmp_path, gb=1000 / GIB, fetch=Fetches(800)) as it:
        assert await it.ask(claim(file(approxBytes=800), model="synthetic-a")) is None
        source = it.models.missing(claim(file("https://models.example/other"), model="synthetic-a"), "llm")
        assert source is not None
        it.roll.origins["synthetic-a"] = Origin.CONFIG
        problem = await it.fetched(source)
        assert problem is not None
        assert "is served here by now, as worker.toml wants it" in problem
        assert await it.ask(claim(file(approxBytes=800), model="synthetic-b")) is None
        assert it.roll.let == []
        assert keys(it.folder) == ["synthetic-a", "synthetic-b"]
