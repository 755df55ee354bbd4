"""`supervisor status | jobs | engines | gpus | holds`: what the supervisor shows, once or with `--watch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from supervisor.control import page
from supervisor.control.commands import asking
from supervisor.control.commands.asking import ask, tell
from supervisor.control.commands.layout import (
    Paper,
    Row,
    ago,
    clock,
    count,
    joined,
    now_of,
    plain,
    span,
    table,
    wrapped,
)

_STATES = ("waiting", "running", "ended", "succeeded", "failed", "cancelled")


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of one verb."""
    asking.add_common(parser)
    parser.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")
    if name == "jobs":
        parser.add_argument("words", nargs="*", metavar="ID", help="one job; `cancel ID` sends it elsewhere")
        parser.add_argument("--state", choices=_STATES, help="only jobs of this state or outcome")
        parser.add_argument("--model", metavar="NAME", help="only jobs of this model")
        parser.add_argument("-n", "--limit", metavar="COUNT", type=asking.positive, default=100, help="default: 100")
        parser.add_argument("--reason", metavar="TEXT", default="", type=asking.short, help="why it is cancelled")
    if name in _BELOW:
        verbs = parser.add_subparsers(metavar="VERB", prog=f"supervisor {name}")
        _BELOW[name](verbs)
    parser.set_defaults(command=_COMMANDS[name])


def _ordering(name: str) -> Callable[[Any], None]:
    """The verbs that change something; their module is only needed when they are typed, or described."""

    def add(verbs: Any) -> None:
        from supervisor.control.commands import ordering

        ordering.add_below(name, verbs)

    return add


_BELOW = {name: _ordering(name) for name in ("engines", "gpus", "holds")}


# ---- the verbs


def _show(arguments: argparse.Namespace, route: str, show: Callable[[Any, Paper], str]) -> int:
    if not arguments.watch:
        return tell(arguments, ask(arguments, "GET", route), show)
    from supervisor.control.commands.watching import watch

    return watch(arguments, lambda: ask(arguments, "GET", route), show)


def _status(arguments: argparse.Namespace) -> int:
    return _show(arguments, "/v1/status", page.page)


def _engines(arguments: argparse.Namespace) -> int:
    return _show(arguments, "/v1/engines", lambda seen, paper: page.models(seen["engines"], paper))


def _gpus(arguments: argparse.Namespace) -> int:
    return _show(arguments, "/v1/gpus", lambda seen, paper: page.gpus(seen["gpus"], seen["reason"], paper))


def _holds(arguments: argparse.Namespace) -> int:
    def show(seen: Any, paper: Paper) -> str:
        parts = [page.holds(seen["holds"], now_of(seen), paper), *page.ahead(seen, paper)]
        return "\n\n".join(parts)

    return _show(arguments, "/v1/holds", show)


def _jobs(arguments: argparse.Namespace) -> int:
    match arguments.words:
        case []:
            wanted = {"state": arguments.state, "model": arguments.model, "limit": arguments.limit}
            route = f"/v1/jobs?{urlencode({name: value for name, value in wanted.items() if value})}"
            return _show(arguments, route, jobs)
        case ["cancel", job]:
            from supervisor.control.commands import ordering

            return ordering.cancel(arguments, job)
        case [job] if job != "cancel":
            return _show(arguments, f"/v1/jobs/{quote(job, safe='')}", one_job)
    raise asking.Usage("supervisor jobs takes nothing, one job, or `cancel` and one job")


_COMMANDS: dict[str, asking.Command] = {
    "status": _status,
    "engines": _engines,
    "gpus": _gpus,
    "holds": _holds,
    "jobs": _jobs,
}


# ---- pages of jobs

# What an attempt waits for that is accepted and does not run.
_PHASES = {
    "accept": "It is being checked.",
    "fetch": "Its files are being fetched.",
    "queue": "It waits for its turn.",
    "load": "Its model is being loaded.",
    "upload": "Its results are being uploaded.",
}


def jobs(seen: Mapping[str, Any], paper: Paper) -> str:
    """A table of jobs: what is open, the oldest first, then what ended."""
    items = seen["jobs"]
    if not items:
        return "There are no jobs."
    now = now_of(seen)
    rows = []
    for one in items:
        age = span(max(0.0, now - one["accepted"]))
        cells = [one["job"], one["model"], one["kind"], one["outcome"] or one["state"], age, _took(one, now)]
        rows.append(Row([*cells, _progress(one)], _fault(one) or _PHASES.get(one["phase"] * (not one["outcome"]), "")))
    head = ("JOB", "MODEL", "KIND", "STATE", "AGE", "RAN", "DONE")
    return table(head, rows, paper, right=(6,), state=3, whole=(0,), spare=(2,))


def _took(one: Mapping[str, Any], now: float) -> str:
    """How long it has been running, or ran."""
    return "" if one["started"] is None else span(max(0.0, (one["ended"] or now) - one["started"]))


def _progress(one: Mapping[str, Any]) -> str:
    if one["done"] is None:
        return ""
    return f"{one['done']}/{one['total']}" if one["total"] else str(one["done"])


def _fault(one: Mapping[str, Any]) -> str:
    if one["fault"] in ("", "cancelled"):  # whoever cancels is at no fault, and the state says it
        return ""
    return f"{one['fault']}: the {one['owner']}'s fault"


def one_job(seen: Mapping[str, Any], paper: Paper) -> str:
    """Every attempt of one job, the latest first."""
    attempts = seen["attempts"]
    head = wrapped(f"{attempts[0]['job']}: {attempts[0]['kind']} on {attempts[0]['model']}", paper)
    return "\n\n".join(["\n".join(head), *(_attempt(one, now_of(seen), paper) for one in attempts)])


def _attempt(one: Mapping[str, Any], now: float, paper: Paper) -> str:
    state = one["outcome"] or one["state"]
    times = [f"accepted {clock(one['accepted'])} ({ago(one['accepted'], now)})"]
    if one["started"] is not None:
        times += [f"began to run after {span(one['started'] - one['accepted'])}", f"ran {_took(one, now)}"]
    what = [
        f"{_progress(one)} done" if _progress(one) else "",
        count(one["chunks"], "chunk") if one["chunks"] else "",
        *(f"{plain(name)} {value:.10g}" for name, value in one["usage"].items()),
    ]
    lines = [f"attempt {one['attempt']}: {paper.state(state)} ({one['phase']})"]
    for facts in (joined(times), joined(what), _fault(one)):
        lines += wrapped(facts, paper, indent="  ") if facts else []
    return "\n".join(lines)
