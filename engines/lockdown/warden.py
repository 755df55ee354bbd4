"""The process that holds an engine's leash, and the one between it and the engine.

Theory of operation. The supervisor's child is the warden, outside every namespace. It forks a second process, which
forks the one that becomes the engine. A thread inside the engine cannot hold the leash: with the GIL held in C it
never runs. The warden waits for two things: the lifeline, a pipe whose other end only the supervisor holds, to close,
and the second process to end. When the lifeline closes, everything below the warden is killed. When the engine ends,
what it left behind is killed and the warden ends exactly as the engine did.

The second process is the first one of the pid namespace, with which the kernel kills all the rest. Without a pid
namespace it is the guard: it adopts the orphans of the family (subreaper) and kills until there are none. Warden and
guard watch each other, because each can be killed: the guard, in a session of its own that no signal to the group
reaches, sees the warden's end of a pipe close and sweeps; the warden inherits what a killed guard had adopted, and
sweeps too. Only both killed at one moment leave the family without a keeper.
Signals that are meant for the engine and reach only us (SIGTERM, SIGUSR2) are passed on.
"""

from __future__ import annotations

import os
import select
import struct

from engines.lockdown import family, namespaces, user

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    import signal
    from typing import Any, NoReturn
else:
    import _signal as signal


def fork(lifeline: int | None, layers: set[str], policy: dict[str, Any], verdicts: dict[str, str]) -> list[str]:
    """Fork the engine-to-be below a warden; returns in the engine-to-be only: folders that are its private ones."""
    network = policy.get("network", "none")
    signal.pthread_sigmask(signal.SIG_BLOCK, family.PASSED_ON)
    family.adopt_orphans()
    told, tell = os.pipe()
    if "namespaces" in layers:
        pid = namespaces.fork(network=network == "host", verdicts=verdicts)
    else:
        verdicts.update(dict.fromkeys(namespaces.NAMES, "off"))
        pid = os.fork()
    apart = verdicts["pid"] == "claimed"
    if pid:
        os.close(tell)
        user.finish()
        if lifeline is None:
            family.die_with_parent()  # asked for before, and forgotten with a change of user
        _hold(pid, lifeline, told)
    os.close(told)
    if lifeline is not None:
        os.close(lifeline)
    private: list[str] = []
    if apart:
        private = namespaces.furnish(verdicts, loopback=network == "loopback", granted=_granted(policy))
    user.finish()
    if apart:
        family.die_with_parent()
        if _alone(tell):
            os._exit(0)
    else:
        family.adopt_orphans()
    keeper = os.getpid()
    engine = os.fork()
    if engine and apart:
        _be_first(engine, tell)
    if engine:
        _be_guard(engine, tell)
    family.die_with_parent()
    if os.getppid() != keeper and not apart:
        os._exit(0)
    os.close(tell)
    for number in family.PASSED_ON:  # SIGUSR2 would kill, see launch.py
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR2 else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, family.PASSED_ON)
    verdicts["warden"] = "claimed"
    return private


def _granted(policy: dict[str, Any]) -> list[str]:
    return [path for name in ("read", "execute", "write", "devices") for path in policy.get(name, ())]


def _alone(tell: int) -> bool:
    """Whether the warden is gone: nobody reads the other end any more."""
    poll = select.poll()
    poll.register(tell, 0)
    return bool(poll.poll(0))


# ---- the first process of the pid namespace


def _be_first(engine: int, tell: int) -> NoReturn:
    """Reap everything; when the engine has ended, tell how and end: the kernel kills the rest of the namespace."""
    family.let_go_of_pipes()
    family.pass_on(engine)
    while True:
        pid, status = os.wait()
        if pid == engine:
            os.write(tell, struct.pack("i", status))
            os._exit(0)


# ---- the guard, where there is no pid namespace


def _be_guard(engine: int, tell: int) -> NoReturn:
    """Reap everything; when the engine has ended or the warden is gone, kill what is left, tell, and end."""
    os.setsid()
    family.let_go_of_pipes()
    woken, wake = os.pipe()
    for fd in (woken, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the wakeup descriptor tells
    family.pass_on(engine)
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(tell, 0)
    while True:
        status = family.reap(engine)
        if status is not None:
            family.sweep()
            if not _alone(tell):
                os.write(tell, struct.pack("i", status))
            os._exit(0)
        if tell in [fd for fd, _ in poll.poll()]:
            family.sweep()
            os._exit(0)
        try:
            os.read(woken, 4096)
        except BlockingIOError:
            pass


# ---- the warden


def _hold(pid: int, lifeline: int | None, told: int) -> NoReturn:
    family.let_go_of_pipes()
    family.pass_on(pid)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if lifeline is not None:
        poll.register(lifeline, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if lifeline in ready:
            family.sweep()
            family.end_like(signal.SIGKILL)
        if ended in ready:
            _, status = os.waitpid(pid, 0)
            # Nothing was told when the one between was killed itself; then its own end is the answer.
            message = os.read(told, 4)
            status = struct.unpack("i", message)[0] if len(message) == 4 else status
            family.sweep()
            family.end_like(status)
