"""`supervisor doctor`: what a person would look at first when a worker does not work, one line each, with the cure.

Theory of operation. Every check is a function in doctor_box.py, doctor_link.py or doctor_engines.py that gives
findings; it runs beside the others, in a thread when it may block, and is bounded in time: one that hangs or raises is
a finding of its own and keeps nobody else. With a running supervisor the checks use what it already knows (its
snapshot); without one they look for themselves. Nothing is changed, and no driver is asked in this process: GPUs are
read by the killable reader, engines are tried in children.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import trio

from supervisor.settings import Settings

log = logging.getLogger(__name__)

CHECK_S = 10.0
QUIET_S = 2.0  # nobody needs progress for something shorter
Verdict = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one look showed.

    Attributes:
        name: of the check, and of its object where there are several ("engine llm").
        sentence: what is so.
        cure: what to do about it; "" when it is well.
    """

    name: str
    verdict: Verdict
    sentence: str
    cure: str = ""


class Patient(NamedTuple):
    """What is examined.

    Attributes:
        settings: None when worker.toml cannot be read; `problems` says why.
        state: the state folder.
        seen: the snapshot of the running supervisor as plain values; None when none runs.
        inside: whether we are that supervisor.
    """

    config: Path | None
    settings: Settings | None
    state: Path
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seen: Mapping[str, Any] | None = None
    inside: bool = False
    environ: Mapping[str, str] = os.environ


Look = Callable[[Patient], Iterable[Finding]]
LookLater = Callable[[Patient], Awaitable[Iterable[Finding]]]


class Check(NamedTuple):
    """One entry of the table.

    Attributes:
        look: may block; runs in a thread.
        later: instead of `look`, runs on the trio thread.
        within_s: bound; a thread that hangs for longer is left alone.
        offline: whether it is about a supervisor that does not run yet, and pointless with one.
    """

    name: str
    look: Look | None = None
    later: LookLater | None = None
    within_s: float = CHECK_S
    offline: bool = False


def ok(name: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(name=name, verdict="ok", sentence=sentence)


def warn(name: str, sentence: str, cure: str) -> Finding:
    """It works, and could be better, or will not work for long."""
    return Finding(name=name, verdict="warn", sentence=sentence, cure=cure)


def fail(name: str, sentence: str, cure: str) -> Finding:
    """It does not work."""
    return Finding(name=name, verdict="fail", sentence=sentence, cure=cure)


async def examine(
    patient: Patient, checks: Sequence[Check], on_progress: Callable[[Sequence[str]], None] = lambda _left: None
) -> list[Finding]:
    """Make all checks; findings in the order of the table.

    Args:
        on_progress: told the names of the checks that still run, after `QUIET_S` and after every end from then on.

    Cancellation: what runs in threads is left alone, children are ended.
    """
    found: dict[str, list[Finding]] = {}
    wanted = [check for check in checks if not (check.offline and patient.seen is not None)]
    began = trio.current_time()

    def left() -> list[str]:
        return [check.name for check in wanted if check.name not in found]

    async def one(check: Check) -> None:
        found[check.name] = await _bounded(check, patient)
        if left() and trio.current_time() - began >= QUIET_S:
            on_progress(left())

    async def patience() -> None:
        await trio.sleep(QUIET_S)
        on_progress(left())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(patience)
        async with trio.open_nursery() as work:
            for check in wanted:
                work.start_soon(one, check)
        nursery.cancel_scope.cancel()
    return [finding for check in wanted for finding in found[check.name]]


async def _bounded(check: Check, patient: Patient) -> list[Finding]:
    findings: list[Finding] = []
    try:
        with trio.move_on_after(check.within_s) as bound:
            if check.later is not None:
                findings = list(await check.later(patient))
            elif check.look is not None:
                look = functools.partial(_listed, check.look, patient)
                # A limiter of its own: one that hangs in a file system must not keep the others waiting.
                findings = await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    except Exception as error:  # whatever a broken machine throws at us
        log.debug("the check %s failed", check.name, exc_info=error)
        return [fail(check.name, f"It could not be looked at: {_words(error)}.", "Mend that first, then ask again.")]
    if bound.cancelled_caught:
        sentence = f"There was no answer within {check.within_s:g} s."
        return [fail(check.name, sentence, "Something it needs hangs: a disk, a driver or the network.")]
    return findings


def _listed(look: Look, patient: Patient) -> list[Finding]:
    return list(look(patient))


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]


def well(findings: Iterable[Finding]) -> bool:
    """Whether nothing fails."""
    return all(finding.verdict != "fail" for finding in findings)


def plain(findings: Sequence[Finding], *, running: bool) -> dict[str, Any]:
    """For programs: `{"ok", "running", "checks": [{"name", "verdict", "sentence", "cure"}]}`."""
    return {"ok": well(findings), "running": running, "checks": msgspec.to_builtins(findings)}


_SIGNS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def render(checks: Iterable[Mapping[str, Any]]) -> str:
    """For people: a line each, the cure below what needs one.

    Args:
        checks: as in `plain`.
    """
    rows = list(checks)
    width = max((len(row["name"]) for row in rows), default=0)
    lines = []
    for row in rows:
        lines.append(f"{_SIGNS[row['verdict']]}  {row['name']:<{width}}  {row['sentence']}")
        if row["cure"]:
            lines.append(f"{'':<{width + 8}}{row['cure']}")
    bad = sum(row["verdict"] == "fail" for row in rows)
    doubtful = sum(row["verdict"] == "warn" for row in rows)
    warnings = f"{doubtful or 'no'} warning{'' if doubtful == 1 else 's'}"
    lines.append(f"{len(rows)} checks: {bad or 'none'} failed, {warnings}.")
    return "\n".join(lines)
