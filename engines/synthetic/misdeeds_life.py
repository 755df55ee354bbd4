"""Misdeeds of an engine with its own life: dying and hanging. For engines/synthetic/misbehave.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from engines.runtime.contract import Job
from protocol import work

# Orphans and sleepers end by themselves after this long, so that a failed test leaves nothing behind.
LONGEST_S = 120
TICK_S = 0.005


# ---- dying


def crash(name: str) -> NoReturn:
    """Die of a signal as native code would: a real bad access, a real abort, else the signal itself."""
    if name == "SIGSEGV":
        ctypes.string_at(0)
    elif name == "SIGABRT":
        os.abort()
    number = signal.Signals[name]
    with contextlib.suppress(OSError, ValueError):
        ctypes.CDLL(None).signal(int(number), 0)  # SIG_DFL; signal.signal works on the main thread alone
    os.kill(os.getpid(), number)
    time.sleep(LONGEST_S)
    os._exit(99)


def _crash_run(job: Job, argument: str) -> str:
    crash(argument or "SIGSEGV")


def _crash_after_chunks(job: Job, argument: str) -> str:
    for number in range(int(argument or 3)):
        job.emit(work.LlmChunk(delta=work.Delta(content=f"{number} ")))
    crash("SIGSEGV")


def _exit(job: Job, argument: str) -> str:
    os._exit(int(argument or 1))


def _raise(job: Job, argument: str) -> str:
    raise RuntimeError(argument or "raised, as asked")


# ---- hanging


def hang(job: Job, argument: str) -> str:
    """No progress, deaf to cancel, but the GIL is free: pongs still come."""
    time.sleep(float(argument or LONGEST_S))
    return "woke"


def _hang_gil(job: Job, argument: str) -> str:
    """Sleep in C with the GIL held: no pong, no Python signal handler, nothing. PyDLL keeps the GIL."""
    ctypes.PyDLL(None).sleep(int(argument or LONGEST_S))
    return "woke"


def _deadlock(job: Job, argument: str) -> str:
    """Two threads, two locks, taken in opposite order."""
    left, right, both_hold_one = threading.Lock(), threading.Lock(), threading.Barrier(2)

    def take(first: threading.Lock, second: threading.Lock) -> None:
        with first:
            both_hold_one.wait()
            second.acquire(timeout=LONGEST_S)

    threading.Thread(target=take, args=(left, right), daemon=True).start()
    take(right, left)
    return "untangled"


def _spin(job: Job, argument: str) -> str:
    """Burn a CPU for so many seconds without progress."""
    until = time.monotonic() + float(argument or LONGEST_S)
    while time.monotonic() < until:
        pass
    return "spun"


def _stop(job: Job, argument: str) -> str:
    """Stop the whole process, as a debugger or a full cgroup freezer would."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)  # the kernel stops another thread first: this one would get its answer out before its turn comes
    return "continued"


def _progress(job: Job, argument: str) -> str:
    """Progress without end; obeys cancel."""
    for n in range(1, int(LONGEST_S / TICK_S)):
        job.progress(n, None, "decode")
        if job.cancelled.wait(TICK_S):
            job.check_cancelled()
    return "done"


def _deaf(job: Job, argument: str) -> str:
    """Progress and chunks for so many seconds, deaf to cancel."""
    until = time.monotonic() + float(argument or LONGEST_S)
    n = 0
    while time.monotonic() < until:
        n += 1
        job.progress(n, None, "decode")
        job.emit(work.LlmChunk(delta=work.Delta(content="still here ")))
        time.sleep(TICK_S)
    return "done"


def _ignore_term(job: Job, argument: str) -> str:
    """From now on SIGTERM does nothing; the run itself hangs."""
    ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN
    return hang(job, argument)


MISDEEDS: dict[str, Callable[[Job, str], str]] = {
    "crash": _crash_run,
    "crash-after": _crash_after_chunks,
    "exit": _exit,
    "raise": _raise,
    "hang": hang,
    "hang-gil": _hang_gil,
    "deadlock": _deadlock,
    "spin": _spin,
    "stop": _stop,
    "progress": _progress,
    "cancel-raises": _progress,
    "deaf": _deaf,
    "ignore-term": _ignore_term,
}
