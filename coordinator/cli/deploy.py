"""`coordinator deploy`, `undeploy`, `deployments`: what the fleet is to serve, asked of a coordinator that serves."""

from __future__ import annotations

import argparse
import json
from typing import Any

from coordinator.cli.http import AskError, ask, asking, quoted
from coordinator.cli.showing import cell, line, say, table

OK = 0
EXAMPLES = """examples:
  coordinator deploy llama-3 --source my-team/llama-3-gguf@0123…cdef --file Q4_K_M --replicas 6 --on gpu=L40S
  coordinator deploy llama-3 --replicas 2          # the same model, on fewer workers
  coordinator deploy llama-3 --sha256 … --source https://models.example.com/llama-3-v2.gguf
  coordinator deployments llama-3                  # wanted, ready, and why not, per worker

The key must be an admin's. A worker takes part when its owner allows it: [coordinator.deploy] sources, worker.toml.
"""


def add_parsers(commands: Any, shared: argparse.ArgumentParser, parser: type[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    options = asking(parser)
    deploy = commands.add_parser(
        "deploy",
        parents=[shared, options],
        help="have workers fetch, load and serve a model; also another revision, number or choice of workers",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    deploy.add_argument("name", metavar="MODEL", help="what clients ask for")
    deploy.add_argument("--source", metavar="WHERE", help="https://… of a file, or owner/repo@COMMIT of Hugging Face")
    deploy.add_argument("--sha256", metavar="HEX", help="digest of the file")
    deploy.add_argument("--file", help="of a repository: the file, or a part of its name such as Q4_K_M")
    deploy.add_argument("--engine", help="default: what the file says")
    deploy.add_argument("--options", metavar="JSON", help='load options of the engine: {"n_ctx": 8192}')
    deploy.add_argument("--replicas", type=int, metavar="N", help="how many workers; default: 1, or as before")
    deploy.add_argument(
        "--on",
        action="append",
        metavar="KEY=VALUE",
        help="gpu=NAME, vram_gb=N, worker=ID, or a label of the worker; may be given again; --on any lifts it",
    )
    deploy.set_defaults(command=_deploy)
    undeploy = commands.add_parser("undeploy", parents=[shared, options], help="let all workers go of a model")
    undeploy.add_argument("name", metavar="MODEL")
    undeploy.set_defaults(command=_undeploy)
    show = commands.add_parser("deployments", parents=[shared, options], help="what is wanted, ready, and why not")
    show.add_argument("name", metavar="MODEL", nargs="?", help="one, with its workers")
    show.set_defaults(command=_show)


def _deploy(arguments: argparse.Namespace) -> int:
    names = ("source", "sha256", "file", "engine", "replicas")
    body: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.options is not None:
        try:
            body["options"] = json.loads(arguments.options)
        except ValueError as error:
            raise AskError(f"--options: expected an object in JSON: {error}.") from None
    if arguments.on is not None:
        body["on"] = _on(arguments.on)
    return _one(arguments, ask(arguments, "PUT", _path(arguments), body))


def _undeploy(arguments: argparse.Namespace) -> int:
    return _one(arguments, ask(arguments, "DELETE", _path(arguments)))


def _show(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        return _one(arguments, ask(arguments, "GET", _path(arguments)))
    answer = ask(arguments, "GET", "/v1/deployments")
    if arguments.json:
        return say(answer)
    rows = [("MODEL", "REVISION", "WANTED", "READY", "ON", "SOURCE")]
    rows += [
        (
            cell(one["name"]),
            _revision(one),
            str(one["wanted"]),
            str(one["ready"]),
            cell(one["on"]) or "any",
            cell(one["source"]),
        )
        for one in answer["data"]
    ]
    table(rows)
    return OK


def _one(arguments: argparse.Namespace, shown: dict[str, Any]) -> int:
    if arguments.json:
        return say(shown)
    line(f"{cell(shown['name'])}: {shown['ready']} of {shown['wanted']} ready, revision {_revision(shown)}")
    rows = [("WORKER", "REVISION", "STATE", "WHY")]
    rows += [(cell(one["worker"]), one["revision"], one["state"], cell(one["why"], 200)) for one in shown["workers"]]
    rows += [(cell(one["worker"]), "", "not chosen", cell(one["why"], 200)) for one in shown["not_chosen"]]
    if len(rows) > 1:
        table(rows)
    if (more := shown["not_chosen_total"] - len(shown["not_chosen"])) > 0:
        line(f"and {more} more workers that were not chosen")
    return OK


def _revision(shown: dict[str, Any]) -> str:
    if shown["leaving"]:
        return "leaving"
    if shown["serving"] in ("", shown["revision"]):
        return str(shown["revision"])
    return f"{shown['revision']} ({shown['serving']} serves until it is ready)"


def _on(words: list[str]) -> dict[str, str]:
    if words == ["any"]:
        return {}
    pairs = [word.partition("=") for word in words]
    if wrong := next((word for word, (key, _, value) in zip(words, pairs, strict=True) if not key or not value), None):
        raise AskError(f"--on {wrong}: write KEY=VALUE, such as gpu=L40S or trusted=true.")
    return {key: value for key, _, value in pairs}


def _path(arguments: argparse.Namespace) -> str:
    return f"/v1/deployments/{quoted(arguments.name)}"
