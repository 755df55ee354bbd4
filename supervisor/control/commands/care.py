"""`supervisor diagnostics`: a bundle for whoever is asked for help."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from supervisor.control.client import fetch
from supervisor.control.commands import asking
from supervisor.control.commands.layout import say
from supervisor.errors import ExitCode, NoPermission, SupervisorError

BUNDLE_S = 120.0  # logs are read and compressed


class Exists(SupervisorError):
    """A file is in the way, and is not overwritten."""

    exit_code = ExitCode.FAILED


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `supervisor diagnostics`."""
    asking.add_common(parser)
    default = "default: bulkhead-diagnostics-DATE.tar.gz"
    parser.add_argument("-o", "--output", metavar="FILE", help=f"where to; nothing is overwritten; {default}")
    parser.set_defaults(command=diagnostics)


def diagnostics(arguments: argparse.Namespace) -> int:
    """Write the bundle of the running supervisor; returns the exit code.

    Raises:
        Exists: nothing is overwritten.
        NoPermission: the file cannot be made.
    """
    path = Path(arguments.output or time.strftime("bulkhead-diagnostics-%Y-%m-%dT%H%M%S.tar.gz"))
    socket = asking.socket_of(arguments)
    try:
        # Made before it is asked for: a bundle takes its time, and a name that is taken is told at once.
        out = open(path, "xb", opener=_private)
    except FileExistsError:
        raise Exists(f"{path} exists already, and is not overwritten; name another file with -o.") from None
    except OSError as problem:
        raise NoPermission(f"{path} cannot be written: {problem.strerror}; name another file with -o.") from None
    try:
        with out:
            count = fetch(socket, "/v1/diagnostics", out, patience_s=BUNDLE_S)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(problem, OSError):
            raise NoPermission(f"{path} cannot be written: {problem.strerror}.") from None
        raise
    if arguments.json:
        say(asking.as_json({"path": str(path.absolute()), "bytes": count}))
    else:
        sys.stdout.write(f"{path}: {count / 1024:.0f} KiB. Secrets are blotted out; look before you send it.\n")
    return int(ExitCode.STOPPED)


def _private(path: str, flags: int) -> int:
    """Mode 0600: what a log says is for whoever may read the log."""
    return os.open(path, flags, 0o600)
