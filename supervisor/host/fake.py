"""A fake child for tests under a virtual clock: the real wire, no process.

`FakeEngines` is a drop-in for `open_child`: `open_host(…, spawn=FakeEngines(script))`. The script is an async
function that plays the engine: it reads messages and sends answers, and may sleep (virtual time), die, or hang.
The fake passes the same contract tests as a real child does (tests/supervisor/host/test_child_contract.py).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
from protocol.revision import ENGINE_WIRE
from supervisor.host.child import ChildSpec, Exit


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
        self.gone = trio.Event()
        self.on_late_death: Callable[[Exit], None] = lambda _how: None
        self.stack_dumps = 0
        self.deaf_to_term = False
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

    def die(self, how: Exit) -> None:
        """End the process."""
        if self.exit is None:
            self.exit = how
            self.gone.set()
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
            self._in_send.send_nowait(wire.decode_down(frame))

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
        if number == signal.SIGKILL or (number == signal.SIGTERM and not self.deaf_to_term):
            self.die(Exit(signal=number))

    def signal_group(self, number: int) -> None:
        self.signal(number)

    def dump_stacks(self) -> bool:
        if self.exit is not None:
            return False
        self.stack_dumps += 1
        return True

    def kill(self, why: str) -> None:
        if self.exit is None:
            self.killed_because = why
            self.signal(signal.SIGKILL)

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def end(self, grace_s: float) -> Exit:
        with trio.CancelScope(shield=True):
            if self.exit is None:
                self.signal_group(signal.SIGTERM)
                with trio.move_on_after(grace_s):
                    await self._ended.wait()
            if self.exit is None:
                self.signal_group(signal.SIGKILL)
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
