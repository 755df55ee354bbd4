"""`coordinator doctor`: what an operator would look at first, one line each, with the cure. Nothing is changed.

Theory of operation. Every check is a function of `box` or `store` that yields findings. Each runs in a thread of its
own and is bounded in time: one that hangs or raises is a finding of its own and keeps nobody else. The store is only
read, so a coordinator may serve from it meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from coordinator.config import Config

log = logging.getLogger(__name__)

CHECK_S = 10.0
Verdict = Literal["ok", "warn", "bad"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one look showed.

    Attributes:
        name: of what was looked at.
        sentence: what is so.
        cure: what to do about it; "" when it is well.
    """

    name: str
    verdict: Verdict
    sentence: str
    cure: str = ""


class Patient(NamedTuple):
    """What is examined: a configuration, where its jobs live (a URL may hold a password), and its state folder."""

    config: Config
    store: str
    state: Path


Look = Callable[[Patient], Iterable[Finding]]


class Check(NamedTuple):
    """One entry of the table; `look` may block for `within_s`."""

    name: str
    look: Look
    within_s: float = CHECK_S


def ok(name: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(name=name, verdict="ok", sentence=sentence)


def warn(name: str, sentence: str, cure: str) -> Finding:
    """It works, and will not work for long, or not as well as it could."""
    return Finding(name=name, verdict="warn", sentence=sentence, cure=cure)


def bad(name: str, sentence: str, cure: str) -> Finding:
    """It does not work, or jobs may be lost."""
    return Finding(name=name, verdict="bad", sentence=sentence, cure=cure)


def examine(patient: Patient, checks: Sequence[Check]) -> list[Finding]:
    """Make all checks at once; findings in the order of the table. What hangs is left behind in its thread."""
    began = time.monotonic()
    found: dict[str, list[Finding]] = {}

    def one(check: Check) -> None:
        try:
            found[check.name] = list(check.look(patient))
        except Exception as error:  # whatever a broken machine throws at us
            log.debug("the check %s failed", check.name, exc_info=error)
            words = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]
            mend = "Mend that first, then ask again."
            found[check.name] = [bad(check.name, f"It could not be looked at: {words}.", mend)]

    threads = [threading.Thread(target=one, args=(check,), name=check.name, daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    findings: list[Finding] = []
    for check, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, began + check.within_s - time.monotonic()))
        late = bad(
            check.name,
            f"There was no answer within {check.within_s:g} s.",
            "Something it needs hangs: a disk, the database or the network.",
        )
        findings += found.get(check.name, [late])
    return findings


def well(findings: Iterable[Finding]) -> bool:
    """Whether nothing is bad."""
    return all(finding.verdict != "bad" for finding in findings)


def plain(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: `{"ok", "checks": [{"name", "verdict", "sentence", "cure"}]}`."""
    return {"ok": well(findings), "checks": msgspec.to_builtins(findings)}


_SIGNS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


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
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("bad", "warn")}
    warnings = f"{count['warn'] or 'no'} warning{'' if count['warn'] == 1 else 's'}"
    lines.append(f"{len(rows)} checks: {count['bad'] or 'none'} bad, {warnings}.")
    return "\n".join(lines)
