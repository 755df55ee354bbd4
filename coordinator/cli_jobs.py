"""`coordinator jobs`: look at jobs, try failed ones again, cancel; over HTTP, from a coordinator that serves.

The key is that of a client (its tenant's jobs), or an admin's (any job by its id). Without `--key-file` it is taken
from COORDINATOR_KEY, or it is the client key in the state folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator import config as configuration

OK, FAILED = 0, 1
KEY_VARIABLE = "COORDINATOR_KEY"
KEY_FILE = "client.key"
ANSWER_S = 30.0
MOST_SHOWN = 100
_CELL_CHARS = 60


class JobsError(Exception):
    """The coordinator cannot be asked, or has refused; the sentence says which."""


def add_parser(commands: Any, shared: argparse.ArgumentParser, parser: type[argparse.ArgumentParser]) -> None:
    """Add `jobs` with its verbs."""
    asking = parser(add_help=False)
    asking.add_argument("--url", help="of the coordinator; default: where coordinator.toml lets it listen")
    asking.add_argument("--key-file", type=Path, metavar="FILE", help=f"file with an API key (also {KEY_VARIABLE})")
    asking.add_argument("--json", action="store_true", help="print what the coordinator answered")

    jobs = commands.add_parser("jobs", help="list, show, try again and cancel jobs of a running coordinator")
    verbs = jobs.add_subparsers(required=True, metavar="VERB", parser_class=parser)
    several = verbs.add_parser("list", parents=[shared, asking], help="the newest jobs of the key's tenant")
    several.add_argument("--state-is", choices=("queued", "running", "succeeded", "failed", "cancelled"))
    several.add_argument("--dead", action="store_true", help="only those that failed without their caller's doing")
    several.add_argument("--limit", type=int, choices=range(1, MOST_SHOWN + 1), default=20, metavar="N")
    several.set_defaults(command=_list)
    for verb, text, command in (
        ("show", "one job with its attempts", _show),
        ("retry", "put failed jobs back into the queue with all their tries", _retry),
        ("cancel", "cancel jobs that have not ended", _cancel),
    ):
        one = verbs.add_parser(verb, parents=[shared, asking], help=text)
        one.add_argument("ids", nargs=1 if verb == "show" else "+", metavar="ID")
        one.set_defaults(command=command)


def _list(arguments: argparse.Namespace) -> int:
    query: dict[str, Any] = {"limit": arguments.limit}
    if arguments.state_is:
        query["state"] = arguments.state_is
    if arguments.dead:
        query["dead"] = 1
    answer = _ask(arguments, "GET", f"?{urllib.parse.urlencode(query)}")
    if arguments.json:
        return _say(answer)
    rows = [("ID", "STATE", "KIND", "MODEL", "TRIES", "CREATED", "WORKER", "FAULT")]
    rows += [
        (
            job["id"],
            job["state"],
            job["kind"],
            _cell(job["model"]),
            str(job["tries"]),
            _date(job["created_ms"]),
            _cell(job["worker"]),
            _fault(job["fault"]),
        )
        for job in answer["data"]
    ]
    _table(rows)
    return OK


def _show(arguments: argparse.Namespace) -> int:
    job = _ask(arguments, "GET", f"/{_quoted(arguments.ids[0])}")
    if arguments.json:
        return _say(job)
    for name in ("id", "state", "kind", "model", "priority", "labels", "vram_gb_estimate", "batch"):
        if job.get(name) not in (None, {}, 0, ""):
            _line(f"{name:12}  {_cell(job[name])}")
    for name in ("created_ms", "run_after_ms", "started_ms", "finished_ms", "deadline_at_ms"):
        if job.get(name):
            _line(f"{name.removesuffix('_ms'):12}  {_date(job[name])}")
    if job["fault"]:
        _line(f"{'fault':12}  {_fault(job['fault'], 1000)}")
    if job["attempts"]:
        _line()
        rows = [("ATTEMPT", "WORKER", "BEGAN", "ENDED", "OUTCOME", "FAULT")]
        rows += [
            (
                str(one["number"]),
                _cell(one["worker"]),
                _date(one["began_ms"]),
                _date(one["ended_ms"]),
                one["outcome"],
                _fault(one["fault"]),
            )
            for one in job["attempts"]
        ]
        _table(rows)
    return OK


def _retry(arguments: argparse.Namespace) -> int:
    return _each(arguments, "retry")


def _cancel(arguments: argparse.Namespace) -> int:
    return _each(arguments, "cancel")


def _each(arguments: argparse.Namespace, verb: str) -> int:
    """Ask for each; one that is refused does not keep the others from it, and is the exit code."""
    answers, code = [], OK
    for name in arguments.ids:
        try:
            answers.append(_ask(arguments, "POST", f"/{_quoted(name)}/{verb}"))
        except JobsError as error:
            sys.stderr.write(f"coordinator: {name}: {error}\n")
            code = FAILED
            continue
        if not arguments.json:
            _line(f"{answers[-1]['id']}  {answers[-1]['state']}")
    if arguments.json:
        _say(answers)
    return code


# ---- asking -------------------------------------------------------------------------------------------------


def _ask(arguments: argparse.Namespace, method: str, path: str) -> Any:
    """What /v1/jobs answers. Raises JobsError."""
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    url = (arguments.url or f"http://{settings.listen}").rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise JobsError(f"--url: Expected http:// or https://, not {url!r}.")
    key = _key(arguments.key_file, configuration.state_dir(settings))
    request = urllib.request.Request(f"{url}/v1/jobs{path}", method=method, headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise JobsError(_refusal(error)) from None
    except urllib.error.URLError as error:
        raise JobsError(f"{url} does not answer: {error.reason}; is it running, and is --url right?") from None
    except (OSError, ValueError) as error:
        raise JobsError(f"{url} gave no answer of a coordinator: {error}.") from None


def _key(file: Path | None, state: Path) -> str:
    if file is None and (key := os.environ.get(KEY_VARIABLE, "").strip()):
        return key
    path = file or state / KEY_FILE
    try:
        return path.read_text().strip()
    except OSError as error:
        raise JobsError(f"{path}: {error.strerror}; give --key-file, --state or {KEY_VARIABLE}.") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The coordinator answered {error.code}."


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


# ---- showing ------------------------------------------------------------------------------------------------


def _line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def _say(answer: Any) -> int:
    _line(json.dumps(answer, indent=2))
    return OK


def _cell(value: Any, chars: int = _CELL_CHARS) -> str:
    """Fit for a terminal, whoever wrote it."""
    text = ", ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:chars]


def _fault(fault: dict[str, Any] | None, chars: int = _CELL_CHARS) -> str:
    return _cell(f"{fault['code']}: {fault['message']}", chars) if fault else ""


def _date(ms: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000)) if ms else ""


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
