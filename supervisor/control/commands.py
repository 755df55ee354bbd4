"""`supervisor status | pause | resume | drain`: one question over the control socket, and its answer for people.

Exit codes: 0 done; 1 the supervisor refused; 3 no supervisor is running; 64 usage; 77 not for this user; 78 the
configuration that names the socket is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.control.client import ask
from supervisor.errors import ExitCode

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_S = 366 * 86_400


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of one verb."""
    parser.add_argument("--config", metavar="FILE", help="worker.toml of the supervisor that is meant")
    parser.add_argument("--json", action="store_true", help="for programs")
    if name == "pause":
        parser.add_argument(
            "--for", dest="for_s", metavar="TIME", type=duration, help="how long: 90s, 30m, 2h, 1d, 1h30m"
        )
        parser.add_argument("--free-vram", action="store_true", help="also end the models that hold GPU memory")
    if name == "drain":
        parser.add_argument("--restart", action="store_true", help="end so that the service manager starts it again")
    if name in ("pause", "drain"):
        parser.add_argument("--reason", metavar="TEXT", default="", type=_short, help="what others are told")
    parser.set_defaults(command=_VERBS[name])


def duration(text: str) -> float:
    """Seconds of "2h", "90s", "1h30m".

    Raises:
        argparse.ArgumentTypeError: it is none, or longer than a year.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time: write 90s, 30m, 2h, 1d or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than nothing and at most 366d")
    return seconds


def _short(text: str) -> str:
    if len(text) > 200:
        raise argparse.ArgumentTypeError(f"it has {len(text)} characters, and may have 200")
    return text


def socket_path(config: str | None) -> Path:
    """Where the supervisor of this configuration listens."""
    from supervisor.config import control_socket, find_config, load

    return control_socket(load(find_config(config)))


# ---- the verbs


def _status(arguments: argparse.Namespace) -> int:
    seen = ask(socket_path(arguments.config), "GET", "/v1/status")
    _print(arguments, seen, _page)
    return int(ExitCode.STOPPED)


def _pause(arguments: argparse.Namespace) -> int:
    order = {"reason": arguments.reason, "free_vram": arguments.free_vram}
    if arguments.for_s is not None:
        order["for_s"] = arguments.for_s
    seen = ask(socket_path(arguments.config), "POST", "/v1/pause", order)
    _print(arguments, seen, lambda seen: _paused(seen, arguments.free_vram))
    return int(ExitCode.STOPPED)


def _resume(arguments: argparse.Namespace) -> int:
    answer = ask(socket_path(arguments.config), "POST", "/v1/resume", {})
    _print(arguments, answer, _resumed)
    return int(ExitCode.STOPPED)


def _drain(arguments: argparse.Namespace) -> int:
    seen = ask(
        socket_path(arguments.config), "POST", "/v1/drain", {"reason": arguments.reason, "restart": arguments.restart}
    )
    then = "it is started again" if arguments.restart else "the supervisor ends"
    _print(arguments, seen, lambda seen: f"Draining: {_jobs(seen['jobs'])}; {then} when that is done.")
    return int(ExitCode.STOPPED)


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "status": _status,
    "pause": _pause,
    "resume": _resume,
    "drain": _drain,
}


def _print(arguments: argparse.Namespace, answer: Any, page: Callable[[Any], str]) -> None:
    text = json.dumps(answer, indent=2, ensure_ascii=False) if arguments.json else page(answer)
    sys.stdout.write(text + "\n")


def _page(seen: Any) -> str:
    from supervisor.control.page import page

    return page(seen)


def _paused(seen: Any, free_vram: bool) -> str:
    lines = [seen["why"] or "Paused; what runs is finished."]
    if seen["jobs"]:
        lines.append(f"{_jobs(seen['jobs'])}, and will be finished.")
    if free_vram:
        lines.append("Models that hold GPU memory are ended as soon as they are idle.")
    return "\n".join(lines)


def _resumed(answer: Any) -> str:
    if not answer["lifted"]:
        return "It was not paused by the operator."
    left = answer["status"]["holds"]
    return f"Resumed, but not taking jobs yet: {answer['status']['why']}" if left else "Resumed."


def _jobs(count: int) -> str:
    return f"{count or 'no'} job{'' if count == 1 else 's'} {'is' if count == 1 else 'are'} running"
