"""Holds a program that an engine starts: none of its processes outlives the run, however it or the engine ends.

    python -I -S leash.py LIFELINE_FD GRACE_S PROGRAM [ARG …]

Theory of operation. The leash is the program's parent and (on Linux) the reaper of its orphans, so a grandchild
that left for a session of its own still becomes our child when its parent dies. The engine holds the write end of
the lifeline: a byte means "end it" (SIGTERM, GRACE_S, SIGKILL), the end of file means that the engine is gone
(SIGKILL at once). Once the program has ended, whatever is left of its family is killed, and the leash ends exactly as
the program did: same exit code, same signal. 126 and 127 mean, as in a shell, that it could not be started.

The program runs as we do, so it can kill the leash. Then it dies itself, and what it had sent into sessions of their
own falls to the engine's warden, guard or pid namespace: it lives no longer than the engine, but may outlive the run.

Standard library only, single-threaded: it may fork by hand.
"""

from __future__ import annotations

import os
import select
import sys
import time

# The package `engines`, without a search: inside the sandbox the folder that it lies in may be passed through and not
# listed, when the interpreter is one of the engine's own.
_ENGINES = type(sys)("engines")
_ENGINES.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
sys.modules["engines"] = _ENGINES
from engines.lockdown import family  # noqa: E402

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal


def main() -> NoReturn:
    """Entry point; never returns."""
    lifeline, grace_s, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(lifeline, False)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the wakeup descriptor tells
    family.adopt_orphans()
    pid = _start(argv)
    status = _watch(pid, lifeline, woken, grace_s)
    _signal_group(pid, signal.SIGKILL)
    family.sweep()
    family.end_like(status)


def _start(argv: list[str]) -> int:
    leash = os.getpid()
    # A SIGTERM that came between fork and exec would be swallowed by our own Python handlers: hold it back till then.
    held = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return pid
    try:
        os.setsid()
        family.die_with_parent()  # if even the leash is killed, the program at least goes with it
        if os.getppid() != leash:
            os._exit(127)
        signal.set_wakeup_fd(-1)
        ours = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR2)
        for number in ours:  # handlers of this file, and what Python and launch.py ignore
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(126 if isinstance(error, PermissionError) else 127)
    os._exit(127)


def _watch(pid: int, lifeline: int, woken: int, grace_s: float) -> int:
    """Until the program has ended; returns its wait status."""
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    kill_at: float | None = None
    while True:
        if (status := family.reap(pid)) is not None:
            return status
        timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        ready = [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000 + 1)]
        if kill_at is not None and time.monotonic() >= kill_at:
            _signal_group(pid, signal.SIGKILL)
            kill_at = None
        asked = woken in ready and _asked_to_end(woken)
        if lifeline in ready:
            asked = True
            if not os.read(lifeline, 64):
                poll.unregister(lifeline)
                _signal_group(pid, signal.SIGKILL)
                continue
        if asked and kill_at is None:
            _signal_group(pid, signal.SIGTERM)
            kill_at = time.monotonic() + grace_s


def _asked_to_end(woken: int) -> bool:
    numbers = os.read(woken, 4096)
    return signal.SIGTERM in numbers or signal.SIGINT in numbers


def _signal_group(pid: int, number: int) -> None:
    for send in (os.killpg, os.kill):  # the group does not exist before the child's setsid
        try:
            send(pid, number)
        except (ProcessLookupError, PermissionError):
            continue
        return


if __name__ == "__main__":
    main()
