"""The launcher's part on macOS: a warden outside the sandbox, and inside it somebody who tries before the engine runs.

    sandbox-exec -p PROFILE -- python -I -S engines/lockdown/seatbelt.py '{"argv": …, "network": …, …}'

Theory of operation. The supervisor's child forks: the parent stays as the warden, the child becomes `sandbox-exec` with
the profile that the supervisor made of the policy, which becomes this file again, inside: it tries what the profile
should refuse, tells the verdict in the environment, and becomes the engine. The warden waits on a kqueue for the
lifeline to close and for the engine to end. Where `sandbox-exec` does not come as far as this file (a profile that the
system does not understand), the engine runs without it and says so, unless the sandbox is required. macOS has no
subreaper: an orphan is handed to launchd. So the warden notes the family at every fork of the engine, with start times,
and ends what it noted; a daemon whose parents lived shorter than the warden's look is missed, and `family` says
`partial` for engines that may fork at all.

Standard library only, and inside the sandbox nothing of ours but this file. It has not run on a Mac yet.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

SANDBOX_EXEC = "/usr/bin/sandbox-exec"
EXIT_NOT_CONFINED = 71  # as in engines/launch.py
VERDICTS = "BULKHEAD_SANDBOX"  # as in engines/launch.py
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_NOWHERE = ("192.0.2.1", 9)  # TEST-NET-1: never a real host; connecting a datagram socket sends nothing
_MAX_CHILDREN = 4096
_SWEEP_STEP_S = 0.002
_SWEEP_S = 5.0
# sys/event.h and sys/proc_info.h; the module `select` has the first ones on macOS only.
_FILTER_READ, _FILTER_PROC = -1, -5
_EV_ADD = 0x1
_NOTE_EXIT, _NOTE_FORK = 0x8000_0000, 0x4000_0000
_PROC_PIDTBSDINFO = 3


class ProcBsdInfo(ctypes.Structure):
    """struct proc_bsdinfo: what libproc tells of a process; 136 bytes."""

    _fields_ = (
        ("numbers", ctypes.c_uint32 * 12),
        ("comm", ctypes.c_char * 16),
        ("name", ctypes.c_char * 32),
        ("more_numbers", ctypes.c_uint32 * 6),
        ("start_s", ctypes.c_uint64),
        ("start_us", ctypes.c_uint64),
    )


def confine(
    profile: str, policy: dict[str, Any], lifeline: int | None, argv: list[str], environment: dict[str, str]
) -> NoReturn:
    """Become the warden of an engine that runs under the profile; called by the launcher, never returns.

    Args:
        profile: text from the supervisor's containment/seatbelt_profile.py; "" when it could not be written.
        policy: as in engines/launch.py; `mode`, `network` and `spawns` are looked at.
        argv: of the engine; its program is absolute.
        environment: of the engine, whole.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    told: dict[str, Any] = {name: policy.get(name) for name in ("mode", "network", "spawns")} | {"argv": argv}
    pid, verdict = 0, _without(profile, policy)
    if not verdict:
        pid, verdict = _start_inside(profile, told, lifeline, environment)
    if verdict:
        pid = os.fork()
        if pid == 0:
            _be_engine(lifeline)
            become(told, {"seatbelt": verdict}, environment)
    guard(pid, lifeline)


def _without(profile: str, policy: dict[str, Any]) -> str:
    """The verdict where the sandbox is not even tried; else ""."""
    if policy.get("mode") == "off":
        return "off"
    if not profile:
        return "unavailable(profile)"
    return "" if os.path.exists(SANDBOX_EXEC) else "unavailable(ENOENT)"


def _start_inside(
    profile: str, told: dict[str, Any], lifeline: int | None, environment: dict[str, str]
) -> tuple[int, str]:
    """Start `main` below sandbox-exec: its pid and "" once it runs there, 0 and the verdict when it never did."""
    arrived, arrive = os.pipe()
    os.set_inheritable(arrive, True)
    pid = os.fork()
    if pid == 0:
        _be_engine(lifeline)
        inside = [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(told | {"arrive": arrive})]
        os.execve(SANDBOX_EXEC, [SANDBOX_EXEC, "-p", profile, "--", *inside], environment)
    os.close(arrive)
    if lifeline in select.select([arrived] if lifeline is None else [arrived, lifeline], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _kin().end_like(signal.SIGKILL)
    came = os.read(arrived, 1)
    os.close(arrived)
    if came:
        return pid, ""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 0, f"unavailable(exit code {code})" if code >= 0 else f"unavailable(signal {-code})"


def _be_engine(lifeline: int | None) -> None:
    if lifeline is not None:
        os.close(lifeline)
    for number in _PASSED_ON:  # SIGUSR2 would kill, see launch.py
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR2 else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)


def main() -> NoReturn:
    """Inside the sandbox: try, tell, become the engine."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    os.write(told["arrive"], b"x")
    os.close(told["arrive"])
    become(told, {"seatbelt": judge(attempts(told))}, dict(os.environ))


def become(told: dict[str, Any], verdicts: dict[str, str], environment: dict[str, str]) -> NoReturn:
    """Exec the engine with its verdicts; not when a sandbox is required and not verified."""
    if told.get("mode") == "require" and verdicts["seatbelt"] != "verified":
        os.write(2, f'sandbox = "require": seatbelt is {verdicts["seatbelt"]}\n'.encode())
        os._exit(EXIT_NOT_CONFINED)
    alone = verdicts["seatbelt"] == "verified" and not told.get("spawns")
    verdicts["warden"] = "claimed"
    verdicts["family"] = "verified" if alone else "partial(a daemon may leave it)"
    if told.get("network") == "loopback":
        verdicts["net"] = "partial(the loopback is the machine's)"
    os.execve(told["argv"][0], told["argv"], environment | {VERDICTS: json.dumps(verdicts)})


# ---- trying


def attempts(told: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """What must be refused, by name."""
    tried: dict[str, Callable[[], object]] = {
        "files": lambda: os.listdir("/Users"),
        "signals": lambda: os.kill(os.getppid(), 0),
    }
    if told.get("network") != "host":
        tried["network"] = _reach_out
    if not told.get("spawns"):
        tried["fork"] = _fork
    return tried


def judge(tried: dict[str, Callable[[], object]]) -> str:
    """Seatbelt refuses with EPERM; missing rights of a file would be EACCES, and prove nothing."""
    open_ = [name for name, attempt in tried.items() if not _refused(attempt)]
    if not open_:
        return "verified"
    return "failed" if len(open_) == len(tried) else f"partial({', '.join(open_)} open)"


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def _reach_out() -> None:
    plug = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        plug.connect(_NOWHERE)
    finally:
        plug.close()


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


# ---- the warden


def _kin() -> Any:
    """What the warden shares with Linux's. It is outside the sandbox: inside, there is this file alone."""
    from engines.lockdown import family

    return family


def guard(pid: int, lifeline: int | None) -> NoReturn:
    """Hold the leash of the engine `pid`; ends as the engine does, or by SIGKILL when the lifeline closed."""
    _kin().let_go_of_pipes()
    _kin().pass_on(pid)
    # getattr: the type checker looks at this file on Linux, too.
    kevent, queue = getattr(select, "kevent"), getattr(select, "kqueue")()  # noqa: B009
    family: dict[int, str] = {}
    if lifeline is not None:
        queue.control([kevent(lifeline, _FILTER_READ, _EV_ADD)], 0)
    try:
        queue.control([kevent(pid, _FILTER_PROC, _EV_ADD, _NOTE_EXIT | _NOTE_FORK)], 0)
    except ProcessLookupError:  # it has ended before we could look
        _end_with(pid, family)
    while True:
        for event in queue.control([], 4, None):
            if event.filter == _FILTER_READ:
                os.kill(pid, signal.SIGSTOP)
                note(pid, family)
                sweep(pid, family)
                _kin().end_like(signal.SIGKILL)
            note(pid, family)
            if event.fflags & _NOTE_EXIT:
                _end_with(pid, family)


def _end_with(pid: int, family: dict[int, str]) -> NoReturn:
    _, status = os.waitpid(pid, 0)
    sweep(None, family)
    _kin().end_like(status)
    raise AssertionError  # it does not come back


def note(pid: int, family: dict[int, str]) -> bool:
    """Add the descendants of `pid`, and those of the noted ones, with their start; whether any was new."""
    look, before = [pid, *family], len(family)
    while look:
        for child in children(look.pop()):
            if child not in family and child != os.getpid() and (began := started(child)):
                family[child] = began
                look.append(child)
    return len(family) > before


def sweep(pid: int | None, family: dict[int, str]) -> None:
    """Stop all until nobody is new, then kill all and wait until they are gone; at most `_SWEEP_S`."""
    until = time.monotonic() + _SWEEP_S
    while time.monotonic() < until:
        _signal_all(family, signal.SIGSTOP)
        if not any([note(member, family) for member in list(family)]):
            break
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    while _signal_all(family, signal.SIGKILL) and time.monotonic() < until:
        time.sleep(_SWEEP_STEP_S)


def _signal_all(family: dict[int, str], number: int) -> int:
    """Send it to those who still are who they were; how many there were."""
    sent = 0
    for member, began in family.items():
        if started(member) == began:
            try:
                os.kill(member, number)
                sent += 1
            except OSError:
                pass
    return sent


def children(pid: int) -> list[int]:
    """Numbers of a process's children, from libproc."""
    numbers = (ctypes.c_int * _MAX_CHILDREN)()
    count = _libproc().proc_listchildpids(pid, numbers, ctypes.sizeof(numbers))
    return [number for number in numbers[: max(0, min(count, _MAX_CHILDREN))] if number > 0]


def started(pid: int) -> str:
    """When a process began, in microseconds; with its number it names one process. "" when it is gone."""
    info = ProcBsdInfo()
    size = ctypes.sizeof(info)
    if _libproc().proc_pidinfo(pid, _PROC_PIDTBSDINFO, ctypes.c_uint64(0), ctypes.byref(info), size) != size:
        return ""
    return f"{info.start_s}.{info.start_us:06}"


def _libproc() -> Any:
    return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)


if __name__ == "__main__":
    main()
