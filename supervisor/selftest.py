"""`supervisor selftest`: let a misbehaving engine do its worst on this box, and see whether it was contained.

It needs no GPU, no model, no coordinator and no root, and touches no configuration: everything happens in a temporary
folder, with short limits, through the same host that serves jobs. Exit code 0 when every case was contained, 1 when
not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import msgspec
import trio

from supervisor.columns import columns, width
from supervisor.errors import ExitCode
from supervisor.interrupts import INTERRUPTED
from supervisor.observe.figures import counted
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
    parser.add_argument("--wide", action="store_true", help="one line a case, however wide the terminal is")
    parser.add_argument("--verbose", action="store_true", help="the supervisor's log on stderr")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    cases = [case for case in cases if not case.linux or sys.platform.startswith("linux")]
    wide = None if arguments.wide else terminal_width()
    if arguments.list:
        _list(cases, json=arguments.json, wide=wide)
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
        below = filled(summary(found, untried, time.monotonic() - began), wide)
        sys.stdout.write(render(found, wide) + "\n\n" + below + "\n")
        if new := sorted(_watched() - before):
            sys.stdout.write(f"New meanwhile, by this or by other programs: {', '.join(new)}.\n")
    if stopped:
        verb = "was" if len(untried) == 1 else "were"
        sys.stderr.write(f"stopped; {len(untried)} of {counted(len(cases), 'case')} {verb} not tried to the end\n")
        return INTERRUPTED
    return int(ExitCode.STOPPED if not untried and all(row.contained for row in found) else ExitCode.FAILED)


def terminal_width() -> int | None:
    """Cells of a line of stdout; None when it is no terminal, and lines may be as long as they like."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return max(40, shutil.get_terminal_size().columns)


def _list(cases: Sequence[Case], *, json: bool, wide: int | None) -> None:
    if json:
        fields = ("name", "group", "title", "expected")
        found = [{name: getattr(case, name) for name in fields} for case in cases]
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        return
    table = columns(("name", "what it does"), [(case.name, case.title) for case in cases])
    indent = 2 + max(len(case.name) for case in cases)
    sys.stdout.write(filled(table, wide, indent=indent) + "\n")


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


def filled(text: str, wide: int | None, *, indent: int = 0) -> str:
    """Break lines that are too long; what follows a break is indented by so much."""
    if wide is None:
        return text
    lines = []
    for line in text.split("\n"):
        lines += [line] if width(line) <= wide else _wrap(line, wide, "", " " * indent)
    return "\n".join(lines)


def _wrap(text: str, wide: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, wide, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def render(rows: Sequence[Row], wide: int | None = None) -> str:
    """The table: what was tried, what happened, how long it took, contained or not.

    Args:
        wide: cells of a line. Where the table does not fit, what happened stands below each case.
    """
    table = _table(rows)
    if wide is None or all(width(line) <= wide for line in table.split("\n")):
        return table
    heads = ("contained", "answer after", "neighbour")
    indent = " " * (len(heads[0]) + 2)
    lines = ["  ".join((*heads, "the engine …"))]
    for row in rows:
        cells = (
            f"{'yes' if row.contained else 'NO':{len(heads[0])}}",
            f"{f'{row.seconds:.2f} s':>{len(heads[1])}}",
            f"{f'{row.neighbour_worst_s * 1000:.0f} ms':>{len(heads[2])}}",
        )
        first = "  ".join(cells) + "  "
        lines += _wrap(row.title, wide, first, " " * len(first))
        lines += _wrap(row.outcome, wide, indent, indent)
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
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
    verb = "was" if len(rows) == 1 else "were"
    text = f"{len(rows) - len(bad)} of {counted(len(rows), 'case')} {verb} contained, in {seconds:.0f} s."
    if bad:
        text += f" Not contained: {', '.join(bad)}; `supervisor selftest --verbose --case {bad[0]}` says more."
    if untried:
        first = f"the first is {untried[0].name}" if len(untried) > 1 else untried[0].name
        text += f" {len(untried)} {'was' if len(untried) == 1 else 'were'} not tried to the end: {first}."
    lacks = sorted({layer for row in rows for layer in row.lacks})
    text += f"\nLayers of the sandbox that were not whole here: {', '.join(lacks)}." if lacks else ""
    return text + "\n“neighbour” is the longest that a healthy engine took to answer meanwhile."
