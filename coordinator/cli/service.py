"""`coordinator service`: install the coordinator as a service of systemd, remove it, and ask how it is."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator import config as configuration
from coordinator.server import Refusal
from coordinator.service import CONFIG_CREDENTIAL, MARK, NAME, ServicePlan, unit, unreachable

OK, FAILED = 0, 1
UNITS = Path("/etc/systemd/system")
Call = Callable[[Sequence[str]], int]


def add_parser(commands: Any, shared: argparse.ArgumentParser, kind: type[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `coordinator`."""
    service = commands.add_parser("service", help="run the coordinator as a service of systemd")
    verbs = service.add_subparsers(required=True, metavar="VERB", parser_class=kind)
    install = verbs.add_parser("install", help="write the unit, and start it now and at every boot")
    install.add_argument("--config", type=Path, metavar="FILE", help="coordinator.toml; may stay root's, mode 0600")
    install.add_argument(
        "--credential",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a file with a secret; in coordinator.toml it is named NAME, without a folder",
    )
    install.add_argument("--environment-file", metavar="FILE", default="", help="with COORDINATOR_STORE=… for example")
    install.add_argument("--print", action="store_true", dest="only_print", help="print the unit and change nothing")
    install.set_defaults(command=_install)
    for verb, text, function in (
        ("uninstall", "stop it and remove the unit; its state stays", _uninstall),
        ("status", "ask systemd how it is", _status),
    ):
        verbs.add_parser(verb, help=text).set_defaults(command=function)
    for parser in verbs.choices.values():
        parser.add_argument("--name", default=NAME, help=f"of the unit; default {NAME}")


def _systemctl(words: Sequence[str]) -> int:
    try:
        return subprocess.run(["systemctl", *words], check=False).returncode
    except FileNotFoundError:
        raise Refusal("There is no systemctl here; run `coordinator serve` under what starts your services.") from None


def plan(arguments: argparse.Namespace) -> ServicePlan:
    """What the arguments ask for. Raises Refusal."""
    settings = configuration.load(arguments.config)
    credentials = {}
    for given in arguments.credential:
        name, equals, path = given.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise Refusal(f"--credential: Expected NAME=FILE, not {given!r}.")
        credentials[name] = _file(path)
    if CONFIG_CREDENTIAL in credentials:
        raise Refusal(f"--credential: {CONFIG_CREDENTIAL} is the configuration; give it with --config.")
    places = (os.path.realpath(sys.executable), sys.base_prefix + "/lib", str(Path(__file__).resolve()))
    for place in (sys.executable, *places):
        if folder := unreachable(place):
            cure = "install the program where all may read it, in /opt for example"
            raise Refusal(f"The service's user cannot pass {folder}, on the way to {place}; {cure}.")
    return ServicePlan(
        python=sys.executable,
        places=places,
        name=arguments.name,
        config=_file(str(arguments.config)) if arguments.config else "",
        credentials=credentials,
        drain_s=settings.drain_s,
        port=int(settings.listen.rpartition(":")[2] or 0),
        environment=_file(arguments.environment_file) if arguments.environment_file else "",
    )


def _file(path: str) -> str:
    found = Path(path).expanduser().resolve()
    if not found.is_file():
        raise Refusal(f"{path}: There is no such file.")
    return str(found)


def _install(arguments: argparse.Namespace) -> int:
    text = unit(plan(arguments))
    if arguments.only_print:
        sys.stdout.write(text)
        return OK
    return installed(text, UNITS / f"{arguments.name}.service", _systemctl)


def installed(text: str, place: Path, call: Call) -> int:
    """Write the unit and start it. Raises Refusal for a unit that somebody else wrote, OSError."""
    _ours(place)
    place.write_text(text)
    if call(["daemon-reload"]) or call(["enable", place.name]) or call(["restart", place.name]):
        sys.stderr.write(f"coordinator: {place.name} did not start; look at: journalctl -u {place.name}\n")
        return FAILED
    sys.stdout.write(f"{place.name} runs, now and after every boot.\n")
    return OK


def _ours(place: Path) -> bool:
    if not place.exists():
        return False
    if not place.read_text().startswith(MARK):
        raise Refusal(f"{place} was written by somebody else; move it away, or give another --name.")
    return True


def _uninstall(arguments: argparse.Namespace) -> int:
    return uninstalled(UNITS / f"{arguments.name}.service", _systemctl)


def uninstalled(place: Path, call: Call) -> int:
    """Stop it and remove the unit; nothing to do is no trouble. Raises Refusal, OSError."""
    if not _ours(place):
        sys.stdout.write(f"There is no {place.name}.\n")
        return OK
    call(["disable", "--now", place.name])
    place.unlink()
    call(["daemon-reload"])
    sys.stdout.write(f"Removed {place.name}; its state stays in /var/lib/private/{place.stem}.\n")
    return OK


def _status(arguments: argparse.Namespace) -> int:
    return _systemctl(["status", "--no-pager", f"{arguments.name}.service"])
