"""One child process, from spawn to reaped. Every child of ours is one of these; they differ only in data.

Theory of operation. The child is spawned with `subprocess.Popen` from trio's main thread, never through
`trio.run_process`: that spawns from a pool thread, and a child that asked to die with its parent (PDEATHSIG
follows the *thread*) would be killed when the pool retires it after ten idle seconds. Three parties share a
child: the reaper, which waits on a pidfd and is the only one to reap; the escalation, which sends TERM, waits,
sends KILL, and is cancelled by the exit; and the drain, which always empties stderr so that a chatty child
cannot block. The child leads a session of its own, and signals go to its whole group. Just before the leader is
reaped (its pid cannot be reused until then) the rest of the group is killed.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import trio

from supervisor.host.pipe import PipeReader, PipeWriter

log = logging.getLogger(__name__)

# SIGKILL that has not worked after this long will not: the process is stuck in the kernel (D state).
UNKILLABLE_AFTER_S = 10.0
# How long the drain may go on after the exit; what the child wrote is in the pipe, so this is only a bound.
LAST_WORDS_S = 1.0
# A warden needs a few milliseconds from the lifeline's end to the death of the last of the family.
WARDEN_S = 2.0
MAX_STDERR_LINE_BYTES = 8192


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start.

    Attributes:
        name: for logs.
        env: the whole environment; None means ours.
        pass_fds: descriptors that stay open under the same numbers.
        lifeline: give the child the read end of a pipe whose other end only we hold, and its number as a last word of
            argv. Its end of file means that we are gone, or want the whole family of the child dead (warden.py).
        stderr_lines: how many of the latest stderr lines are kept as evidence.
        on_stderr_line: called for each line, on the trio thread; must not block.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    lifeline: bool = False
    stderr_lines: int = 200
    on_stderr_line: Callable[[str], None] | None = None


class Exit(msgspec.Struct, frozen=True):
    """How a child ended: an exit code, a signal, or neither when it could not be killed."""

    code: int | None = None
    signal: int | None = None

    @property
    def unkillable(self) -> bool:
        """Still there after SIGKILL; its handle was abandoned."""
        return self.code is None and self.signal is None

    def describe(self) -> str:
        """One phrase for people."""
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}"
        if self.code is not None:
            return f"ended with exit code {self.code}"
        return f"still there {UNKILLABLE_AFTER_S:.0f} s after SIGKILL"


def signal_name(number: int) -> str:
    """ "SIGSEGV" for 11; the number where the platform has no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Child:
    """A running (or ended) child. Made by `open_child` only."""

    def __init__(self, spec: ChildSpec, process: subprocess.Popen[bytes], lifeline: int = -1) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.spec = spec
        self.pid = process.pid
        self.exit: Exit | None = None
        self._process = process
        self._lifeline = lifeline
        self._ended = trio.Event()
        # The file objects would close the descriptors a second time: take the numbers out of them.
        self._stdin = PipeWriter(_detach(process.stdin))
        self._stdout = PipeReader(_detach(process.stdout), self._is_over)
        self._stderr = PipeReader(_detach(process.stderr), self._is_over)
        self._lines: collections.deque[str] = collections.deque(maxlen=spec.stderr_lines)
        # Shielded: a cancelled block still needs its reaper and its child's last words.
        self._background = trio.CancelScope(shield=True)

    def _is_over(self) -> bool:
        return self.exit is not None

    # ---- talking

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write to stdin; see `PipeWriter.write`."""
        await self._stdin.write(*buffers)

    def close_stdin(self) -> None:
        """Let the child read the end of its input."""
        self._stdin.close()

    async def read(self, max_bytes: int = 2**18) -> bytes:
        """Read from stdout; b"" when it is closed, or drained after the child's death."""
        return await self._stdout.read(max_bytes)

    def stderr_tail(self, lines: int = 40) -> list[str]:
        """The latest lines of stderr."""
        return list(self._lines)[-lines:]

    # ---- ending

    def signal(self, number: int) -> None:
        """Send a signal to the leader alone (SIGUSR2 for a stack dump, say); nothing when it is gone."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the child's whole process group; nothing when it is gone."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def cut_lifeline(self) -> bool:
        """Let the child's warden kill its whole family; False when there is no lifeline (any more)."""
        if self._lifeline < 0:
            return False
        os.close(self._lifeline)
        self._lifeline = -1
        return True

    async def wait(self) -> Exit:
        """Wait for the end. Cancellation: only the waiting ends."""
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def end(self, grace_s: float) -> Exit:
        """Escalate: SIGTERM, at most `grace_s`, the lifeline, SIGKILL, at most `UNKILLABLE_AFTER_S`, then abandon.

        Cancellation: shielded; bounded by the waits.
        """
        with trio.CancelScope(shield=True):
            if self.exit is None:
                self.signal_group(signal.SIGTERM)
                await self._ended_within(grace_s)
            # The warden reaches what has left the group; SIGKILL to the group would kill the warden first.
            if self.exit is None and self.cut_lifeline():
                await self._ended_within(WARDEN_S)
            if self.exit is None:
                self.signal_group(signal.SIGKILL)
                await self._ended_within(UNKILLABLE_AFTER_S)
            if self.exit is None:
                log.error("%s (pid %d) cannot be killed; its handle is abandoned", self.spec.name, self.pid)
                self._finish(Exit())
        assert self.exit is not None
        return self.exit

    async def _ended_within(self, patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            await self._ended.wait()

    # ---- tasks of open_child

    async def _attend(self) -> None:
        """Reap and drain until both are done, or until `_background` is given up."""
        with self._background:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reap)
                nursery.start_soon(self._drain_stderr)

    async def _reap(self) -> None:
        await _wait_dead(self._process)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # stragglers of the group; the zombie leader keeps the id ours
        code = self._process.wait()
        self._finish(Exit(signal=-code) if code < 0 else Exit(code=code))

    def _finish(self, how: Exit) -> None:
        if self.exit is None:
            self.exit = how
            self._stdout.wake()
            self._stderr.wake()
            self._ended.set()

    async def _drain_stderr(self) -> None:
        rest = b""
        while data := await self._stderr.read():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._line(line)
            if len(rest) > MAX_STDERR_LINE_BYTES:
                self._line(rest)
                rest = b""
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        text = line[:MAX_STDERR_LINE_BYTES].decode(errors="replace").rstrip()
        self._lines.append(text)
        if self.spec.on_stderr_line is not None:
            self.spec.on_stderr_line(text)

    def _close(self) -> None:
        self.cut_lifeline()
        self._stdin.close()
        self._stdout.close()
        self._stderr.close()


def _detach(file: object) -> int:
    fd = os.dup(file.fileno())  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
    return fd


async def _wait_dead(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process is a zombie or gone, without reaping it."""
    if hasattr(os, "pidfd_open"):
        pidfd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)
    else:  # macOS: waitid leaves the zombie in place
        await trio.to_thread.run_sync(
            lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT), abandon_on_cancel=True
        )


def _spawn(spec: ChildSpec) -> tuple[subprocess.Popen[bytes], int]:
    """Start it; returns the process and our end of its lifeline, -1 when it has none."""
    ours, argv = -1, spec.argv
    theirs: tuple[int, ...] = ()
    if spec.lifeline:
        theirs_fd, ours = os.pipe()
        theirs, argv = (theirs_fd,), (*argv, str(theirs_fd))
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if spec.env is None else dict(spec.env),
            cwd=spec.cwd,
            pass_fds=(*spec.pass_fds, *theirs),
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        if ours >= 0:
            os.close(ours)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    return process, ours


@contextlib.asynccontextmanager
async def open_child(spec: ChildSpec, *, term_grace_s: float = 3.0) -> AsyncIterator[Child]:
    """Start a child; leaving the block ends and reaps it, whatever happened inside.

    Raises:
        OSError: the program cannot be started (missing, not executable, no memory).

    Cancellation: the block is cancelled as usual; the end of the child is shielded and bounded by
    `term_grace_s` + `UNKILLABLE_AFTER_S`.
    """
    # This is trio's main thread, the one that PDEATHSIG follows; Popen costs it about 0.1 ms.
    child = Child(spec, *_spawn(spec))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child._attend)
            try:
                yield child
            finally:
                how = await child.end(term_grace_s)
                patience_s = 0.0 if how.unkillable else LAST_WORDS_S
                child._background.deadline = trio.current_time() + patience_s
    finally:
        child._close()


async def run_child(spec: ChildSpec, *, deadline_s: float, term_grace_s: float = 1.0) -> tuple[bytes, Exit, Child]:
    """Run a child that says something and ends: its stdout whole (<= 64 MiB), its end, and the child for stderr.

    A child that is not done after `deadline_s` is ended; its exit then tells the signal.
    """
    output = bytearray()
    async with open_child(spec, term_grace_s=term_grace_s) as child:
        child.close_stdin()
        with trio.move_on_after(deadline_s):
            while data := await child.read():
                output += data
                if len(output) > 64 * 2**20:
                    break
            await child.wait()
        await child.end(term_grace_s)
    assert child.exit is not None
    return bytes(output), child.exit, child


__all__: Sequence[str] = ("Child", "ChildSpec", "Exit", "open_child", "run_child", "signal_name")
