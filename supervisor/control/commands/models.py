"""`supervisor models …` while a supervisor runs: load and unload, and pulls and removals that it carries out itself.

A pull in the supervisor goes on when its terminal is closed, and two of the same are one. It is the same command, in a
child of the supervisor; so what only this process knows makes it a pull of this process: another models folder, and
variables of huggingface-hub (a token, above all) in this environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from supervisor import pull
from supervisor.completion import verbs_of
from supervisor.control.client import ask, follow
from supervisor.control.commands import ordering
from supervisor.control.commands.asking import add_verb, as_json, short
from supervisor.control.commands.layout import say
from supervisor.control.commands.place import socket_path
from supervisor.errors import ConfigError, ExitCode, SupervisorError
from supervisor.interrupts import ended
from supervisor.pull_progress import ProgressLine, size
from supervisor.pull_source import PullError
from supervisor.pull_wire import Event

HERE = "--here"
REMOVE_S = 90.0  # longer than the supervisor gives the removal (`REMOVE_S` in pulls.py)
_LAST = ("done", "failed")
_EXAMPLES = {
    "search": "  supervisor models search\n  supervisor models search whisper small\n",
    "pull": "  supervisor models pull qwen3-4b\n  supervisor models pull owner/repo:model-Q4_K_M.gguf --name chat\n",
    "list": "  supervisor models list\n  supervisor models list --json\n",
    "remove": "  supervisor models remove chat\n  supervisor models remove chat --keep-files\n",
    "verify": "  supervisor models verify\n  supervisor models verify chat --json\n",
    "gc": "  supervisor models gc --budget 50GB --dry-run\n  supervisor models gc --budget 50GB\n",
    "load": "  supervisor models load chat\n  supervisor models load chat --json\n",
    "unload": "  supervisor models unload chat\n  supervisor models unload chat --reason 'a game'\n",
}


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `supervisor models`."""
    pull.add_arguments(parser)
    parser.set_defaults(command=main, json=False, config=None)
    verbs = verbs_of(parser)
    assert verbs is not None
    for name, made in list(verbs.choices.items()):
        made.formatter_class = argparse.RawDescriptionHelpFormatter
        made.epilog = f"examples:\n{_EXAMPLES[name]}"
        if name in ("pull", "remove"):
            if name == "remove":
                made.add_argument("--json", action="store_true", help="for programs")
            made.add_argument(HERE, action="store_true", help="in this process, also when a supervisor runs")
    made = add_verb(verbs, "load", "load a model now", ordering.load, _EXAMPLES["load"])
    made.add_argument("model", metavar="NAME")
    made = add_verb(verbs, "unload", "end the engine, which frees its memory", ordering.unload, _EXAMPLES["unload"])
    made.add_argument("model", metavar="NAME")
    made.add_argument("--reason", metavar="TEXT", default="", type=short, help="what others are told")


def main(arguments: argparse.Namespace) -> int:
    """Run one of the commands; returns its exit code."""
    if arguments.models_command in ("pull", "remove"):
        socket = _running(arguments)
        if socket is not None and arguments.models_command == "pull":
            goes_on = "the pull goes on in the supervisor; run the same command again to follow it"
            return ended(lambda: _pull(arguments, socket), goes_on)
        if socket is not None:
            return ended(lambda: _remove(arguments, socket), "stopped")
        if arguments.models_command == "remove" and arguments.json:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                code = pull.main(arguments)
            if code == ExitCode.STOPPED:
                say(as_json({"message": said.getvalue().strip()}))
            return code
    return pull.main(arguments)


def _running(arguments: argparse.Namespace) -> Path | None:
    """The socket of the supervisor that is to do it; None when this process is."""
    knows_more = any(name.startswith("HF_") for name in os.environ)
    if arguments.here or arguments.models_dir or knows_more:
        return None
    try:
        socket = socket_path(arguments.config)
        # The supervisor itself runs this command in a child.
        return socket if ask(socket, "GET", "/v1/health")["pid"] != os.getppid() else None
    except (ConfigError, SupervisorError):
        return None


def _pull(arguments: argparse.Namespace, socket: Path) -> int:
    line = None if arguments.json else ProgressLine(sys.stderr)
    last: tuple[str, Mapping[str, Any]] = ("", {})
    try:
        for event in follow(socket, "/v1/models/pull", "POST", _order(arguments)):
            last = event.name, event.data
            if line is None:
                sys.stdout.write(json.dumps({"t": event.name, **event.data}, ensure_ascii=False) + "\n")
                sys.stdout.flush()
            elif event.name not in _LAST:
                line.say(msgspec.convert({"t": event.name, **event.data}, Event))
    except SupervisorError as error:
        if line is None:
            say(json.dumps({"t": "failed", "message": str(error)}, ensure_ascii=False))
        raise
    finally:
        if line is not None:
            line.close()
    name, data = last
    if name == "done":
        if line is not None:
            sys.stdout.write(
                f"{data['name']}: {size(data['bytes'])} in {data['folder']}, engine {data['engine']}.\n"
                f"It is in {data['config']}.\n"
            )
        return int(ExitCode.STOPPED)
    if name == "failed":
        raise PullError(str(data["message"]))
    raise PullError("The supervisor has ended; run the same command again to go on where it stopped.")


def _order(arguments: argparse.Namespace) -> dict[str, object]:
    """The pull, with every path as it is meant here."""
    source = arguments.source
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser().absolute())
    order = {name: getattr(arguments, name) for name in ("name", "engine", "file", "sha256", "offline", "force")}
    if arguments.token_file:
        order["token_file"] = str(Path(arguments.token_file).expanduser().absolute())
    return {"source": source, **{name: value for name, value in order.items() if value}}


def _remove(arguments: argparse.Namespace, socket: Path) -> int:
    order = {"name": arguments.name, "keep_files": arguments.keep_files}
    answer = ask(socket, "POST", "/v1/models/remove", order, patience_s=REMOVE_S)
    say(as_json(answer) if arguments.json else answer["message"])
    return int(ExitCode.STOPPED)
