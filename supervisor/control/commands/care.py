"""`supervisor doctor | diagnostics`: is everything as it should be, and a bundle for whoever is asked for help."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from supervisor.control.client import NotRunning, fetch
from supervisor.control.commands import asking
from supervisor.control.commands.layout import Paper, count, say, wrapped
from supervisor.control.commands.place import find_config, socket_path
from supervisor.errors import ConfigError, ExitCode, NoPermission, SupervisorError

_SIGNS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}
_MARGIN = " " * 6
BUNDLE_S = 120.0  # logs are read and compressed


class Exists(SupervisorError):
    """A file is in the way, and is not overwritten."""

    exit_code = ExitCode.FAILED


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of one verb."""
    asking.add_common(parser)
    if name == "doctor":
        parser.set_defaults(command=doctor)
        return
    default = "default: bulkhead-diagnostics-DATE.tar.gz"
    parser.add_argument("-o", "--output", metavar="FILE", help=f"where to; nothing is overwritten; {default}")
    parser.set_defaults(command=diagnostics)


def doctor(arguments: argparse.Namespace) -> int:
    """Examine this machine, whether a supervisor runs or not; 0 when nothing failed, else 1."""
    from supervisor.doctor_run import examined_here

    found = examined_here(arguments.config)
    asking.tell(arguments, found, examined)
    return int(ExitCode.STOPPED if found["ok"] else ExitCode.FAILED)


def examined(found: Mapping[str, Any], paper: Paper) -> str:
    """A line for each check, what failed or may fail in colour, and its cure below it."""
    checks = found["checks"]
    lines = []
    for one in checks:
        sign, hue = _SIGNS[one["verdict"]]
        first, *more = wrapped(f"{one['name']}: {one['sentence']}", paper, indent=_MARGIN)
        cure = wrapped(one["cure"], paper, indent=_MARGIN) if one["cure"] else []
        lines.append(paper.paint(sign, hue) + first[len(sign) :])
        lines += [*more, *(paper.paint(each, hue) for each in cure)]
    failed, doubtful = (sum(one["verdict"] == verdict for one in checks) for verdict in ("fail", "warn"))
    lines.append(f"{count(len(checks), 'check')}: {failed or 'none'} failed, {count(doubtful, 'warning')}.")
    return "\n".join(lines)


def diagnostics(arguments: argparse.Namespace) -> int:
    """Write a bundle; returns the exit code.

    Raises:
        Exists: nothing is overwritten.
        NoPermission: the file cannot be made.
        ConfigError: there is no configuration.
    """
    config = find_config(arguments.config)
    path = Path(arguments.output or time.strftime("bulkhead-diagnostics-%Y-%m-%dT%H%M%S.tar.gz"))
    try:
        # Made before it is asked for: a bundle takes its time, and a name that is taken is told at once.
        out = open(path, "xb", opener=_private)
    except FileExistsError:
        raise Exists(f"{path} exists already, and is not overwritten; name another file with -o.") from None
    except OSError as problem:
        raise NoPermission(f"{path} cannot be written: {problem.strerror}; name another file with -o.") from None
    try:
        with out:
            running = _gathered(config, out)
            count = out.tell()
    except BaseException as problem:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(problem, OSError):
            raise NoPermission(f"{path} cannot be written: {problem.strerror}.") from None
        raise
    if arguments.json:
        say(asking.as_json({"path": str(path.absolute()), "bytes": count, "running": running}))
    else:
        without = "" if running else "No supervisor is running: it has what lies in the state folder. "
        sys.stdout.write(f"{path}: {count / 1024:.0f} KiB. {without}Secrets are struck out; look before you send it.\n")
    return int(ExitCode.STOPPED)


def _gathered(config: Path, out: IO[bytes]) -> bool:
    """The bundle of the running supervisor, else one of what it left behind; returns whether one is running."""
    try:
        fetch(socket_path(str(config)), "/v1/diagnostics", out, patience_s=BUNDLE_S)
        return True
    except (NotRunning, ConfigError):  # help is wanted most when it does not start
        pass
    from supervisor.config import load, state_dir
    from supervisor.diagnostics import bundle
    from supervisor.settings import Settings

    try:
        settings = load(config)
    except ConfigError:
        settings = Settings()
    out.write(bundle(config, state_dir(settings)))
    return False


def _private(path: str, flags: int) -> int:
    """Mode 0600: what a log says is for whoever may read the log."""
    return os.open(path, flags, 0o600)
