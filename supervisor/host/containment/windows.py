"""Windows: a Job Object holds the family together and ends with our last handle to it.

Theory of operation. Each child has a job of its own with KILL_ON_JOB_CLOSE and without a right to break away: when
this process dies, by whatever means, Windows closes the handle and kills every process of the job, so the job is the
lifeline. A process is created suspended, assigned, checked to be in, and only then resumed: nothing of it has run
outside. (Between creation and assignment our own death would leave it behind, suspended for ever; only
PROC_THREAD_ATTRIBUTE_JOB_LIST would close that gap of microseconds, and the interpreter's binding does not know it.)

What a job cannot do is said, not hidden: files and network stay open (`unavailable`), and UI limits are refused where
the supervisor itself already runs in a job (a nested job may have none), as in most terminals and services.

The interpreter of a venv is a small program that starts the real one: the leader is then the parent of the engine.
Both are in the job.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import trio

from supervisor.host.containment import windows_api as api
from supervisor.host.containment.base import ChildSpec, Exit
from supervisor.host.containment.windows_pipe import PIPE_BYTES, OverlappedReader, OverlappedWriter

log = logging.getLogger(__name__)

# A fork bomb ends here; the largest honest family (a server engine with its workers) has a few dozen.
MAX_PROCESSES = 256
# The exit code that our own kill leaves, so that it can be told from everything else: "customer" bit, error, 9.
KILLED = 0xE000_0009
_SIGKILL, _SIGTERM = 9, 15
# NTSTATUS codes of crashes, as the signals that the rest of the program knows. signal.Signals lacks some here.
_CRASHES = {
    0xC000_0005: 11,  # access violation
    0xC000_00FD: 11,  # stack overflow
    0xC000_001D: 4,  # illegal instruction
    0xC000_0094: 8,  # integer division by zero
    0xC000_0409: 6,  # fail fast: abort()
    0xC000_013A: _SIGTERM,  # CTRL_BREAK at its default
    KILLED: _SIGKILL,
}


def exit_of(code: int) -> Exit:
    """An exit code of Windows, as an `Exit`."""
    number = _CRASHES.get(code & 0xFFFF_FFFF)
    return Exit(code=code) if number is None else Exit(signal=number)


def limits(memory_bytes: int, processes: int = MAX_PROCESSES) -> api.ExtendedLimits:
    """What every job of ours is held to; `memory_bytes` 0 sets no ceiling."""
    value = api.ExtendedLimits()
    flags = api.LIMIT_KILL_ON_JOB_CLOSE | api.LIMIT_DIE_ON_UNHANDLED_EXCEPTION | api.LIMIT_ACTIVE_PROCESS
    value.BasicLimitInformation.ActiveProcessLimit = processes
    if memory_bytes:
        flags |= api.LIMIT_JOB_MEMORY
        value.JobMemoryLimit = memory_bytes
    value.BasicLimitInformation.LimitFlags = flags
    return value


def creation_flags(*, has_console: bool) -> int:
    """CTRL_BREAK reaches only who shares our console; without one, no window may appear either.

    With CREATE_NO_WINDOW a child gets an invisible console of its own, and GenerateConsoleCtrlEvent then claims
    success and does nothing (microsoft/terminal#335).
    """
    flags = api.CREATE_SUSPENDED | api.CREATE_NEW_PROCESS_GROUP
    return flags if has_console else flags | api.CREATE_NO_WINDOW


def command_line(argv: tuple[str, ...], which: Callable[[str], str | None] = shutil.which) -> str:
    """argv as one string, quoted as the C runtime takes it apart again.

    The program is made absolute: CreateProcess would look in the current folder first.

    Raises:
        FileNotFoundError: no such program.
    """
    program = argv[0] if os.path.isabs(argv[0]) else which(argv[0])
    if program is None or not os.path.exists(program):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    return subprocess.list2cmdline([program, *argv[1:]])


class Job:
    """One Job Object."""

    def __init__(self, kernel: api.Kernel32, memory_bytes: int = 0) -> None:
        self._kernel = kernel
        self._wanted = limits(memory_bytes)
        self._handle = kernel.create_job()
        self.ui_limited = not kernel.in_job(api.CURRENT_PROCESS, None)
        try:
            kernel.set_job(self._handle, api.INFO_EXTENDED_LIMIT, self._wanted)
            if self.ui_limited:
                kernel.set_job(self._handle, api.INFO_BASIC_UI_RESTRICTIONS, api.UiRestrictions(api.UI_ALL))
        except BaseException:
            self.close()
            raise

    def take(self, process: int) -> None:
        """Put a process in, and make sure that it is in."""
        self._kernel.assign(self._handle, process)
        if not self._kernel.in_job(process, self._handle):
            raise OSError(errno.EPERM, "the process is not in its job")

    def verdict(self) -> str:
        """Ask Windows what this job is really held to."""
        found = api.ExtendedLimits()
        self._kernel.query_job(self._handle, api.INFO_EXTENDED_LIMIT, found)
        flags = found.BasicLimitInformation.LimitFlags
        wrong = []
        if not flags & api.LIMIT_KILL_ON_JOB_CLOSE:
            wrong.append("survives us")
        if flags & (api.LIMIT_BREAKAWAY_OK | api.LIMIT_SILENT_BREAKAWAY_OK):
            wrong.append("may be left")
        if found.BasicLimitInformation.ActiveProcessLimit != self._wanted.BasicLimitInformation.ActiveProcessLimit:
            wrong.append("no process limit")
        if found.JobMemoryLimit != self._wanted.JobMemoryLimit:
            wrong.append("no memory limit")
        return f"partial({', '.join(wrong)})" if wrong else "verified"

    def processes(self) -> int:
        """How many are alive in it."""
        found = api.Accounting()
        self._kernel.query_job(self._handle, api.INFO_BASIC_ACCOUNTING, found)
        return int(found.ActiveProcesses)

    def kill(self) -> None:
        """End all in it."""
        if self._handle:
            self._kernel.terminate_job(self._handle, KILLED)

    def close(self) -> bool:
        """Let go of it: Windows ends what is left in it. False when it was let go of before."""
        handle, self._handle = self._handle, 0
        if handle:
            self._kernel.close(handle)
        return bool(handle)


class WindowsLeash:
    """A process handle, its job and three pipes."""

    def __init__(self, kernel: api.Kernel32, spec: ChildSpec, is_over: Callable[[], bool]) -> None:
        self._kernel = kernel
        self._has_console = kernel.has_console()
        self._reaped = False
        command = command_line(spec.argv)
        with contextlib.ExitStack() as undo:
            self._job = Job(kernel, spec.memory_bytes)
            undo.callback(self._job.close)  # also kills a process that was started and cannot be taken further
            theirs: list[int] = []
            ours: list[int] = []
            for reads in (False, True, True):
                mine, its = kernel.pipe(ours_reads=reads, size=PIPE_BYTES)
                undo.callback(kernel.close, mine)
                ours.append(mine)
                theirs.append(its)
            try:
                started = kernel.create_process(
                    command,
                    creation_flags(has_console=self._has_console),
                    spec.env,
                    None if spec.cwd is None else str(spec.cwd),
                    api.startup_info(*theirs),
                )
            finally:
                for handle in theirs:
                    kernel.close(handle)
            self._process, self.pid = started.process, started.pid
            self._set_running(started)
            self.stdin = OverlappedWriter(kernel, ours[0])
            self.stdout = OverlappedReader(kernel, ours[1], is_over)
            self.stderr = OverlappedReader(kernel, ours[2], is_over)
            undo.pop_all()

    def _set_running(self, started: api.Started) -> None:
        try:
            self._job.take(started.process)
            self._kernel.resume(started.thread)
        except BaseException:
            with contextlib.suppress(OSError):  # it may not be in the job: then nothing else would end it
                self._kernel.terminate_process(started.process, KILLED)
            self._kernel.close(started.process)
            raise
        finally:
            self._kernel.close(started.thread)

    async def wait_dead(self) -> None:
        """Wait for the process handle, in a thread that trio keeps for it."""
        if sys.platform == "win32":
            await trio.lowlevel.WaitForSingleObject(self._process)

    def reap(self) -> Exit:
        """End what the leader left in its job, and take its exit code."""
        with contextlib.suppress(OSError):
            self._job.kill()
        self._job.close()
        self._reaped = True
        how = exit_of(self._kernel.exit_code(self._process))
        self._kernel.close(self._process)
        return how

    def signal(self, number: int) -> None:
        """There are no signals: 9 ends the leader, 15 asks, everything else is dropped."""
        if number == _SIGKILL and not self._reaped:
            with contextlib.suppress(OSError):
                self._kernel.terminate_process(self._process, KILLED)
        elif number == signal.SIGTERM:
            self.terminate()

    def signal_group(self, number: int) -> None:
        """The same for the whole job."""
        if number == _SIGKILL:
            self.kill_members()
        elif number == signal.SIGTERM:
            self.terminate()

    def terminate(self) -> bool:
        """CTRL_BREAK, where the child shares our console."""
        if self._reaped or not self._has_console:
            return False
        try:
            self._kernel.press_break(self.pid)
        except OSError:
            return False
        return True

    def dump_stacks(self) -> bool:
        """Nothing can ask a Python on Windows for its stacks."""
        return False

    def kill_family(self) -> bool:
        """TerminateJobObject."""
        if self._reaped:
            return False
        try:
            self._job.kill()
        except OSError as error:
            log.warning("job of pid %d: %s", self.pid, error)
            return False
        return True

    def kill_members(self) -> None:
        """The same, and the leader by itself."""
        self.kill_family()
        self.signal(_SIGKILL)

    def stuck_pid(self) -> int:
        """The leader."""
        return self.pid

    def cut_lifeline(self) -> bool:
        """Close the job: Windows ends all in it."""
        return self._job.close()

    def close(self) -> None:
        """Let go of the pipes and the job. The process handle stays with who waits for it."""
        self._job.close()
        self.stdin.close()
        self.stdout.close()
        self.stderr.close()


class Windows:
    """The backend."""

    name = "windows"

    def __init__(self, kernel: api.Kernel32 | None = None) -> None:
        self._kernel = kernel or api.Kernel32()

    def spawn(self, spec: ChildSpec, is_over: Callable[[], bool]) -> WindowsLeash:
        """Start a child.

        Raises:
            OSError: also when descriptors shall be passed, which Windows does not have, or when it cannot be held in a
                job: a child that nothing would end is not started.
        """
        if spec.pass_fds:
            raise OSError(errno.ENOTSUP, f"{spec.name}: descriptors cannot be passed to a child on Windows")
        return WindowsLeash(self._kernel, spec, is_over)

    def verdicts(self) -> dict[str, str]:
        """Of a job made for the question; each child's own is checked when it is started."""
        found = {"job": "", "ui": "", "files": "unavailable", "network": "unavailable"}
        try:
            job = Job(self._kernel, memory_bytes=2**30)
            try:
                found["job"] = job.verdict()
                found["ui"] = "claimed" if job.ui_limited else "unavailable(we run in a job)"
            finally:
                job.close()
        except OSError as error:
            found["job"] = found["ui"] = f"unavailable({error.strerror})"
        return found

    def facts(self) -> dict[str, str]:
        """Nothing more to tell."""
        return {"platform": "windows"}
