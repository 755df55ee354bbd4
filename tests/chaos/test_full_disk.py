"""The disk is full at every write of the road in turn: nobody crashes, nothing acknowledged is lost, and it says why.

The worker is whole but for its engine: link, ledger, outbox and store are real, and each of their writes is counted;
from the n-th on there is no room, until there is again. In CI a sample of n, from a seed that is printed with them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from supervisor.host.ground import Ground
from supervisor.link import keeping as keepings
from supervisor.link import outbox as outboxes
from supervisor.link.keeping import OnDisk
from supervisor.link.outbox import Outbox
from supervisor.store import Connection, connect, open_store
from supervisor.testing import FakePeer
from tests.supervisor.link.test_worker import CHAT, Rig, rig
from tests.supervisor.power import Disk

SEED = int(os.environ.get("BULKHEAD_CHAOS_SEED", "1"))
EVERY = "BULKHEAD_CHAOS_JOBS" in os.environ
CLIP = b"clip" * 5_000
LONG = "x" * 70_000  # too long to go inline
BODIES: dict[str, dict[str, str]] = {"file": {"t": "a"}, "long": {"t": LONG}, "fault": {}, "short": {"t": "c"}}
SAMPLE = 8
PATIENCE_S = 60.0
log = logging.getLogger(__name__)


class Ration:
    """So many writes, then none until `more`."""

    def __init__(self, left: float) -> None:
        self.left, self.made = left, 0

    def spent(self) -> bool:
        """Count a write; whether there is no room for it."""
        self.made += 1
        self.left -= 1
        return self.left < 0

    def spend(self) -> None:
        """The same for a file: raises OSError."""
        if self.spent():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def out(self) -> bool:
        """Whether a write was refused."""
        return self.left < 0

    def more(self) -> None:
        """There is room again."""
        self.left = float("inf")


class RationedDisk(Disk):
    """SQLite's file system, each of whose writes counts."""

    def __init__(self, ration: Ration) -> None:
        super().__init__(SEED)
        self._ration = ration

    def full(self, more: int) -> bool:
        """See `Disk`."""
        return self._ration.spent()


def ration_files(ration: Ration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder that the worker makes counts; a file that there is no room for is there in part."""

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: Path, *args: Any) -> None:
            if ration.spent():
                path.write_bytes(b"cl")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(path, *args)

        return write

    monkeypatch.setattr(outboxes, "_write", counted(outboxes._write))
    monkeypatch.setattr(outboxes, "_copy", counted(outboxes._copy))
    real_sync, real_open = outboxes.sync_folder, Ground.open_attempt

    def sync(folder: Path) -> None:
        ration.spend()
        real_sync(folder)

    def open_attempt(self: Ground, name: str) -> Any:
        ration.spend()
        return real_open(self, name)

    monkeypatch.setattr(outboxes, "sync_folder", sync)
    monkeypatch.setattr(Ground, "open_attempt", open_attempt)


class Life:
    """One life of a worker, and what its coordinator was told."""

    def __init__(self, made: Rig, keeping: OnDisk) -> None:
        self.made, self.keeping = made, keeping
        self.ends: dict[str, wire.Complete | wire.Fail | wire.Decline] = {}

    async def recovered(self) -> None:
        """Wait until nothing is in the way of more jobs."""
        changed = trio.Event()
        self.keeping.on_change = lambda: changed.set()
        with trio.fail_after(PATIENCE_S):
            while self.keeping.reason():
                await changed.wait()
                changed = trio.Event()

    async def road(self, peer: FakePeer, job: str, *, acknowledged: bool) -> None:
        """Offer a job, play its engine, and hear its end."""
        await peer.offer(job, 1, "llm", "chat", CHAT, upload="/up/{name}")
        self.made.transfer.taken.clear()
        answer = await first(peer, wire.Accept, wire.Decline)
        if isinstance(answer, wire.Decline):
            self.ends[job] = answer
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._play, job)  # an attempt without a folder never comes to its engine
            end = await first(peer, wire.Complete, wire.Fail)
            nursery.cancel_scope.cancel()
        self.ends[job] = end
        if isinstance(end, wire.Complete):
            self.judge(job, end)
        if acknowledged:
            await peer.send(wire.Ack(), job, 1)

    async def _play(self, job: str) -> None:
        run = await self.made.host.next_run()
        if job == "fault":
            run.fail("out_of_memory")
            return
        files = []
        if job == "file":
            try:
                (run.request.folder / "a.mp4").write_bytes(CLIP)
            except OSError:
                run.fail("worker_disk_full")
                return
            files = [OutputFile("a.mp4", "video/mp4", len(CLIP), hashlib.sha256(CLIP).hexdigest())]
        run.done(BODIES.get(job, {}), files)

    def judge(self, job: str, end: wire.Complete) -> None:
        """What was delivered is what the engine has made."""
        taken = self.made.transfer.taken
        body = taken[wire.RESULT_FILE] if end.inline is None else bytes(end.result)
        assert msgspec.msgpack.decode(body) == BODIES.get(job, {}), job
        assert ({"a.mp4": taken["a.mp4"]} if job == "file" else {}) == ({"a.mp4": CLIP} if job == "file" else {})


async def first(peer: FakePeer, *kinds: type[wire.Body]) -> Any:
    """The next of these; whatever comes before is passed over."""
    while True:
        body, _, _ = await peer.receive()
        if isinstance(body, kinds):
            return body


@contextlib.asynccontextmanager
async def life(folder: Path, connecting: Callable[[Path], Connection]) -> AsyncIterator[Life]:
    async with open_store(folder / "worker.db", connecting) as store:
        keeping = OnDisk(store, Outbox(folder / "outbox", 10**9))
        async with rig(folder, keeping) as made, trio.open_nursery() as nursery:
            nursery.start_soon(keeping.run)
            yield Life(made, keeping)
            nursery.cancel_scope.cancel()


async def lives(
    folder: Path, connecting: Callable[[Path], Connection], refused: Callable[[], bool], more: Callable[[], None]
) -> dict[str, Any]:
    """A life whose disk gets full, finds room again, and ends without the last acknowledgement; and the next one."""
    async with life(folder, connecting) as one:
        peer = await one.made.session()
        for job in BODIES:
            await one.road(peer, job, acknowledged=True)
        assert one.ends.keys() == BODIES.keys(), "every offer was answered, every claim ended"
        for job, end in one.ends.items():
            if isinstance(end, wire.Decline):
                assert (end.code, "full" in end.reason) == ("paused", True), (job, end)
                assert refused()
            elif isinstance(end, wire.Fail) and job != "fault":
                assert end.fault.may_retry, (job, end)
                assert refused()
        told = one.keeping.reason()
        assert not told or "full" in told, told
        more()
        await one.recovered()
        await one.road(peer, "short", acknowledged=True)
        assert isinstance(one.ends["short"], wire.Complete), "there is room again"
        await one.road(peer, "file", acknowledged=False)
        assert isinstance(one.ends["file"], wire.Complete)
    async with life(folder, connecting) as two:
        peer = await two.made.session()
        # A row whose deletion failed is told again; what was acknowledged then is acknowledged again.
        held = {claim.job for claim in peer.hello.held}
        assert "file" in held, "a result that was kept is still there"
        for _ in held:
            body, job, attempt = await ended(peer)
            if isinstance(body, wire.Complete):
                two.judge(job, body)
            await peer.send(wire.Ack(), job, attempt)
        with trio.fail_after(PATIENCE_S):
            await two.made.attempts.ledger.wait_empty()
    async with life(folder, connecting) as three:
        assert (await three.made.session()).hello.held == ()
        assert list((folder / "outbox").iterdir()) == []
    return one.ends


async def ended(peer: FakePeer) -> tuple[Any, str, int]:
    while True:
        body, job, attempt = await peer.receive()
        if isinstance(body, wire.Complete | wire.Fail):
            return body, job, attempt


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepings, "TRY_AGAIN_S", 0.01)


async def writes_of_the_road(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many there are when there is room."""
    ration = Ration(float("inf"))
    ration_files(ration, monkeypatch)
    made = 0
    async with life(folder, RationedDisk(ration).connect) as one:
        ration.made = 0
        peer = await one.made.session()
        for job in BODIES:
            await one.road(peer, job, acknowledged=True)
        assert all(isinstance(end, wire.Complete | wire.Fail) for end in one.ends.values())
        made = ration.made
    return made


async def test_the_disk_is_full_at_every_write_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        (tmp_path / "all").mkdir()
        whole = await writes_of_the_road(tmp_path / "all", patch)
    assert whole > len(BODIES) * 3
    log.info(
        "seed %d: the road has %d writes, of which %s", SEED, whole, "all are tried" if EVERY else f"{SAMPLE} are tried"
    )
    numbers = range(whole) if EVERY else sorted(random.Random(SEED).sample(range(whole), min(SAMPLE, whole)))
    for number in numbers:
        with monkeypatch.context() as patch:
            folder = tmp_path / str(number)
            folder.mkdir()
            ration = Ration(float("inf"))
            ration_files(ration, patch)
            disk = RationedDisk(ration)
            async with open_store(folder / "worker.db", disk.connect):
                pass  # the file is made while there is room
            ration.left = number
            try:
                await lives(folder, disk.connect, lambda ration=ration: ration.out, ration.more)
            except BaseException as error:
                error.add_note(f"seed {SEED}: the disk was full from write {number} of {whole} on")
                raise
            shutil.rmtree(folder)


# ---- a real file system ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs. Raises PermissionError where mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if done.returncode != 0:
        raise PermissionError(done.stderr.decode(errors="replace").strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("pages", [0, 1, 3, 9, 30] if not EVERY else range(80))
async def test_a_file_system_with_so_many_pages_left(tmp_path: Path, pages: int) -> None:
    try:
        with tiny_disk(tmp_path / "disk", "4m") as disk:
            async with open_store(disk / "worker.db", connect):
                pass
            ballast = disk / "ballast"

            def refused() -> bool:
                return True  # the file system says so itself

            fill(ballast, pages)
            await lives(disk, connect, refused, ballast.unlink)
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


def fill(ballast: Path, pages: int) -> None:
    """Take all room but so many pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(page))
        file.truncate(max(0, file.tell() - pages * page))
