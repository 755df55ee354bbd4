"""What the host relies on in a child, asked of the real one and of the shipped fake alike."""

from __future__ import annotations

import signal
import sys
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
from supervisor.host.child import ChildSpec, Exit, open_child
from supervisor.host.fake import Died, FakeChild, FakeEngines

GREETING = b"".join(wire.encode(wire.Hello(engine="fake", kinds=("llm",), low=1, high=1, pid=1)))


async def script(child: FakeChild) -> None:
    """Greets, dies of SIGSEGV on a cancel, ends on shutdown; pings are answered for it."""
    child.send_bytes(GREETING)
    async for message in child.inbox:
        match message:
            case wire.Cancel():
                raise Died(signal=signal.SIGSEGV)
            case wire.Shutdown():
                return


# The same engine as a real program, driven by raw bytes so that it needs no engine module.
PROGRAM = """
import faulthandler, os, signal, sys
sys.path.insert(0, {root!r})
faulthandler.register(signal.SIGUSR2)
from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
decoder = FrameDecoder()
def say(message): os.write(1, b"".join(wire.encode(message)))
say(wire.Hello(engine="fake", kinds=("llm",), low=1, high=1, pid=1))
while data := os.read(0, 65536):
    decoder.feed(data)
    for frame in decoder:
        message = wire.decode_down(frame)
        if isinstance(message, wire.Ping): say(wire.Pong(n=message.n))
        if isinstance(message, wire.Cancel): os.kill(os.getpid(), 11)
        if isinstance(message, wire.Shutdown): sys.exit(0)
"""


def real(**more: object) -> AbstractAsyncContextManager:
    from supervisor.host.launching import ROOT

    spec = ChildSpec(name="real", argv=(sys.executable, "-c", PROGRAM.format(root=str(ROOT))), **more)
    return open_child(spec, term_grace_s=2)


def fake(**more: object) -> AbstractAsyncContextManager:
    return FakeEngines(script)(ChildSpec(name="fake", argv=(), **more), term_grace_s=2)


@pytest.fixture(params=[real, fake], ids=["real", "fake"])
def opened(request):
    return request.param()


async def receive(child) -> wire.UpMessage:
    decoder = FrameDecoder()
    with trio.fail_after(60):
        while data := await child.read():
            decoder.feed(data)
            for frame in decoder:
                return wire.decode_up(frame)
    raise EOFError


async def send(child, message: wire.Down) -> None:
    await child.write(*wire.encode(message))


async def test_frames_go_both_ways(opened):
    async with opened as child:
        assert isinstance(await receive(child), wire.Hello)
        await send(child, wire.Ping(n=7))
        assert await receive(child) == wire.Pong(n=7)
        assert child.exit is None
        assert child.pid > 0


async def test_a_polite_end(opened):
    async with opened as child:
        await receive(child)
        await send(child, wire.Shutdown())
        with trio.fail_after(60):
            assert await child.wait() == Exit(code=0)
        assert await child.read() == b""


async def test_a_crash_is_its_signal_and_the_pipe_is_broken(opened):
    async with opened as child:
        await receive(child)
        await send(child, wire.Cancel(run=1))
        with trio.fail_after(60):
            assert await child.read() == b""
            assert await child.wait() == Exit(signal=signal.SIGSEGV)
        with pytest.raises(BrokenPipeError):
            await send(child, wire.Ping())


async def test_end_escalates_and_may_be_asked_twice(opened):
    async with opened as child:
        await receive(child)
        assert await child.end(2) == Exit(signal=signal.SIGTERM)
        assert await child.end(2) == Exit(signal=signal.SIGTERM)
        child.signal(signal.SIGKILL)  # nothing to hit any more


async def test_closing_stdin_is_the_end_of_input(opened):
    async with opened as child:
        await receive(child)
        child.close_stdin()
        with trio.fail_after(60):
            assert await child.wait() == Exit(code=0)


async def test_leaving_the_block_ends_it(opened):
    async with opened as child:
        await receive(child)
    assert child.exit == Exit(signal=signal.SIGTERM)


async def test_kill_ends_it_at_once_and_keeps_the_first_reason(opened):
    async with opened as child:
        await receive(child)
        assert not child.gone.is_set()
        child.kill("it leaks")
        child.kill("another reason")
        with trio.fail_after(60):
            assert await child.wait() == Exit(signal=signal.SIGKILL)
            await child.gone.wait()
        assert child.killed_because == "it leaks"


async def test_kill_after_the_end_changes_nothing(opened):
    async with opened as child:
        await receive(child)
        await child.end(2)
        child.kill("too late")
        assert child.killed_because == ""
        assert child.exit == Exit(signal=signal.SIGTERM)
        assert child.dump_stacks() is False


@pytest.mark.parametrize("start", [real, fake])
async def test_a_stack_dump_comes_on_stderr_line_by_line_and_ends_nothing(start):
    lines: list[str] = []
    whole = trio.Event()

    def line(text: str) -> None:
        lines.append(text)
        if text.startswith('  File "'):
            whole.set()

    async with start(on_stderr_line=line) as child:
        await receive(child)
        assert child.dump_stacks() is True
        with trio.fail_after(60):
            await whole.wait()
        assert any("most recent call first" in text for text in lines)
        assert child.stderr_tail()[: len(lines)] == lines
        await send(child, wire.Ping(n=3))
        assert await receive(child) == wire.Pong(n=3)
