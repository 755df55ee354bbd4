"""Watches the GPUs through a child that may hang, die or talk nonsense; whatever it does stops nobody here.

Theory of operation. One task owns the reader (engines/telemetry/reader.py): it starts it, takes its lines, and starts
another one when it ends. What the child said last counts for `STALE_S`; after that the GPUs are *unknown*, which is
a value like any other, and the child is ended. A reader that is stuck in the driver cannot be killed (NVML goes into
uninterruptible sleep with it): it is abandoned, and no second one is sent after it until it is gone, because it would
only get stuck beside it.

    starting ──line──► fresh ──STALE_S without a line──► unknown ──reader ended, pause──► starting
        └── "there is no GPU" ──► none ──RECHECK_S, or asked──► starting

Readings come once a second. `wait_for` asks for more: it is how the return of memory is awaited, and it believes only
readings that were begun after its question.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil  # type: ignore[import-untyped]
import trio

from supervisor.host.child import ChildSpec, open_child
from supervisor.host.means import OpenChild
from supervisor.machine import readings as data
from supervisor.machine.readings import GpuEvent, GpuReading, NoGpu, Reading

log = logging.getLogger(__name__)

STALE_S = 5.0  # five missed readings
FIRST_LINE_S = 20.0  # a cold driver initialises for up to five seconds per GPU
RECHECK_S = 60.0  # a GPU may appear: a driver loaded late, an eGPU
ASK_AGAIN_S = 0.1
MAX_LINE_BYTES = 2**20  # a box with 16 GPUs and 256 processes on each needs 300 KiB
MAX_GARBAGE = 100  # lines in a row
KEPT_EVENTS = 50
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
TERM_GRACE_S = 0.5  # NVML holds no state of ours
_FOLDER = Path(__file__).resolve().parents[2] / "engines" / "telemetry"

OnReading = Callable[[Mapping[str, GpuReading]], None]
OnEvent = Callable[[GpuEvent], None]


def reader_argv(interval_s: float = 1.0) -> tuple[str, ...]:
    """The real reader."""
    return (sys.executable, "-I", str(_FOLDER / "reader.py"), "--interval", f"{interval_s:g}")


def simulated_argv(script: Path, allocations: Path | None = None, interval_s: float = 1.0) -> tuple[str, ...]:
    """A reader without a GPU; see engines/telemetry/simulated.py."""
    folder = ("--allocations", str(allocations)) if allocations is not None else ()
    program = str(_FOLDER / "simulated.py")
    return (sys.executable, "-I", program, "--script", str(script), *folder, "--interval", f"{interval_s:g}")


class _End(NamedTuple):
    """How a reader ended: with readings given, saying that there is no GPU, stuck for good (its pid)."""

    good: bool = False
    none: bool = False
    stuck: int = 0


class GpuWatch:
    """The GPUs as they were last seen. `run` is its only task; everything else only looks, or asks.

    Args:
        argv: of another reader that keeps the contract of engines/telemetry/line.py.
        spawn: `open_child`, or a fake.
        jitter: a number in [0, 1).
    """

    def __init__(
        self,
        argv: tuple[str, ...] | None = None,
        *,
        stale_s: float = STALE_S,
        first_line_s: float = FIRST_LINE_S,
        recheck_s: float = RECHECK_S,
        spawn: OpenChild = open_child,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._argv = argv or reader_argv()
        self._stale_s, self._first_line_s, self._recheck_s = stale_s, first_line_s, recheck_s
        self._spawn, self._jitter = spawn, jitter
        self._latest: Reading | None = None
        self._read_at = -math.inf
        self._by_uuid: dict[str, GpuReading] = {}
        self._none: NoGpu | None = None
        self._reason = "The GPUs have not been read yet."
        self._numbers = itertools.count(1)
        self._child: Any = None
        self._news = trio.Event()
        self._over = False
        self._bell = trio.Event()
        self._events: collections.deque[tuple[float, GpuEvent]] = collections.deque(maxlen=KEPT_EVENTS)
        self._subscribers: dict[int, tuple[OnReading | None, OnEvent | None]] = {}
        self.restarts = 0
        self.garbage = 0

    # ---- looking

    def age_s(self) -> float:
        """Seconds since the last reading; infinite before the first."""
        return trio.current_time() - self._read_at

    @property
    def fresh(self) -> bool:
        """Whether what was read last still counts."""
        return self.age_s() < self._stale_s

    @property
    def available(self) -> bool:
        """Whether there is a GPU and its state is known."""
        return self.fresh and bool(self._by_uuid)

    @property
    def no_gpu(self) -> bool:
        """Whether it is known that there is none."""
        return self._none is not None

    @property
    def reason(self) -> str:
        """Why nothing is known, in one sentence; "" when something is."""
        if self._none is not None:
            return f"There is no GPU: {self._none.error or 'none is listed'}."
        return "" if self.available else self._reason

    @property
    def driver(self) -> str:
        """Version of the driver; "" when unknown."""
        return self._latest.driver if self._latest is not None else ""

    @property
    def events_missing(self) -> str:
        """Why this driver tells no events; "" when it does, or nothing is known."""
        return self._latest.events if self._latest is not None else ""

    def readings(self) -> Mapping[str, GpuReading]:
        """Every GPU by UUID; empty when unknown or when there is none. Those that cannot tell a UUID are left out."""
        return self._by_uuid if self.fresh else {}

    def device(self, uuid: str) -> data.Device | None:
        """One GPU or MIG device; None when unknown."""
        return data.device(self.readings(), uuid)

    def free_bytes(self, uuid: str) -> int | None:
        """Free memory; None when unknown."""
        found = self.device(uuid)
        return None if found is None else found.memory_free_bytes

    def used_by(self, pids: Iterable[int]) -> dict[str, int]:
        """Bytes that these processes hold, by GPU or MIG device."""
        return data.used_by(self.readings(), pids)

    def foreign_bytes(self, uuid: str, own_pids: Iterable[int], own_bytes: int = 0) -> int | None:
        """Bytes that are not ours; None when unknown. Arguments as `readings.foreign_bytes`."""
        found = self.device(uuid)
        return None if found is None else data.foreign_bytes(found, own_pids, own_bytes)

    def utilisation(self, uuid: str) -> float | None:
        """How busy a GPU is, 0 to 1; None when unknown (also for MIG devices)."""
        found = self.readings().get(uuid)
        return None if found is None else found.busy

    def recent_events(self, within_s: float, uuid: str = "") -> list[GpuEvent]:
        """Events of the last `within_s`, of one GPU or of all: evidence beside an engine's end."""
        since = trio.current_time() - within_s
        return [event for at, event in self._events if at >= since and (not uuid or event.uuid in ("", uuid))]

    # ---- asking

    def subscribe(self, on_reading: OnReading | None = None, on_event: OnEvent | None = None) -> Callable[[], None]:
        """Be told of every reading and event; returns what ends it.

        `on_reading` is called with {} once when the GPUs become unknown or turn out to be none. Both are called on
        the trio thread and must not block; what they raise ends `run`.
        """
        number = next(self._numbers)
        self._subscribers[number] = (on_reading, on_event)
        return lambda: self._subscribers.pop(number, None) and None

    def look_again(self) -> None:
        """Read now, also when there was no GPU a moment ago."""
        self._bell.set()

    async def wait_for(self, predicate: Callable[[Mapping[str, GpuReading]], bool], deadline_s: float) -> bool:
        """Wait until a reading that was begun after this call satisfies `predicate`.

        Returns:
            False when `deadline_s` passed first, or when the GPUs stayed unknown for as long; at once when it is
            known that there is no GPU, or when `run` has ended.

        Cancellation: nothing but the waiting ends.
        """
        first = number = next(self._numbers)
        with trio.move_on_after(deadline_s):
            while not (self.no_gpu or self._over):
                news = self._news
                await self._ask(number)
                with trio.move_on_after(ASK_AGAIN_S):
                    await news.wait()
                latest = self._latest
                if self.fresh and latest is not None and latest.asked >= first and predicate(self._by_uuid):
                    return True
                number = next(self._numbers)
        return False

    async def wait_known(self, deadline_s: float) -> bool:
        """Wait until something is known about the GPUs (that there is none, too); False when `deadline_s` passed."""
        with trio.move_on_after(deadline_s):
            while not (self.no_gpu or self.available):
                await self._news.wait()
            return True
        return False

    async def _ask(self, number: int) -> None:
        if self._child is None:
            return
        try:
            with trio.move_on_after(ASK_AGAIN_S):  # a reader that hangs reads no questions either
                await self._child.write(b"read %d\n" % number)
        except (OSError, trio.ClosedResourceError):
            return

    # ---- the task

    async def run(self) -> None:
        """Own readers, one after the other, until cancelled. Cancellation: the reader is ended and reaped."""
        try:
            await self._keep_reading()
        finally:
            self._over = True
            self._news.set()  # whoever waits for a reading: there will be none

    async def _keep_reading(self) -> None:
        failures = 0
        while True:
            end = await self._one_reader()
            if end.none:
                failures = 0
                await self._rest(self._recheck_s)
                continue
            self._none = None
            self.restarts += 1
            failures = 1 if end.good else failures + 1
            pause = min(FIRST_PAUSE_S * 2.0 ** (failures - 1), LONGEST_PAUSE_S) * (0.75 + 0.5 * self._jitter())
            log.warning("%s Another reader starts in %.1f s.", self._reason, pause)
            await self._rest(pause)
            if end.stuck:
                await self._outlive(end.stuck)

    async def _one_reader(self) -> _End:
        """One reader from start to end."""
        try:
            async with self._spawn(ChildSpec(name="gpu reader", argv=self._argv), term_grace_s=TERM_GRACE_S) as child:
                self._child = child
                try:
                    end = await self._listen(child)
                finally:
                    self._child = None
                if not self.fresh:
                    self._forget()  # now, and not when the reader is dead at last
        except OSError as error:
            self._reason = f"The GPU reader cannot be started: {error}."
            return _End()
        if child.exit is not None and child.exit.unkillable:
            self._reason = f"The GPU reader (pid {child.pid}) hangs in the driver and cannot be killed."
            return end._replace(stuck=child.pid)
        return end

    async def _listen(self, child: Any) -> _End:
        """Take lines until there is a reason to end this reader; says it in `_reason`."""
        lines, good, garbage = _Lines(child), False, 0
        with trio.CancelScope(deadline=trio.current_time() + self._first_line_s) as patience:
            while line := await lines.next():
                try:
                    spoken = data.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    garbage += 1
                    self._note_garbage(line, error)
                    if garbage > MAX_GARBAGE:
                        self._reason = "The GPU reader talks nonsense."
                        return _End(good=good)
                    continue
                garbage = 0
                self._take(spoken)
                if isinstance(spoken, NoGpu):
                    return _End(none=True)
                if isinstance(spoken, Reading):
                    good = True
                    patience.deadline = trio.current_time() + self._stale_s
            self._reason = await _last_words(child)
            return _End(good=good)
        self._reason = "The GPU reader is silent: the driver hangs."
        return _End(good=good)

    def _note_garbage(self, line: bytes, error: Exception) -> None:
        self.garbage += 1
        if self.garbage == 1:
            log.warning("the GPU reader wrote a line that is none (%s): %r", error, line[:200])

    def _take(self, spoken: data.Spoken) -> None:
        if isinstance(spoken, Reading):
            self._latest, self._read_at, self._none = spoken, trio.current_time(), None
            self._by_uuid = {gpu.uuid: gpu for gpu in spoken.gpus if gpu.uuid}
            self._tell(self._by_uuid)
        elif isinstance(spoken, GpuEvent):
            log.warning("GPU %s: %s %s", spoken.uuid or "(unnamed)", spoken.kind, spoken.xid or spoken.text)
            self._events.append((trio.current_time(), spoken))
            for _on_reading, on_event in list(self._subscribers.values()):
                if on_event is not None:
                    on_event(spoken)
        else:
            self._none = spoken
            self._forget()

    def _forget(self) -> None:
        known, self._by_uuid = bool(self._by_uuid), {}
        self._read_at = -math.inf
        if known or self._none is not None:
            self._tell({})

    def _tell(self, readings: Mapping[str, GpuReading]) -> None:
        news, self._news = self._news, trio.Event()
        news.set()
        for on_reading, _on_event in list(self._subscribers.values()):
            if on_reading is not None:
                on_reading(readings)

    async def _rest(self, pause_s: float) -> None:
        """Pause until it is over or somebody wants to know; old readings are forgotten when they go stale."""
        with trio.move_on_after(pause_s):
            if self._by_uuid and pause_s > (left := self._stale_s - self.age_s()):
                with trio.move_on_after(max(0.0, left)):
                    await self._bell.wait()
                if not self._bell.is_set():
                    self._forget()
            await self._bell.wait()
        self._bell = trio.Event()

    async def _outlive(self, pid: int) -> None:
        """Wait until a process that could not be killed is gone: another reader would get stuck as well."""
        self._forget()
        while _is_there(pid):  # noqa: ASYNC110 - it is not ours to wait for any more
            await trio.sleep(STALE_S)


def _is_there(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class _Lines:
    """Lines of a child, without their ends and without empty ones."""

    def __init__(self, child: Any) -> None:
        self._child = child
        self._whole: collections.deque[bytes] = collections.deque()
        self._rest = b""

    async def next(self) -> bytes:
        """The next line; b"" at the child's end, or when a line has none. Cancellation: nothing is lost."""
        while not self._whole:
            if len(self._rest) > MAX_LINE_BYTES:
                log.warning("the GPU reader writes a line without end")
                return b""
            if not (chunk := await self._child.read()):
                return b""
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._whole.extend(line for line in lines if line.strip())
        return self._whole.popleft()


async def _last_words(child: Any) -> str:
    with trio.move_on_after(TERM_GRACE_S):
        await child.wait()
    if child.exit is None:
        return "The GPU reader writes no lines any more."
    said = " ".join(child.stderr_tail(2))
    return f"The GPU reader {child.exit.describe()}{f' ({said})' if said else ''}."
