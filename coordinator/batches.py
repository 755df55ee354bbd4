"""Works off batches: reads a batch's file, queues its requests a few at a time, writes its output at the end.

The store is the truth and every step can be taken twice: a line's job carries the line's number as its idempotency
key, what became of a line is noted once, and the batch itself changes only for who saw its latest version, its output
with it. So a coordinator that was killed goes on where it was, and two replicas that work on one batch do no harm: who
wrote an output in vain deletes that, and nothing else.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import BinaryIO, NamedTuple

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.batch_lines import MAX_LINES, parse_line, planned, read_lines, written, wrong_lines
from coordinator.blobs.base import Blobs
from coordinator.dispatch import Dispatcher
from coordinator.kept_files import MAX_OUTPUT_BYTES, KeptFiles, new_file_id
from coordinator.logs import trouble
from coordinator.records import Submission
from coordinator.store import Store, StoreError
from coordinator.store.shelf import BatchItem, BatchRecord, BatchState, FileRecord
from coordinator.store.threads import StoreThreads
from protocol.faults import Fault, FaultError
from protocol.ids import RANDOM_BYTES, new_id

log = logging.getLogger(__name__)

PRIORITY = -10  # below whatever a person waits for
MAX_ERRORS = 50
PAGE = 64
_OPEN = ("queued", "running")
_END: Mapping[str, BatchState] = {"completed": "completed", "expired": "expired", "cancelled": "cancelled"}
_BUSY = frozenset({"overloaded", "storage_full", "rate_limited"})  # not the line's fault: its turn comes later

# Inside the class `list` is the method.
Records = list[BatchRecord]
Items = list[BatchItem]
Files = list[FileRecord]


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables.

    Attributes:
        poll_s: pause between two looks at the batches.
        open_lines: jobs of one batch that are queued or running at once.
        window_s: time until a batch expires.
        retention_s: how long batches that ended are listed.
    """

    poll_s: float = 0.5
    open_lines: int = 256
    window_s: float = 86_400.0
    retention_s: float = 30 * 86_400.0


class _Place(NamedTuple):
    """Where reading goes on: the number of the next line, and its byte."""

    n: int = 0
    offset: int = 0


class Batches:
    """See the module. `run` does the work; the rest is what the routes need."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        blobs: Blobs,
        files: KeptFiles,
        settings: BatchSettings | None = None,
    ) -> None:
        self.settings = settings or BatchSettings()
        self._store, self._dispatcher, self._blobs, self._files = store, dispatcher, blobs, files
        self._threads = StoreThreads()
        self._places: dict[str, _Place] = {}
        self._bell = anyio.Event()
        self.on_end: Callable[[], None] = lambda: None  # called when a batch may have ended

    # ---- for routes ----------------------------------------------------------------------------------------

    async def create(self, batch: BatchRecord) -> BatchRecord:
        """Make a batch. Raises FaultError: not_found without its file, storage_full."""
        made = await self._threads.write(self._store.add_batch, batch, int(self.settings.window_s * 1000))
        self._bell.set()
        return made

    async def get(self, batch_id: str, tenant: str) -> BatchRecord | None:
        """The tenant's batch, with the counts of this moment."""
        batch = await self._threads.read(self._store.get_batch, batch_id, tenant)
        return await self._counted(batch) if batch is not None else None

    async def list(self, tenant: str, limit: int, after: str = "") -> Records:
        """The tenant's newest batches behind the one with the id `after`."""
        batches = await self._threads.read(self._store.list_batches, tenant, limit, after)
        return [await self._counted(batch) for batch in batches]

    async def cancel(self, batch_id: str, tenant: str) -> BatchRecord | None:
        """Begin to cancel; a batch that has ended, or is being written already, stays as it is."""
        while (batch := await self._threads.read(self._store.get_batch, batch_id, tenant)) is not None:
            if batch.state not in ("validating", "in_progress"):
                return await self._counted(batch)
            if (saved := await self._save(batch, "cancelling")) is not None:
                self._bell.set()
                return await self._counted(saved)
        return None

    async def _counted(self, batch: BatchRecord) -> BatchRecord:
        if batch.ended or batch.state == "validating":
            return batch
        counts = await self._threads.read(self._store.batch_counts, batch.id)
        failed = sum(counts.get(state, 0) for state in ("failed", "cancelled", "refused"))
        return msgspec.structs.replace(batch, completed=counts.get("succeeded", 0), failed=failed)

    # ---- the work ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. Trouble with the store or the disk is logged and tried again."""
        purge_at = 0.0
        while True:
            self._bell = anyio.Event()
            try:
                for batch in await self._threads.read(self._store.open_batches):
                    now = await self._threads.read(self._store.get_batch, batch.id, batch.tenant)
                    if now is not None and not now.ended:  # another replica may have been at it since
                        await self._guarded(now)
                if anyio.current_time() >= purge_at:
                    purge_at = anyio.current_time() + 60.0
                    await self._files.purge()
                    await self._threads.write(self._store.purge_batches, int(self.settings.retention_s * 1000))
            except (StoreError, FaultError, OSError) as error:
                trouble(log, error, "Batches wait after trouble with the store")
            with anyio.move_on_after(self.settings.poll_s):
                await self._bell.wait()

    async def _guarded(self, batch: BatchRecord) -> None:
        """One batch's trouble must not stop the others."""
        try:
            await self._step(batch)
        except (StoreError, FaultError, OSError) as error:
            trouble(log, error, f"The batch {batch.id} waits after trouble")

    async def _step(self, batch: BatchRecord) -> None:
        """Take a batch as far as it goes now."""
        now_ms = await self._threads.read(self._store.now_ms)
        match batch.state:
            case "validating":
                await self._validate(batch)
            case "in_progress":
                over = now_ms >= batch.expires_ms
                if over or await self._queue(batch, now_ms):
                    await self._close(batch, "expired" if over else "completed")
            case "cancelling":
                await self._close(batch, "cancelled")
            case "finalizing":  # in an earlier life, or its disk was full
                await self._finish(batch)

    async def _validate(self, batch: BatchRecord) -> None:
        """Check every line's envelope; nothing is queued before all of them are good."""
        errors: list[tuple[int, Fault]] = []
        seen: set[str] = set()
        place, models = _Place(), set[str]()
        while True:
            lines, offset = await run_sync(read_lines, self._source(batch), place.offset, PAGE)
            if not lines:
                break
            errors += await run_sync(_wrong, lines, place.n, batch.endpoint, seen, models)
            place = _Place(place.n + len(lines), offset)
            if place.n > MAX_LINES:
                errors = [(0, Fault("invalid_request", f"A batch has at most {MAX_LINES} lines."))]
            if len(errors) >= MAX_ERRORS or place.n > MAX_LINES:
                break
        if not place.n:
            errors = [(0, Fault("invalid_request", "The input file has no lines."))]
        if errors:
            await self._fail(batch, tuple(errors[:MAX_ERRORS]))
            return
        model = models.pop() if len(models) == 1 else ""
        await self._save(msgspec.structs.replace(batch, total=place.n, model=model), "in_progress")
        self._bell.set()

    async def _fail(self, batch: BatchRecord, errors: tuple[tuple[int, Fault], ...]) -> None:
        await self._save(msgspec.structs.replace(batch, errors=errors), "failed")
        self.on_end()

    # ---- queueing ------------------------------------------------------------------------------------------

    async def _queue(self, batch: BatchRecord, now_ms: int) -> bool:
        """Queue what there is room for; True when every line has ended."""
        counts = await self._threads.read(self._store.batch_counts, batch.id)
        known, open_lines = sum(counts.values()), sum(counts.get(state, 0) for state in _OPEN)
        if known >= batch.total:
            return open_lines == 0
        room = self.settings.open_lines - open_lines
        place = self._places.get(batch.id, _Place())
        if place.n != known:
            place = await self._seek(batch, known)
        while room > 0 and place.n < batch.total:
            lines, offset = await run_sync(read_lines, self._source(batch), place.offset, min(PAGE, room))
            items = await self._submit(batch, lines, place.n, batch.expires_ms - now_ms)
            await self._threads.write(self._store.note_items, batch.id, items)
            if len(items) < len(lines) or not lines:
                self._places.pop(batch.id, None)  # the queue is full: from the first line without a job, next time
                return False
            place = self._places[batch.id] = _Place(place.n + len(items), offset)
            room -= len(items)
        return False

    def _source(self, batch: BatchRecord) -> Callable[[], BinaryIO]:
        return functools.partial(self._blobs.reader, batch.input_blob)

    async def _seek(self, batch: BatchRecord, n: int) -> _Place:
        """The place of line `n`, by reading all before it."""
        place = _Place()
        while place.n < n:
            count = min(PAGE, n - place.n)
            lines, offset = await run_sync(read_lines, self._source(batch), place.offset, count)
            if not lines:
                break
            place = _Place(place.n + len(lines), offset)
        return place

    async def _submit(self, batch: BatchRecord, lines: Sequence[bytes], first: int, left_ms: int) -> Items:
        """Queue lines in order, up to the first that the queue has no room for."""
        items: Items = []
        for n, raw in enumerate(lines, first):
            try:
                plan = planned(batch.endpoint, parse_line(raw, batch.endpoint).body)
                submission = Submission(
                    kind=plan.kind,
                    model=plan.model,
                    params=msgspec.msgpack.encode(plan.params),
                    tenant=batch.tenant,
                    key_id=batch.key_id,
                    idempotency_key=f"{batch.id}/{n}",
                    priority=PRIORITY,
                    deadline_ms=max(1, left_ms),
                    wait_for_worker=True,
                )
                record = await self._dispatcher.submit(submission)
                items.append(BatchItem(n, record.id))
            except FaultError as error:
                if error.fault.code in _BUSY:
                    break
                items.append(BatchItem(n, fault=error.fault))
        return items

    # ---- the end -------------------------------------------------------------------------------------------

    async def _close(self, batch: BatchRecord, end: BatchState) -> None:
        """End what still runs, then write the output."""
        if end == "cancelled":
            await self._cancel_jobs(batch)
        counts = await self._threads.read(self._store.batch_counts, batch.id)
        if any(counts.get(state) for state in _OPEN):
            return  # past the window: the deadline of these jobs is the batch's, so the next look finds them ended
        if end == "cancelled":
            await self._finish(msgspec.structs.replace(batch, end=end))
        elif saved := await self._save(msgspec.structs.replace(batch, end=end), "finalizing"):
            await self._finish(saved)

    async def _cancel_jobs(self, batch: BatchRecord) -> None:
        first = 0
        while found := await self._threads.read(self._store.batch_items, batch.id, first, PAGE):
            for _, job in found:
                if job is not None and not job.ended:
                    await self._dispatcher.cancel(job.id, batch.tenant, "the batch was cancelled")
            first = found[-1][0].n + 1

    async def _finish(self, batch: BatchRecord) -> None:
        """Write output and error file, and end the batch with them, unless another replica has done so meanwhile."""
        tally, files, saved = _Tally(), list[FileRecord](), None
        try:
            output = await self._write(batch, tally, files, good=True)
            errors = await self._write(batch, tally, files, good=False)
            done = msgspec.structs.replace(
                batch,
                output_file=output,
                error_file=errors,
                completed=tally.good,
                failed=tally.bad,
                usage=tally.usage,
            )
            saved = await self._save(done, _END[batch.end], files)
        finally:
            if saved is None:
                for file in files:
                    await self._files.drop(file)
        self.on_end()
        self._places.pop(batch.id, None)

    async def _write(self, batch: BatchRecord, tally: _Tally, files: Files, *, good: bool) -> str:
        """Write one of the two files, for `files`; returns its id, "" when it would be empty."""
        word = "output" if good else "error"
        async with aclosing(self._written(batch, tally, good)) as lines:
            first = await anext(lines, None)
            if first is None:
                return ""

            async def data() -> AsyncGenerator[bytes, None]:
                yield first
                async for line in lines:
                    yield line

            record = FileRecord(
                id=new_file_id(),
                tenant=batch.tenant,
                name=f"{batch.id}_{word}.jsonl",
                purpose="batch_output",
                blob="",
                size=0,
                sha256="",
            )
            async with aclosing(data()) as body:
                files.append(await self._files.receive(body, record, MAX_OUTPUT_BYTES, bounded=False))
        return record.id

    async def _written(self, batch: BatchRecord, tally: _Tally, good: bool) -> AsyncGenerator[bytes, None]:
        """The lines of one of the two files. Memory holds a page at a time."""
        place = _Place()
        while place.n < batch.total:
            lines, offset = await run_sync(read_lines, self._source(batch), place.offset, PAGE)
            if not lines:
                return
            found = await self._threads.read(self._store.batch_items, batch.id, place.n, len(lines))
            known = {item.n: (item, job) for item, job in found}
            for n, raw in enumerate(lines, place.n):
                item, job = known.get(n, (None, None))
                line = await run_sync(written, batch.id, batch.endpoint, n, raw, item, job, _END[batch.end])
                if line.good == good:
                    tally.note(good, job.usage if job is not None else {})
                    yield line.data
            place = _Place(place.n + len(lines), offset)

    async def _save(
        self, batch: BatchRecord, state: BatchState, files: Sequence[FileRecord] = ()
    ) -> BatchRecord | None:
        return await self._threads.write(self._store.save_batch, msgspec.structs.replace(batch, state=state), files)


class _Tally:
    """What the lines of a batch came to."""

    def __init__(self) -> None:
        self.good = self.bad = 0
        self.usage: dict[str, float] = {}

    def note(self, good: bool, usage: dict[str, float]) -> None:
        if good:
            self.good += 1
        else:
            self.bad += 1
        for name, value in usage.items():
            self.usage[name] = self.usage.get(name, 0) + value


def new_batch_id() -> str:
    """A fresh id."""
    return new_id("batch", int(time.time() * 1000), os.urandom(RANDOM_BYTES))


def _wrong(lines: list[bytes], first: int, endpoint: str, seen: set[str], models: set[str]) -> list[tuple[int, Fault]]:
    wrong = list(wrong_lines(lines, first, endpoint, seen))
    if not wrong and len(models) < 2:
        names = {parse_line(line, endpoint).body.get("model") for line in lines}
        models |= {name for name in names if isinstance(name, str)}
    return wrong
