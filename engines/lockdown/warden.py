"""The process that holds an engine's leash, and the first process of its pid namespace.

Theory of operation. The supervisor's child is the warden, outside every namespace. It forks the first process of the
namespaces, which forks the one that becomes the engine. A thread inside the engine cannot hold the leash: with the
GIL held in C it never runs. The warden waits for two things: the lifeline, a pipe whose other end only the
supervisor holds, to close, and the engine to end. When the lifeline closes, everything below the warden is killed.
When the engine ends, what it left behind is killed and the warden ends exactly as the engine did. Without a pid
namespace the warden adopts the orphans of the family (subreaper) and kills until there are none.
Signals that are meant for the engine and reach only us (SIGTERM, SIGUSR2) are passed on.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from typing import Any, NoReturn

from engines.lockdown import kernel, namespaces

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_SWEEP_STEP_S = 0.0005
# Processes that ignore SIGKILL for this long are stuck in the kernel; waiting longer helps nobody.
_SWEEP_S = 5.0


def fork(lifeline: int | None, layers: set[str], policy: dict[str, Any], verdicts: dict[str, str]) -> None:
    """Fork the engine-to-be below a warden; returns in the engine-to-be only."""
    network = policy.get("network", "none")
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    told, tell = os.pipe()
    if "namespaces" in layers:
        pid = namespaces.fork(network=network == "host", verdicts=verdicts)
    else:
        verdicts.update(dict.fromkeys(namespaces.NAMES, "off"))
        pid = os.fork()
    apart = verdicts["pid"] == "claimed"
    if pid:
        os.close(tell)
        _guard(pid, lifeline, told, apart=apart)
    os.close(told)
    if lifeline is not None:
        os.close(lifeline)
    _die_with_parent(tell)
    if apart:
        namespaces.furnish(verdicts, loopback=network == "loopback", granted=_granted(policy))
        engine = os.fork()
        if engine:
            _be_first(engine, tell)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(tell)
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    verdicts["warden"] = "claimed"


def _granted(policy: dict[str, Any]) -> list[str]:
    return [path for name in ("read", "execute", "write", "devices") for path in policy.get(name, ())]


def _die_with_parent(tell: int) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(tell, 0)
    if poll.poll(0):  # nobody reads the other end: the warden died before we could ask
        os._exit(0)


def _quiet() -> None:
    """Let go of the engine's pipes: the supervisor must see their end when the engine closes them."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _pass_on(pid: int) -> None:
    def pass_on(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)


# ---- the first process of the pid namespace


def _be_first(engine: int, tell: int) -> NoReturn:
    """Reap everything; when the engine has ended, tell how and end: the kernel kills the rest of the namespace."""
    _quiet()
    _pass_on(engine)
    while True:
        pid, status = os.wait()
        if pid == engine:
            os.write(tell, struct.pack("i", status))
            os._exit(0)


# ---- the warden


def _guard(pid: int, lifeline: int | None, told: int, *, apart: bool) -> NoReturn:
    _quiet()
    _pass_on(pid)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if lifeline is not None:
        poll.register(lifeline, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if lifeline in ready:
            _sweep()
            _end_like(signal.SIGKILL)
        if ended in ready:
            _, status = os.waitpid(pid, 0)
            if apart:
                # Nothing was told when the first process itself was killed; then its own end is the answer.
                message = os.read(told, 4)
                status = struct.unpack("i", message)[0] if len(message) == 4 else status
            _sweep()
            _end_like(status)


def _sweep() -> None:
    """Kill what is below us. Killed parents hand us their children, so look until there are none."""
    until = time.monotonic() + _SWEEP_S
    while time.monotonic() < until:
        for child in _children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_SWEEP_STEP_S)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(1.0)
    os._exit(os.WEXITSTATUS(status))
