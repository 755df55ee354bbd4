"""A fake child for tests under a virtual clock: the real wire, no process.

`FakeEngines` is a drop-in for `open_child`: `open_host(…, means=fake_means(FakeEngines(script)))`. The script is an
async function that plays the engine's work: it reads messages and sends answers, and may sleep (virtual time), die,
or hang. Like a real engine's I/O thread, the fake answers pings by itself, unless it is `deaf_to_ping`; and it writes
its stacks when asked, unless it is `deaf_to_dump`.
The fake passes the same contract tests as a real child does (tests/supervisor/host/test_child_contract.py).
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
from protocol.revision import ENGINE_WIRE
from supervisor.host.child import ChildSpec, Exit
from supervisor.host.containment.base import UNKILLABLE_AFTER_S
from supervisor.host.means import Means
from supervisor.host.senses import Senses
from supervisor.host.watchdog import STRIKE_S, STRIKES, Diagnosis, Facts


class Died(Exception):
    """Raised by a script to die: `raise Died(signal=11)` or `raise Died(code=1)`."""

    def __init__(self, code: int | None = None, signal: int | None = None) -> None:
        self.exit = Exit(code=code, signal=signal)


class FakeChild:
    """Looks like `Child` to the host; `inbox` and `send` are the script's side."""

    def __init__(self, spec: ChildSpec, pid: int) -> None:
        self.spec, self.pid = spec, pid
        self.exit: Exit | None = None
        self.signals: list[int] = []
        self.killed_because = ""
        self.force = ""
        self.stuck_pid = 0
        self.gone = trio.Event()
        self.on_late_death: Callable[[Exit], None] = lambda _how: None
        self.deaf_to_term = False
        self.deaf_to_kill = False
        self.deaf_to_ping = False
        self.deaf_to_dump = False
        self.lines: list[str] = []
        self._decoder = FrameDecoder()
        self._ended = trio.Event()
        self._out_send, self._out = trio.open_memory_channel[bytes](10_000)
        self._in_send, self.inbox = trio.open_memory_channel[wire.DownMessage](10_000)

    # ---- the script's side

    def send(self, message: wire.Up) -> None:
        """Put a frame on the pipe."""
        self.send_bytes(b"".join(bytes(part) for part in wire.encode(message)))

    def send_bytes(self, data: bytes) -> None:
        """Put raw bytes on the pipe."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._out_send.send_nowait(data)

    def say(self, line: str) -> None:
        """Write a line to stderr."""
        self.lines.append(line)
        if self.spec.on_stderr_line is not None:
            self.spec.on_stderr_line(line)

    def close_stdout(self) -> None:
        """Close the pipe and live on."""
        self._out_send.close()

    def die(self, how: Exit) -> None:
        """End the process; one that was abandoned as unkillable dies late."""
        if self.gone.is_set():
            return
        self.gone.set()
        if self.exit is not None:
            self.on_late_death(how)
        self._finish(how)

    def _finish(self, how: Exit) -> None:
        if self.exit is None:
            self.exit = how
            self._out_send.close()
            self._in_send.close()
            self._ended.set()

    # ---- the host's side

    async def write(self, *buffers: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.exit is not None:
            raise BrokenPipeError("the fake is dead")
        for part in buffers:
            self._decoder.feed(part)
        for frame in self._decoder:
            message = wire.decode_down(frame)
            if not isinstance(message, wire.Ping):
                self._in_send.send_nowait(message)
            elif not self.deaf_to_ping:
                self.send(wire.Pong(n=message.n))

    def close_stdin(self) -> None:
        self._in_send.close()

    async def read(self, max_bytes: int = 2**18) -> bytes:
        try:
            return await self._out.receive()
        except trio.EndOfChannel:
            return b""

    def stderr_tail(self, lines: int = 40) -> list[str]:
        return self.lines[-lines:]

    def signal(self, number: int) -> None:
        self.signals.append(number)
        deaf = {signal.SIGKILL: self.deaf_to_kill, signal.SIGTERM: self.deaf_to_term}
        if not deaf.get(signal.Signals(number), True):
            self.die(Exit(signal=number))

    def signal_group(self, number: int) -> None:
        self.signal(number)

    def dump_stacks(self) -> bool:
        if self.exit is not None:
            return False
        self.signals.append(signal.SIGUSR2)
        if not self.deaf_to_dump:
            for line in ("Current thread 0x00007f00 (most recent call first):", '  File "fake.py", line 1 in work'):
                self.say(line)
        return True

    def kill(self, why: str) -> None:
        if self.exit is None:
            self.killed_because = self.killed_because or why
            self.signal_group(signal.SIGKILL)

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def end(self, grace_s: float) -> Exit:
        with trio.CancelScope(shield=True):
            if self.exit is None and not self.killed_because:
                self.signal_group(signal.SIGTERM)
                with trio.move_on_after(grace_s):
                    await self._ended.wait()
            if self.exit is None:
                self.signal_group(signal.SIGKILL)
                with trio.move_on_after(UNKILLABLE_AFTER_S):
                    await self._ended.wait()
            if self.exit is None:
                self.stuck_pid = self.pid
            self._finish(Exit())
        return await self.wait()


Script = Callable[[FakeChild], Awaitable[None]]


class FakeEngines:
    """Spawns fakes. `script` plays each; `children` are all that were ever spawned, in order."""

    def __init__(self, script: Script) -> None:
        self.children: list[FakeChild] = []
        self._script = script

    @contextlib.asynccontextmanager
    async def __call__(self, spec: ChildSpec, *, term_grace_s: float = 3.0) -> AsyncIterator[FakeChild]:
        child = FakeChild(spec, pid=10_000 + len(self.children))
        self.children.append(child)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._play, child)
            try:
                yield child
            finally:
                await child.end(term_grace_s)
                nursery.cancel_scope.cancel()

    async def _play(self, child: FakeChild) -> None:
        try:
            await self._script(child)
            child.die(Exit(code=0))
        except Died as death:
            child.die(death.exit)
        except (trio.EndOfChannel, trio.BrokenResourceError):
            child.die(Exit(code=0))


async def greet_and_load(child: FakeChild, *, slots: int = 1, load_s: float = 0.0) -> None:
    """The start of most scripts: hello, wait for load, take `load_s` for it, ready."""
    low, high = ENGINE_WIRE.low, ENGINE_WIRE.high
    child.send(wire.Hello(engine="fake", kinds=("llm",), low=low, high=high, pid=child.pid))
    assert isinstance(await child.inbox.receive(), wire.Load)
    await trio.sleep(load_s)
    child.send(wire.Ready(device="cpu", slots=slots))


async def echo(child: FakeChild) -> None:
    """A well-behaved script: every run ends at once with its own parameters as the result."""
    await greet_and_load(child)
    async for message in child.inbox:
        if isinstance(message, wire.Run):
            child.send(wire.Started(run=message.run))
            child.send(wire.Result(run=message.run, body=msgspec.Raw(bytes(message.params))))
        elif isinstance(message, wire.Shutdown):
            return


# ---- what is seen from outside


class FakeWatchdog:
    """Thinks what `diagnosis` says, and counts strikes by the virtual clock."""

    def __init__(self, _pid: int = 0) -> None:
        self.told: int | None = None
        self.gpu_share: float | None = None
        self.on_gpu = False
        self.strikes = 0
        self.diagnosis = Diagnosis.WORKING
        self.calls: list[str] = []
        self._since: tuple[Diagnosis, float] | None = None

    def beat(self) -> None:
        self.calls.append("beat")

    def progress(self) -> None:
        self.calls.append("progress")

    def rest(self) -> None:
        self.calls.append("rest")

    def facts(self) -> Facts:
        return Facts()

    async def sample(self) -> Diagnosis:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        if self._since is None or self._since[0] is not self.diagnosis:
            self._since = (self.diagnosis, now)
        soft = self.diagnosis in (Diagnosis.WEDGED, Diagnosis.STOPPED)
        self.strikes = min(STRIKES, int((now - self._since[1]) / STRIKE_S)) if soft else 0
        return self.diagnosis


class FakeScratch:
    """A scratch folder that holds as much as `size_bytes` says."""

    def __init__(self, _folder: Path, limit_bytes: int, _pids: Callable[[], Iterable[int]]) -> None:
        self.size_bytes, self._limit = 0, limit_bytes

    @property
    def exceeded(self) -> bool:
        return self.size_bytes > self._limit

    def describe(self) -> str:
        return f"Its scratch folder holds {self.size_bytes} bytes."

    async def measure(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.size_bytes


FAKE_SENSES = Senses(
    watchdog=FakeWatchdog,
    members=lambda _pid: [],
    rss_bytes=lambda _pid: 0,
    scratch=FakeScratch,
    oom_kills=lambda: None,
)


async def remove_now(folder: Path) -> None:
    """Without a thread: a real thread makes a virtual clock jump."""
    await trio.lowlevel.checkpoint()
    shutil.rmtree(folder, ignore_errors=True)


def fake_means(engines: FakeEngines, *, senses: Senses = FAKE_SENSES, **more: Any) -> Means:
    """Means for a test under a virtual clock; `more` are further fields of them."""
    chosen: dict[str, Any] = {"jitter": lambda: 0.5, "wall": trio.current_time, "remove": remove_now, **more}
    return Means(spawn=engines, senses=senses, **chosen)
