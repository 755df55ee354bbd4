"""The batch runner over a real store: killed at every step, expired, cancelled, with a queue that is full."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from coordinator.batches import Batches, BatchSettings, new_batch_id
from coordinator.blobs.folder import FolderBlobs
from coordinator.kept_files import KeptFiles, new_file_id
from coordinator.records import JobRecord, Submission
from coordinator.store import SqliteStore
from coordinator.store.base import Outcome, Want
from coordinator.store.shelf import BatchItem, BatchRecord, BatchState, FileRecord
from protocol.faults import Fault, refuse
from protocol.work import LlmResult

CHAT = "/v1/chat/completions"
LINES = 5
WAIT_S = 60.0
_job_ids = itertools.count()
ANY = Want("m", ("llm",), 100)
DONE = Outcome(msgspec.msgpack.encode(LlmResult(content="ok")), usage={"prompt_tokens": 1.0})


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """A store whose process is killed around its call number `at`; 0 lives for ever."""

    def __init__(self, store: SqliteStore, at: int = 0, *, after: bool = False) -> None:
        self._store, self._at, self._after = store, at, after
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self._at and not self._after:
                raise Killed
            value = function(*args)
            if self.calls == self._at:
                raise Killed
            return value

        return call


class Queue:
    """What the runner needs of a dispatcher, straight on the store."""

    def __init__(self, store: Any, room: float = float("inf")) -> None:
        self._store, self._room = store, room

    async def submit(self, s: Submission) -> JobRecord:
        if self._room <= 0:
            raise refuse("overloaded", "Too many jobs wait.")
        self._room -= 1
        record: JobRecord = self._store.insert(f"job_{next(_job_ids):06}", s)[0]
        return record

    async def cancel(self, job: str, tenant: str, reason: str) -> None:
        self._store.cancel(job, tenant, Fault("cancelled", reason))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


async def begin(store: SqliteStore, blobs: FolderBlobs, lines: int = LINES, **more: Any) -> BatchRecord:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    text = [{"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": body} for n in range(lines)]

    async def data() -> AsyncIterator[bytes]:
        yield "\n".join(map(json.dumps, text)).encode()

    files = KeptFiles(store, blobs)
    draft = FileRecord(id=new_file_id(), tenant="t", name="in", purpose="batch", blob="", size=0, sha256="")
    file = await files.keep(await files.receive(data(), draft))
    batch = BatchRecord(id=new_batch_id(), tenant="t", endpoint=CHAT, input_file=file.id, input_blob=file.blob, **more)
    return store.add_batch(batch, 86_400_000)


def runner(store: Any, blobs: FolderBlobs, queue: Any = None, **settings: Any) -> Batches:
    made = BatchSettings(**{"poll_s": 0.005, "open_lines": 2, **settings})
    return Batches(store, queue or Queue(store), blobs, KeptFiles(store, blobs), made)


async def work(store: SqliteStore, ran: Counter[str]) -> None:
    """A worker that answers everything."""
    while True:
        for record, _ in store.claim([ANY]):
            ran[record.idempotency_key] += 1
            assert store.accept(record.id, record.attempt, "w")
            store.complete(record.id, record.attempt, "w", DONE)
        await trio.sleep(0.002)


async def live(store: SqliteStore, batches: Batches, batch: BatchRecord, ran: Counter[str]) -> BatchRecord:
    """Run until the batch has ended, or the process is killed."""
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, store, ran)
            nursery.start_soon(batches.run)
            await until(lambda: look(store, batch).ended)
            nursery.cancel_scope.cancel()
    return look(store, batch)


async def until(check: Callable[[], bool]) -> None:
    """Wait for what the store shows; it tells nobody by itself."""
    while not check():  # noqa: ASYNC110
        await trio.sleep(0.002)


def look(store: SqliteStore, batch: BatchRecord) -> BatchRecord:
    now = store.get_batch(batch.id, "t")
    assert now is not None
    return now


def lines_of(store: SqliteStore, blobs: FolderBlobs, file_id: str) -> list[dict[str, Any]]:
    file = store.get_file(file_id, "t")
    assert file is not None
    return [json.loads(text) for text in blobs.path(file.blob).read_text().splitlines()]


def whole(store: SqliteStore, blobs: FolderBlobs, batch: BatchRecord, ran: Counter[str]) -> None:
    """Every line answered once, nothing left over."""
    assert (batch.state, batch.completed, batch.failed, batch.error_file) == ("completed", LINES, 0, "")
    assert [line["custom_id"] for line in lines_of(store, blobs, batch.output_file)] == [f"c{n}" for n in range(LINES)]
    assert ran == {f"{batch.id}/{n}": 1 for n in range(LINES)}
    assert batch.usage == {"prompt_tokens": LINES}
    assert len(store.list_files("t", 10)) == 2, "the input and one output"


async def test_a_batch_runs_a_few_lines_at_a_time(store: SqliteStore, blobs: FolderBlobs) -> None:
    batch = await begin(store, blobs)
    ran: Counter[str] = Counter()
    whole(store, blobs, await live(store, runner(store, blobs), batch, ran), ran)


@pytest.mark.parametrize("after", [False, True])
async def test_killed_at_every_step_it_ends_the_same(store: SqliteStore, blobs: FolderBlobs, after: bool) -> None:
    for at in itertools.count(1):
        batch = await begin(store, blobs)
        ran: Counter[str] = Counter()
        dying = Dying(store, at, after=after)
        killed = False
        try:
            await live(store, runner(dying, blobs), batch, ran)
        except* Killed:
            killed = True
        if not killed:
            assert at > 15, "the batch took fewer steps than it can"
            return
        await live(store, runner(store, blobs), batch, ran)
        whole(store, blobs, look(store, batch), ran)
        for file in store.list_files("t", 10):
            store.remove_file(file.id, "t")


class Meanwhile:
    """A store in which another replica does `act` right before our call number `at`."""

    def __init__(self, store: SqliteStore, at: int, act: Callable[[], None]) -> None:
        self._store, self._at, self._act = store, at, act
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                self._act()
            return function(*args)

        return call


async def answered(store: SqliteStore, blobs: FolderBlobs, state: BatchState) -> BatchRecord:
    """A batch in this state whose lines all have their answers."""
    batch, queue = await begin(store, blobs), Queue(store)
    for n in range(LINES):
        wanted = Submission(kind="llm", model="m", params=b"\x80", tenant="t", idempotency_key=f"{batch.id}/{n}")
        store.note_items(batch.id, [BatchItem(n, (await queue.submit(wanted)).id)])
    for record, _ in store.claim([ANY]):
        assert store.accept(record.id, record.attempt, "w")
        store.complete(record.id, record.attempt, "w", DONE)
    end = "completed" if state == "finalizing" else ""
    saved = store.save_batch(msgspec.structs.replace(batch, state=state, end=end, total=LINES))
    assert saved is not None
    return saved


@pytest.mark.parametrize("state", ["finalizing", "cancelling"])
async def test_another_replica_that_ends_a_batch_at_any_step_of_ours_takes_nothing_away(
    store: SqliteStore, blobs: FolderBlobs, state: BatchState
) -> None:
    for at in itertools.count(1):
        batch = await answered(store, blobs, state)

        def other(batch: BatchRecord = batch) -> None:
            trio.run(runner(store, blobs)._step, look(store, batch))

        ours = Meanwhile(store, at, other)
        await runner(ours, blobs)._guarded(batch)
        done = look(store, batch)
        assert (done.ended, done.completed) == (True, LINES)
        lines = lines_of(store, blobs, done.output_file)
        assert [line["custom_id"] for line in lines] == [f"c{n}" for n in range(LINES)]
        files = store.list_files("t", 10)
        assert {file.id for file in files} == {done.input_file, done.output_file}
        assert {path.name for path in (blobs.path(files[0].blob).parent).iterdir()} == {file.blob for file in files}
        for file in files:
            store.remove_file(file.id, "t")
            blobs.delete("", (file.blob,))
        if ours.calls < at:
            assert at > 3, "the batch took fewer steps than it can"
            return


async def test_a_full_queue_only_delays(store: SqliteStore, blobs: FolderBlobs) -> None:
    batch = await begin(store, blobs)
    ran: Counter[str] = Counter()
    queue = Queue(store, room=3)
    batches = runner(store, blobs, queue, open_lines=100)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, store, ran)
            nursery.start_soon(batches.run)
            await until(lambda: store.batch_counts(batch.id) == {"succeeded": 3})
            assert look(store, batch).state == "in_progress"
            queue._room = 100
            await until(lambda: look(store, batch).ended)
            nursery.cancel_scope.cancel()
    whole(store, blobs, look(store, batch), ran)


async def stopped(store: SqliteStore, batches: Batches, batch: BatchRecord, act: Callable[[], Any]) -> BatchRecord:
    """Nobody works; when two lines wait, `act`, and wait for the end."""
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batches.run)
            await until(lambda: store.batch_counts(batch.id) == {"queued": 2})
            await act()
            await until(lambda: bool(store.expire(0)) or look(store, batch).ended)
            await until(lambda: look(store, batch).ended)
            nursery.cancel_scope.cancel()
    return look(store, batch)


async def test_what_does_not_fit_the_window_is_an_error(store: SqliteStore, blobs: FolderBlobs) -> None:
    batch = await begin(store, blobs)

    async def a_day_later() -> None:
        store.shift_clock(86_400_000)

    ended = await stopped(store, runner(store, blobs), batch, a_day_later)
    assert (ended.state, ended.completed, ended.failed, ended.output_file) == ("expired", 0, LINES, "")
    assert {line["error"]["code"] for line in lines_of(store, blobs, ended.error_file)} == {"batch_expired"}


async def test_cancel(store: SqliteStore, blobs: FolderBlobs) -> None:
    batch = await begin(store, blobs)
    batches = runner(store, blobs)

    async def cancel() -> None:
        now = await batches.cancel(batch.id, "t")
        assert now is not None
        assert now.state == "cancelling"

    ended = await stopped(store, batches, batch, cancel)
    assert (ended.state, ended.failed) == ("cancelled", LINES)
    assert {line["error"]["code"] for line in lines_of(store, blobs, ended.error_file)} == {"batch_cancelled"}
    assert await batches.cancel(batch.id, "somebody else") is None


async def test_output_goes_when_it_was_to_go(store: SqliteStore, blobs: FolderBlobs) -> None:
    batch = await begin(store, blobs, keep_s=60)
    ended = await live(store, runner(store, blobs), batch, Counter())
    file = store.get_file(ended.output_file, "t")
    assert file is not None
    assert file.expires_ms - file.created_ms == 60_000
    store.shift_clock(61_000)
    await KeptFiles(store, blobs).purge()
    assert not blobs.path(file.blob).exists()
