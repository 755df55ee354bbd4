"""`supervisor selftest`: let a misbehaving engine do its worst on this box, and see whether it was contained.

It needs no GPU, no model, no coordinator and no root, and touches no configuration: everything happens in a temporary
folder, with short limits, through the same host that serves jobs. Exit code 0 when every case was contained, 1 when
not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import msgspec
import trio

from supervisor.columns import columns
from supervisor.errors import ExitCode
from supervisor.interrupts import INTERRUPTED
from supervisor.selftest_cases import CASES, Case
from supervisor.selftest_judge import Row
from supervisor.selftest_run import run_kit

TOTAL_S = 230.0  # promised: under four minutes
_SHOWN_NAMES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `supervisor selftest`."""
    parser.add_argument("--json", action="store_true", help="for programs: an array with an object for each case")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        choices=[case.name for case in CASES],
        help="only this one",
    )
    modes = ("best-effort", "require", "off")
    parser.add_argument(
        "--sandbox", choices=modes, default=modes[0], help="mode (best-effort); off shows what it is for"
    )
    parser.add_argument("--list", action="store_true", help="print what would be tried, and stop")
    parser.add_argument("--verbose", action="store_true", help="the supervisor's log on stderr")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    cases = [case for case in cases if not case.linux or sys.platform.startswith("linux")]
    if arguments.list:
        sys.stdout.write(columns(("name", "what it does"), [(case.name, case.title) for case in cases]) + "\n")
        return int(ExitCode.STOPPED)
    # What the host has to say of a misbehaving engine is expected here.
    logging.getLogger("supervisor").addHandler(logging.StreamHandler() if arguments.verbose else logging.NullHandler())
    began, before = time.monotonic(), _watched()
    line = None if arguments.verbose else ProgressLine(sys.stderr, len(cases))
    rows, stopped = run(cases, line, mode=arguments.sandbox)
    found = [rows[case.name] for case in cases if case.name in rows]
    untried = [case for case in cases if case.name not in rows]
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    else:
        sys.stdout.write(render(found) + "\n\n" + summary(found, untried, time.monotonic() - began) + "\n")
        if new := sorted(_watched() - before):
            sys.stdout.write(f"New meanwhile, by this or by other programs: {', '.join(new)}.\n")
    if stopped:
        sys.stderr.write(f"stopped; {len(untried)} of {len(cases)} cases were not tried to their end\n")
        return INTERRUPTED
    return int(ExitCode.STOPPED if not untried and all(row.contained for row in found) else ExitCode.FAILED)


def _watched() -> set[str]:
    """What lies in the places where a library leaves things; everybody may write there, so it judges nothing."""
    return {str(path) for folder in ("/dev/shm", Path.home()) for path in Path(folder).glob("*")}


def run(
    cases: Sequence[Case], line: ProgressLine | None = None, *, mode: str = "best-effort"
) -> tuple[Mapping[str, Row], bool]:
    """Run cases in a temporary folder, at most `TOTAL_S`.

    Returns the rows by name, and whether SIGINT or SIGTERM came; then the rows are those that were done.
    """
    rows: dict[str, Row] = {}
    folder = Path(tempfile.mkdtemp(prefix="bh-selftest-"))
    folder.chmod(0o711)  # an engine that runs as another user has to pass through
    try:
        stopped = trio.run(_run, cases, folder, rows, line, mode)
    finally:
        if line is not None:
            line.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows, stopped


async def _run(cases: Sequence[Case], folder: Path, rows: dict[str, Row], line: ProgressLine | None, mode: str) -> bool:
    stopped = False

    async def obey(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        nonlocal stopped
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _number in signals:
                stopped = True
                scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(obey, nursery.cancel_scope)
        with trio.move_on_after(TOTAL_S):

            def on_change(running: Sequence[str]) -> None:
                if line is not None:
                    line.show(len(rows), running)

            await run_kit(cases, folder, rows=rows, on_change=on_change, mode=mode)
        nursery.cancel_scope.cancel()
    return stopped


# ---- showing


class ProgressLine:
    """How far it is, on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total = stream, total
        self._drawn = False

    def show(self, done: int, running: Sequence[str]) -> None:
        """Draw it."""
        if self._stream.isatty():
            names = ", ".join(running[:_SHOWN_NAMES])
            self._stream.write(f"\r{done} of {self._total} done; now {names}\033[K")
            self._stream.flush()
            self._drawn = True

    def close(self) -> None:
        """Leave the terminal as a command expects it."""
        if self._drawn:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._drawn = False


def render(rows: Sequence[Row]) -> str:
    """The table: what was tried, what happened, how long it took, contained or not."""
    lines = [
        (
            row.title,
            "yes" if row.contained else "NO",
            f"{row.seconds:.2f} s",
            f"{row.neighbour_worst_s * 1000:.0f} ms",
            row.outcome,
        )
        for row in rows
    ]
    head = ("the engine …", "contained", "answer after", "neighbour", "what happened")
    return columns(head, lines, right=(2, 3))


def summary(rows: Sequence[Row], untried: Sequence[Case], seconds: float) -> str:
    """One or two sentences below the table."""
    bad = [row.name for row in rows if not row.contained]
    text = f"{len(rows) - len(bad)} of {len(rows)} cases were contained, in {seconds:.0f} s."
    if bad:
        text += f" Not contained: {', '.join(bad)}; `supervisor selftest --verbose --case {bad[0]}` says more."
    if untried:
        text += f" {len(untried)} were not tried to the end: the first is {untried[0].name}."
    lacks = sorted({layer for row in rows for layer in row.lacks})
    text += f"\nLayers of the sandbox that were not whole here: {', '.join(lacks)}." if lacks else ""
    return text + "\n“neighbour” is the longest that a healthy engine took to answer meanwhile."
