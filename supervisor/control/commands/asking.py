"""What the verbs that ask a running supervisor have in common: options, the question, how the answer is said."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.control import client
from supervisor.control.commands.layout import Paper, paper_of, say
from supervisor.control.commands.place import socket_path
from supervisor.errors import ExitCode, SupervisorError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_S = 366 * 86_400

Command = Callable[[argparse.Namespace], int]


class Usage(SupervisorError):
    """The command line is wrong in a way that argparse cannot tell."""

    exit_code = ExitCode.USAGE


def add_common(parser: argparse.ArgumentParser, *, below: bool = False) -> None:
    """Add what every verb has.

    Args:
        below: the parser is one below another that has these options already; what was said there must count here.
    """
    given: Any = argparse.SUPPRESS if below else None
    parser.add_argument("--config", metavar="FILE", default=given, help="worker.toml of the supervisor that is meant")
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS if below else False, help="for programs"
    )


def add_verb(verbs: Any, name: str, help_: str, command: Command, examples: str) -> argparse.ArgumentParser:
    """Add one verb below another, like `gpus cordon`."""
    made: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_,
        description=help_[:1].upper() + help_[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(made, below=True)
    made.set_defaults(command=command)
    return made


def ask(arguments: argparse.Namespace, method: str, route: str, body: object = None, *, patience_s: float = 0) -> Any:
    """One question to the supervisor that is meant. Raises as `client.ask`, and ConfigError."""
    return client.ask(socket_path(arguments.config), method, route, body, patience_s=patience_s or client.PATIENCE_S)


def socket_of(arguments: argparse.Namespace) -> Path:
    """Where the supervisor that is meant listens."""
    return socket_path(arguments.config)


def tell(arguments: argparse.Namespace, answer: Any, page: Callable[[Any, Paper], str]) -> int:
    """Print an answer, for programs or for people; returns the exit code of success."""
    if arguments.json:
        say(as_json(answer))
    else:
        say(page(answer, paper_of(sys.stdout)))
    return int(ExitCode.STOPPED)


def as_json(answer: Any) -> str:
    """For programs that people look at, too."""
    import json

    return json.dumps(answer, indent=2, ensure_ascii=False)


# ---- kinds of arguments


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


def short(text: str) -> str:
    """A reason. Raises argparse.ArgumentTypeError when it is too long to be shown."""
    if len(text) > 200:
        raise argparse.ArgumentTypeError(f"it has {len(text)} characters, and may have 200")
    return text


def positive(text: str) -> int:
    """A number from 1 on. Raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000000")
    return int(text)
