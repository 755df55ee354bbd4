"""`coordinator keys`, `tenants`, `workers` and `registrations`: what an admin decides, beside a running server.

They work on the register: the file in the state folder, or the store's PostgreSQL. A running coordinator, and every
replica, takes a decision up within a second.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from coordinator import config as configuration
from coordinator.cli.joining import join_address, join_line
from coordinator.cli.showing import cell, line, say, table
from coordinator.enrolments import Enrolments
from coordinator.keys import DEFAULT_TENANT, SCOPES, KeyRefusal, Keys
from coordinator.register import FILE_NAME, open_register
from coordinator.register.known import Known
from coordinator.registrations import STATES, Registrations
from coordinator.tenants import Tenants

OK = 0
_REGISTRATIONS = ("ID", "STATE", "PROTOCOL", "MACHINE", "USER", "ADDRESS", "SECRET", "ASKED", "WORKER OR REASON")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@contextlib.contextmanager
def known(arguments: argparse.Namespace) -> Iterator[Known]:
    """The register of the coordinator that the arguments name. Raises StoreError, OSError."""
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    state = configuration.state_dir(settings)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    where = configuration.store_address(settings)
    register = open_register(where, state / FILE_NAME, pooled=settings.store_pooled)
    try:
        yield Known(register)
    finally:
        register.close()


def operator() -> str:
    """Who runs the command, for the log of admin acts."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{user}@{socket.gethostname()}" + (f" (for {behind!r})" if behind and behind != user else "")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def minute(ms: int | None) -> str:
    """An instant as the lists show it."""
    return "" if ms is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(ms / 1000))


def names(text: str) -> list[str]:
    """Names with commas between them; "" is none."""
    return [name.strip() for name in text.split(",")] if text.strip() else []


def seconds(text: str) -> float:
    """A length of time: 90s, 30m, 2h, 7d."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m, 2h or 7d, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 for no limit, not {text!r}")
    return int(text)


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}")
    return value


def add_parsers(commands: Any, shared: argparse.ArgumentParser, kind: type[argparse.ArgumentParser]) -> None:
    """Describe the commands."""

    def family(name: str, help_: str) -> Any:
        return commands.add_parser(name, help=help_).add_subparsers(required=True, metavar="VERB", parser_class=kind)

    listing = kind(add_help=False)
    listing.add_argument("--json", action="store_true", help="for programs")

    verbs = family("keys", "make, list and revoke API keys")
    create = verbs.add_parser("create", parents=[shared], help="make a key and print it once")
    create.add_argument("--scope", choices=SCOPES, required=True)
    create.add_argument("--name", default="")
    create.add_argument("--tenant", default=DEFAULT_TENANT)
    create.add_argument("--worker", default="", help="the only worker id that a worker key admits")
    create.add_argument("--rpm", type=_limit, default=0, metavar="N", help="requests per minute; the stricter limit")
    create.add_argument("--concurrent", type=_limit, default=0, metavar="N", help="… of key and tenant holds")
    create.add_argument("--models", type=names, default=[], metavar="A,B", help="the only models that it may use")
    create.set_defaults(command=_keys_create)
    verbs.add_parser("list", parents=[shared, listing], help="show all keys, without their secrets").set_defaults(
        command=_keys_list
    )
    revoke = verbs.add_parser("revoke", parents=[shared], help="end a key and what is open with it, within a second")
    revoke.add_argument("prefix")
    revoke.set_defaults(command=_keys_revoke)

    verbs = family("tenants", "set the share, the limits and the models of a tenant")
    verbs.add_parser("list", parents=[shared, listing], help="show all tenants").set_defaults(command=_tenants_list)
    change = verbs.add_parser("set", parents=[shared], help="set what is given, and leave the rest")
    change.add_argument("name")
    change.add_argument("--weight", type=_weight, help="its share when several wait; others have 1")
    change.add_argument("--rpm", type=_limit, metavar="N", help="requests per minute of all its keys; 0 is no limit")
    change.add_argument("--concurrent", type=_limit, metavar="N", help="jobs that may be open at once; 0 is no limit")
    change.add_argument("--models", type=names, metavar="A,B", help="the only models it may use; '' is all")
    change.add_argument("--store-content", choices=("yes", "no"), help="no: prompts and outputs go once delivered")
    change.set_defaults(command=_tenants_set)

    verbs = family("workers", "admit a worker by a one-time token")
    enrol = verbs.add_parser("enrol", parents=[shared], help="make a token that admits one worker, and print it once")
    enrol.add_argument("--name", default="", help="the id that the worker gets; default: its own")
    enrol.add_argument("--url", default="", help="by which workers reach this coordinator, for the line to copy")
    enrol.add_argument("--expires", type=seconds, default=3600.0, metavar="TIME", help="90s, 30m, 2h, 7d; default 1h")
    enrol.set_defaults(command=_workers_enrol)
    verbs.add_parser("tokens", parents=[shared, listing], help="show the tokens of the last month").set_defaults(
        command=_workers_tokens
    )
    withdraw = verbs.add_parser("revoke-token", parents=[shared], help="make a token that was not used useless")
    withdraw.add_argument("prefix")
    withdraw.set_defaults(command=_workers_revoke)
    _add_registrations(family("registrations", "admit workers that ask for it"), shared, listing)


def _add_registrations(verbs: Any, shared: argparse.ArgumentParser, listing: argparse.ArgumentParser) -> None:
    show = verbs.add_parser("list", parents=[shared, listing], help="show requests to be admitted")
    show.add_argument("--state-is", choices=STATES, help="only these")
    show.set_defaults(command=_registrations_list)
    approve = verbs.add_parser("approve", parents=[shared], help="admit a worker; it learns so within 30 s")
    approve.add_argument("id")
    approve.add_argument(
        "--secret", default="", metavar="DIGITS", help="only while its secret's hash begins so, as the list shows it"
    )
    approve.set_defaults(command=_registrations_approve)
    reject = verbs.add_parser("reject", parents=[shared], help="refuse a worker, or put out one that was admitted")
    reject.add_argument("id")
    reject.add_argument("--reason", default="", help="the worker's owner reads it")
    reject.set_defaults(command=_registrations_reject)


# ---- keys ---------------------------------------------------------------------------------------------------


def _keys_create(arguments: argparse.Namespace) -> int:
    if arguments.worker and arguments.scope != "worker":
        raise KeyRefusal("--worker goes with --scope worker only.")
    with known(arguments) as place:
        secret = Keys(place).create(
            arguments.scope,
            name=arguments.name,
            tenant=arguments.tenant,
            worker=arguments.worker,
            rpm=arguments.rpm,
            concurrent=arguments.concurrent,
            models=arguments.models,
            by=operator(),
        )
    line(secret)
    _note("This is the only time that the key is shown.")
    return OK


def _keys_list(arguments: argparse.Namespace) -> int:
    rows = [("PREFIX", "SCOPE", "TENANT", "STATE", "CREATED", "LIMITS", "NAME")]
    with known(arguments) as place:
        found = list(Keys(place).list())
    for key in found:
        state = "live" if key.revoked_ms is None else "revoked"
        name, limits = cell(key.name or key.worker), _limits(key.rpm, key.concurrent, key.models)
        rows.append((key.prefix, key.scope, cell(key.tenant), state, minute(key.created_ms), limits, name))
    return _listed(arguments, found, rows)


def _listed(arguments: argparse.Namespace, found: Sequence[Any], rows: Sequence[tuple[str, ...]]) -> int:
    """What was found, for programs or for people."""
    if arguments.json:
        return say(msgspec.to_builtins([_shown(one) for one in found]))
    table(rows)
    return OK


def _shown(one: msgspec.Struct) -> dict[str, Any]:
    """All of it but hashes, which are nobody's business."""
    return {name: value for name, value in msgspec.structs.asdict(one).items() if not isinstance(value, bytes)}


def _limits(rpm: int, concurrent: int, models: Sequence[str]) -> str:
    said = [f"{rpm}/min"] if rpm else []
    said += [f"{concurrent} at once"] if concurrent else []
    said += ["only " + ",".join(models)] if models else []
    return ", ".join(said) or "-"


def _keys_revoke(arguments: argparse.Namespace) -> int:
    with known(arguments) as place:
        key = Keys(place).revoke(arguments.prefix, by=operator())
    line(f"Revoked {key.prefix} ({key.scope}{', ' + key.name if key.name else ''}).")
    return OK


# ---- tenants ------------------------------------------------------------------------------------------------


def _tenants_list(arguments: argparse.Namespace) -> int:
    rows = [("TENANT", "WEIGHT", "KEEPS CONTENT", "LIMITS")]
    with known(arguments) as place:
        found = list(Tenants(place).list())
    for one in found:
        kept = "yes" if one.store_content else "no"
        rows.append((cell(one.name), f"{one.weight:g}", kept, _limits(one.rpm, one.concurrent, one.models)))
    return _listed(arguments, found, rows)


def _tenants_set(arguments: argparse.Namespace) -> int:
    with known(arguments) as place:
        tenant = Tenants(place).set(
            arguments.name,
            weight=arguments.weight,
            store_content=None if arguments.store_content is None else arguments.store_content == "yes",
            models=arguments.models,
            rpm=arguments.rpm,
            concurrent=arguments.concurrent,
            by=operator(),
        )
    kept = "keeps content" if tenant.store_content else "keeps no content"
    limits = _limits(tenant.rpm, tenant.concurrent, tenant.models)
    line(f"{tenant.name}: weight {tenant.weight:g}, {kept}, limits: {limits}")
    return OK


# ---- workers ------------------------------------------------------------------------------------------------


def _workers_enrol(arguments: argparse.Namespace) -> int:
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    address, hint = join_address(settings, arguments.url)  # a wrong --url makes no token
    with known(arguments) as place:
        token = Enrolments(place).create(arguments.expires, worker=arguments.name, by=operator())
    line(token)
    # Who takes the token from standard output has it; the log beside it, of a build say, must not keep a secret.
    command = join_line(address, token if sys.stdout.isatty() else "TOKEN")
    _note(f"It admits one worker, once. On its machine:\n{command}" + (f"\n{hint}" if hint else ""))
    return OK


def _workers_tokens(arguments: argparse.Namespace) -> int:
    rows = [("PREFIX", "STATE", "WORKER", "CREATED", "EXPIRES", "KEY")]
    now_ms = time.time_ns() // 1_000_000
    with known(arguments) as place:
        found = list(Enrolments(place).list())
    for one in found:
        times = (minute(one.created_ms), minute(one.expires_ms))
        rows.append((one.prefix, one.state(now_ms), one.worker or "(its own)", *times, one.used_by))
    return _listed(arguments, found, rows)


def _workers_revoke(arguments: argparse.Namespace) -> int:
    with known(arguments) as place:
        line(f"Revoked {Enrolments(place).revoke(arguments.prefix, by=operator()).prefix}.")
    return OK


# ---- registrations ------------------------------------------------------------------------------------------


def _registrations_list(arguments: argparse.Namespace) -> int:
    rows = [_REGISTRATIONS]
    with known(arguments) as place:
        found = list(Registrations(place).list(arguments.state_is))
    for one in found:
        machine, user, asked = cell(one.machine), cell(one.user), minute(one.created_ms)
        end = cell(one.reason) if one.state == "rejected" else one.worker or cell(one.install)
        rows.append((one.id, one.state, one.protocol, machine, user, one.address, one.secret_begins, asked, end))
    return _listed(arguments, found, rows)


def _registrations_approve(arguments: argparse.Namespace) -> int:
    with known(arguments) as place:
        one = Registrations(place).approve(arguments.id, arguments.secret, by=operator())
    line(f"Admitted {cell(one.machine) or one.install} as the worker {one.worker}.")
    return OK


def _registrations_reject(arguments: argparse.Namespace) -> int:
    with known(arguments) as place:
        one = Registrations(place).reject(arguments.id, arguments.reason, by=operator())
    line(f"Rejected {cell(one.machine) or one.install}.")
    return OK
