"""`coordinator jobs`: look at jobs, try failed ones again, cancel; over HTTP, from a coordinator that serves.

The key is that of a client (its tenant's jobs), or an admin's (any job by its id; `logs` needs one). Without
`--key-file` it is taken from COORDINATOR_KEY, or it is the client key in the state folder.
"""

from __future__ import annotations

import argparse
import sys
import urllib.parse
from typing import Any

from coordinator.bodies import whole_number
from coordinator.cli.http import AskError, ask, asking, quoted
from coordinator.cli.showing import cell, date, fault_cell, line, say, table
from coordinator.kept_lines import MOST_LINES
from coordinator.worker_lines import MOST_CHARS

OK, FAILED = 0, 1
MOST_SHOWN = 100


def add_parser(commands: Any, shared: argparse.ArgumentParser, parser: type[argparse.ArgumentParser]) -> None:
    """Add `jobs` with its verbs."""
    options = asking(parser)
    jobs = commands.add_parser("jobs", help="list, show, try again and cancel jobs of a running coordinator")
    verbs = jobs.add_subparsers(required=True, metavar="VERB", parser_class=parser)
    several = verbs.add_parser("list", parents=[shared, options], help="the newest jobs of the key's tenant")
    several.add_argument("--state-is", choices=("queued", "running", "succeeded", "failed", "cancelled"))
    several.add_argument("--dead", action="store_true", help="only those that failed without their caller's doing")
    several.add_argument("--limit", type=int, choices=range(1, MOST_SHOWN + 1), default=20, metavar="N")
    several.set_defaults(command=_list)
    for verb, text, command in (
        ("show", "one job with its attempts", _show),
        ("retry", "put failed jobs back into the queue with all their tries", _retry),
        ("cancel", "cancel jobs that have not ended", _cancel),
    ):
        one = verbs.add_parser(verb, parents=[shared, options], help=text)
        one.add_argument("ids", nargs=1 if verb == "show" else "+", metavar="ID")
        one.set_defaults(command=command)
    logs = verbs.add_parser(
        "logs", parents=[shared, options], help="what workers' logs said of a job lately; with an admin's key"
    )
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--worker", default="", metavar="NAME", help="only lines of this worker")
    logs.add_argument("-n", "--lines", type=_count, default=200, metavar="COUNT", help="the latest so many (200)")
    logs.set_defaults(command=_logs)


def _count(text: str) -> int:
    if (count := whole_number(text, 1, MOST_LINES)) is None:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST_LINES}, not {text[:50]!r}")
    return count


def _list(arguments: argparse.Namespace) -> int:
    query: dict[str, Any] = {"limit": arguments.limit}
    if arguments.state_is:
        query["state"] = arguments.state_is
    if arguments.dead:
        query["dead"] = 1
    answer = ask(arguments, "GET", f"/v1/jobs?{urllib.parse.urlencode(query)}")
    if arguments.json:
        return say(answer)
    rows = [("ID", "STATE", "KIND", "MODEL", "TRIES", "CREATED", "WORKER", "FAULT")]
    rows += [
        (
            job["id"],
            job["state"],
            job["kind"],
            cell(job["model"]),
            str(job["tries"]),
            date(job["created_ms"]),
            cell(job["worker"]),
            fault_cell(job["fault"]),
        )
        for job in answer["data"]
    ]
    table(rows)
    return OK


def _show(arguments: argparse.Namespace) -> int:
    job = ask(arguments, "GET", f"/v1/jobs/{quoted(arguments.ids[0])}")
    if arguments.json:
        return say(job)
    for name in ("id", "state", "kind", "model", "priority", "labels", "vram_gb_estimate", "batch"):
        if job.get(name) not in (None, {}, 0, ""):
            line(f"{name:12}  {cell(job[name])}")
    for name in ("created_ms", "run_after_ms", "started_ms", "finished_ms", "deadline_at_ms"):
        if job.get(name):
            line(f"{name.removesuffix('_ms'):12}  {date(job[name])}")
    if job["fault"]:
        line(f"{'fault':12}  {fault_cell(job['fault'], 1000)}")
    if job["attempts"]:
        line()
        rows = [("ATTEMPT", "WORKER", "BEGAN", "ENDED", "OUTCOME", "FAULT")]
        rows += [
            (
                str(one["number"]),
                cell(one["worker"]),
                date(one["began_ms"]),
                date(one["ended_ms"]),
                one["outcome"],
                fault_cell(one["fault"]),
            )
            for one in job["attempts"]
        ]
        table(rows)
    return OK


def _logs(arguments: argparse.Namespace) -> int:
    query = urllib.parse.urlencode({"limit": arguments.lines, "worker": arguments.worker})
    answer = ask(arguments, "GET", f"/v1/admin/jobs/{quoted(arguments.id)}/logs?{query}")
    if arguments.json:
        return say(answer)
    for one in answer["data"]:
        at, level = cell(one["at"] or date(one["told_ms"])), cell(one["level"])
        line(f"{at} {level:8} {cell(one['worker'])}: {cell(one['message'], MOST_CHARS)}")
    for note in _missing(answer, arguments.lines):
        sys.stderr.write(note + "\n")
    return OK


def _missing(answer: dict[str, Any], asked: int) -> list[str]:
    """What is not there of so many lines, in sentences."""
    notes = []
    if not answer["data"]:
        notes.append("No line about this job is kept; lines are in memory only, and come from workers that ship them.")
    if answer["more"]:
        # Fewer than were asked for: the answer was full by its characters, and a larger number changes nothing.
        helps = len(answer["data"]) >= asked < MOST_LINES
        cure = "-n shows more." if helps else "one answer has no room for more; --worker asks for one worker's."
        notes.append(f"{answer['more']} older lines are kept; {cure}")
    if answer["since_ms"] > answer["created_ms"]:
        notes.append(f"Of what was told before {date(answer['since_ms'])} (UTC) lines may be missing.")
    notes += [
        f"{cell(name)} has lost {count} lines on their way since the coordinator started, of whatever job."
        for name, count in sorted(answer["lost"].items())
    ]
    notes += [f"Replica {cell(name)} did not answer: it may have more lines." for name in answer["not_asked"]]
    return notes


def _retry(arguments: argparse.Namespace) -> int:
    return _each(arguments, "retry")


def _cancel(arguments: argparse.Namespace) -> int:
    return _each(arguments, "cancel")


def _each(arguments: argparse.Namespace, verb: str) -> int:
    """Ask for each; one that is refused does not keep the others from it, and is the exit code."""
    answers, code = [], OK
    for name in arguments.ids:
        try:
            answers.append(ask(arguments, "POST", f"/v1/jobs/{quoted(name)}/{verb}"))
        except AskError as error:
            sys.stderr.write(f"coordinator: {name}: {error}\n")
            code = FAILED
            continue
        if not arguments.json:
            line(f"{answers[-1]['id']}  {answers[-1]['state']}")
    if arguments.json:
        say(answers)
    return code
