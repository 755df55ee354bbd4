"""One child process, from spawn to reaped. Every child of ours is one of these; they differ only in data.

Theory of operation. The platform's backend (containment/) spawns and gives a leash; here is what is the same
everywhere: who waits for what, and for how long at most. Three parties share a child: the reaper, which waits for the
death and is the only one to reap; the escalation, which asks, waits, kills, and is cancelled by the exit; and the
drain, which always empties stderr so that a chatty child cannot block. The child leads a session of its own, and
signals go to its whole group. Just before the leader is reaped (its pid cannot be reused until then) the rest of the
group is killed.

`kill` ends the whole family now: the platform's container (cgroup, warden, job) does it in milliseconds, and if it
does not within `WARDEN_S`, the group and every known member are killed one by one. A process that outlives even
that is stuck in the kernel: its handle is abandoned and `exit` says so, but a task outside the block keeps waiting,
and `gone` tells when it is dead after all.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from supervisor.host import containment
from supervisor.host.containment.base import UNKILLABLE_AFTER_S, ChildSpec, Containment, Exit, signal_name
from supervisor.host.share import Share

log = logging.getLogger(__name__)

# How long the drain may go on after the exit; what the child wrote is in the pipe, so this is only a bound.
LAST_WORDS_S = 1.0
# A warden needs a few milliseconds from the lifeline's end to the death of the last of the family.
WARDEN_S = 2.0
MAX_STDERR_LINE_BYTES = 8192


class Child:
    """A running (or ended) child. Made by `open_child` only.

    Attributes:
        exit: how it ended; None while it runs.
        killed_because: the first reason that `kill` was given; "" when it was not killed by us.
        stuck_pid: the process that could not be killed, which need not be the leader; 0 when there is none.
        gone: set when the process is dead and reaped, even if long after it was abandoned as unkillable.
        on_late_death: called once when an abandoned process has died after all, on the trio thread.
    """

    def __init__(self, spec: ChildSpec, backend: Containment) -> None:
        self.spec = spec
        self.exit: Exit | None = None
        self.killed_because = ""
        self.stuck_pid = 0
        self.gone = trio.Event()
        self.on_late_death: Callable[[Exit], None] = lambda _how: None
        self._leash = backend.spawn(spec, self._is_over)
        self.pid = self._leash.pid
        self._ended = trio.Event()
        self._kill_asked = trio.Event()
        self.force = ""  # the hardest that was used to end it: SIGTERM, SIGKILL, "unkillable"; "" for a word
        self._lines: collections.deque[str] = collections.deque(maxlen=spec.stderr_lines)
        # Shielded: a cancelled block still needs its reaper and its child's last words.
        self._background = trio.CancelScope(shield=True)

    def _is_over(self) -> bool:
        return self.exit is not None

    # ---- talking

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write to stdin; see `PipeWriter.write`."""
        await self._leash.stdin.write(*buffers)

    def close_stdin(self) -> None:
        """Let the child read the end of its input."""
        self._leash.stdin.close()

    async def read(self, max_bytes: int = 2**18) -> bytes:
        """Read from stdout; b"" when it is closed, or drained after the child's death."""
        return await self._leash.stdout.read(max_bytes)

    def stderr_tail(self, lines: int = 40) -> list[str]:
        """The latest lines of stderr."""
        return list(self._lines)[-lines:]

    # ---- ending

    def signal(self, number: int) -> None:
        """Send a signal to the leader alone; nothing when it is gone."""
        if self.exit is None:
            self._leash.signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the child's whole process group; nothing when it is gone."""
        if self.exit is None:
            self._leash.signal_group(number)

    def dump_stacks(self) -> bool:
        """Ask the engine for its stacks on stderr (evidence before an end).

        False when the child was not asked: it is gone, or has not yet taken the signal and would be killed by it.
        """
        return self.exit is None and self._leash.dump_stacks()

    def cut_lifeline(self) -> bool:
        """Let the child's warden kill its whole family; False when there is no lifeline (any more)."""
        return self._leash.cut_lifeline()

    def kill(self, why: str) -> None:
        """End the whole family now, without a grace. Returns at once; `wait` tells the end, within bounded time.

        Args:
            why: kept as `killed_because`; the first reason counts.
        """
        if self.exit is not None:
            return
        self.killed_because = self.killed_because or why
        if not self._kill_asked.is_set():
            self._kill_asked.set()
            self._strike()

    def _strike(self) -> None:
        self.force = "SIGKILL"
        if not self._leash.kill_family():
            self._leash.kill_members()

    async def wait(self) -> Exit:
        """Wait for the end. Cancellation: only the waiting ends."""
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def end(self, grace_s: float) -> Exit:
        """Escalate: SIGTERM, at most `grace_s`, the container's kill, at most `WARDEN_S`, SIGKILL, then abandon.

        Cancellation: shielded; bounded by `grace_s` + `WARDEN_S` + `UNKILLABLE_AFTER_S`.
        """
        with trio.CancelScope(shield=True):
            if self.exit is None and not self._kill_asked.is_set() and self._leash.terminate():
                self.force = "SIGTERM"
                await self._ended_within(grace_s)
            if self.exit is None and not self._kill_asked.is_set():
                self._strike()
            await self._force()
        assert self.exit is not None
        return self.exit

    async def _force(self) -> None:
        """After `_strike`: give the container its time, kill one by one, give the kernel its time, abandon."""
        await self._ended_within(WARDEN_S)
        if self.exit is None:
            self._leash.kill_members()
            await self._ended_within(UNKILLABLE_AFTER_S)
        if self.exit is None:
            self.stuck_pid = self._leash.stuck_pid()
            self.force = "unkillable"
            log.error("%s (pid %d) cannot be killed; its handle is abandoned", self.spec.name, self.stuck_pid)
            self._finish(Exit())

    async def _ended_within(self, patience_s: float) -> None:
        if self.exit is None:
            with trio.move_on_after(patience_s):
                await self._ended.wait()

    # ---- tasks of open_child

    async def _attend(self) -> None:
        """Reap and drain until both are done, or until `_background` is given up."""
        with self._background:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain_stderr)
                nursery.start_soon(self._obey_kill)
                await self._reap()

    async def _obey_kill(self) -> None:
        """Take a `kill` to its bounded end, whoever waits or does not."""
        async with trio.open_nursery() as nursery:

            async def until_over() -> None:
                await self._ended.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_over)
            await self._kill_asked.wait()
            nursery.start_soon(self._force)

    async def _reap(self) -> None:
        await self._leash.wait_dead()
        how = self._leash.reap()
        self.gone.set()
        self._finish(how)

    def _finish(self, how: Exit) -> None:
        if self.exit is None:
            self.exit = how
            self._leash.stdout.wake()
            self._leash.stderr.wake()
            self._ended.set()

    async def _outlive(self) -> None:
        """A system task: wait for the death of an abandoned process, long after its block was left."""
        try:
            await self._leash.wait_dead()
            how = self._leash.reap()
            log.warning("%s (pid %d), abandoned as unkillable, is dead at last", self.spec.name, self.stuck_pid)
            self.gone.set()
            self.on_late_death(how)
        except Exception:  # a system task must not raise: it would end the supervisor
            log.exception("watching the abandoned %s (pid %d) failed", self.spec.name, self.pid)

    async def _drain_stderr(self) -> None:
        rest, share = b"", Share()
        while data := await self._leash.stderr.read():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._line(line)
                await share.give_way()
            if len(rest) > MAX_STDERR_LINE_BYTES:
                self._line(rest)
                rest = b""
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        text = line[:MAX_STDERR_LINE_BYTES].decode(errors="replace").rstrip()
        self._lines.append(text)
        if self.spec.on_stderr_line is not None:
            try:
                self.spec.on_stderr_line(text)
            except Exception:  # or the child would have no reaper any more
                log.exception("a line that %s wrote on stderr could not be passed on", self.spec.name)


@contextlib.asynccontextmanager
async def open_child(
    spec: ChildSpec, *, term_grace_s: float = 3.0, backend: Containment | None = None
) -> AsyncIterator[Child]:
    """Start a child; leaving the block ends and reaps it, whatever happened inside.

    Args:
        backend: how to start it; the platform's own unless a test brings another.

    Raises:
        OSError: the program cannot be started (missing, not executable, no memory).

    Cancellation: the block is cancelled as usual; the end of the child is shielded and bounded by
    `term_grace_s` + `WARDEN_S` + `UNKILLABLE_AFTER_S`.
    """
    # This is trio's main thread, the one that PDEATHSIG follows.
    child = Child(spec, backend or containment.backend())
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
        if not child.gone.is_set():
            trio.lowlevel.spawn_system_task(child._outlive, name=f"outlives {spec.name}")
        child._leash.close()


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
