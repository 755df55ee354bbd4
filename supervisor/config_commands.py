"""`supervisor config …`: check, show, get, set, unset, migrate, schema, path."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from supervisor.config import SEARCH, Loaded, find_config, masked, read
from supervisor.config_keys import locate, parse_key, type_at, value_of
from supervisor.config_shown import origins
from supervisor.errors import ConfigError, ExitCode

EXAMPLES = """\
Weakest first: defaults, worker.toml, conf.d/*.toml beside it in order of
names, the environment (BULKHEAD__LIMITS__STALL_S=60 sets [limits] stall_s). The
token of a remote coordinator is in none of them: the systemd credential
coordinator-token comes first, then [coordinator] token_file, then
BULKHEAD_TOKEN.

examples:
  supervisor config check                    all mistakes at once, by line
  supervisor config show --json              what is in force, with defaults
  supervisor config show --origin            and where each value comes from
  supervisor config get limits.stall_s
  supervisor config set limits.stall_s 300   comments stay; old file: .bak1
  supervisor config set models.chat.device cuda
  supervisor config unset limits.stall_s     back to the default
  supervisor config migrate --write          to the newest config_version
  supervisor config schema --write           a schema beside it, for editors
  supervisor config path --json              every file that is read
"""

_EXAMPLES_OF = {
    "check": """\
Exit code 0: no mistakes; 78: mistakes, or warnings with --strict.

examples:
  supervisor config check
  supervisor config check --config /etc/bulkhead/worker.toml --json
  supervisor config check --strict   a missing model file is a mistake, too
""",
    "show": """\
examples:
  supervisor config show                 as TOML, defaults included
  supervisor config show --origin   each with its file and line, or variable
  supervisor config show --origin --json
""",
    "get": """\
examples:
  supervisor config get limits.stall_s
  supervisor config get models.chat --json
  supervisor config get 'models."llama-3.1".device'
""",
    "set": """\
A running supervisor takes up what it can within two seconds; what needs a restart is said.

examples:
  supervisor config set limits.stall_s 300
  supervisor config set models.chat.device cuda
  supervisor config set holds.applications.names '["steam", "blender*"]'
""",
    "unset": """\
examples:
  supervisor config unset limits.stall_s
  supervisor config unset models.chat    the whole [[models]] entry
""",
    "migrate": """\
examples:
  supervisor config migrate              show the difference, write nothing
  supervisor config migrate --write      the old files stay as .bak1
""",
    "schema": """\
examples:
  supervisor config schema > worker.schema.json
  supervisor config schema --write   beside worker.toml, which then names it
""",
    "path": """\
examples:
  supervisor config path
  supervisor config path --json          drop-ins, and where it was looked for
""",
}

SCHEMA_FILE = "worker.schema.json"


def add_arguments(parser: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add the verbs; `parser_class` has the exit code for a wrong command line."""
    parser.epilog = EXAMPLES
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=parser_class)

    def verb(name: str, help_: str, command: Callable[[argparse.Namespace], int], json: str = "") -> Any:
        added = verbs.add_parser(
            name,
            help=help_,
            description=help_[:1].upper() + help_[1:] + ".",
            epilog=_EXAMPLES_OF[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--config", metavar="FILE", help="worker.toml")
        if json:
            added.add_argument("--json", action="store_true", help=json)
        added.set_defaults(command=command)
        return added

    check = verb("check", "find all mistakes", _check, "for programs")
    check.add_argument(
        "--strict", action="store_true", help="warnings are mistakes, too: a model's file that is missing"
    )
    show = verb("show", "print what is in force", _show, "for programs")
    show.add_argument("--origin", action="store_true", help="where each value comes from: default, file or variable")
    get = verb("get", "print one value or one table", _get, "as JSON, text in quotes")
    get.add_argument("key", metavar="KEY", help="like limits.stall_s or models.chat.device")
    put = verb("set", "change one value in worker.toml", _set, "what it takes until it is in force, and the new etag")
    put.add_argument("key", metavar="KEY", help="like limits.stall_s or models.chat.device")
    put.add_argument("value", metavar="VALUE", help='text, or a TOML value such as 300, true, ["a", "b"]')
    unset = "take one value out of worker.toml: its default counts again"
    drop = verb("unset", unset, _unset, "what it takes until it is in force, and the new etag")
    drop.add_argument("key", metavar="KEY", help="like limits.stall_s or models.chat.device")
    migrate = verb("migrate", "show what this release's config_version changes in the files", _migrate)
    migrate.add_argument("--write", action="store_true", help="change them; the old ones stay as .bak1")
    schema = verb("schema", "print the JSON Schema", _schema)
    schema.add_argument(
        "--write", action="store_true", help=f"write {SCHEMA_FILE} beside worker.toml, and name it there"
    )
    verb("path", "print which file is read", _path, "all files, the weakest first")


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _complain(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def _print_json(value: Any) -> None:
    _say(msgspec.json.format(msgspec.json.encode(value)).decode())


def _check(arguments: argparse.Namespace) -> int:
    path, loaded, problems = None, None, []
    try:
        path = find_config(arguments.config)
        loaded = read(path)
    except ConfigError as error:
        problems = error.problems
    notes, warnings = (loaded.layers.notes, loaded.warnings) if loaded is not None else ([], ())
    bad = bool(problems) or (arguments.strict and bool(warnings))
    if arguments.json:
        found = {"path": str(path) if path else None, "ok": not bad, "problems": problems, "warnings": warnings}
        _print_json({**found, "notes": notes})
    else:
        _complain(*problems, *(f"warning: {warning}" for warning in warnings))
        if not bad:
            count = f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}" if warnings else ""
            _say(*notes, f"{path}: no mistakes{count}")
    return int(ExitCode.BAD_CONFIG if bad else ExitCode.STOPPED)


# ---- reading


def _show(arguments: argparse.Namespace) -> int:
    loaded = read(find_config(arguments.config))
    plain = masked(loaded.settings)
    if arguments.origin:
        _show_origins(loaded, plain, arguments.json)
    elif arguments.json:
        _print_json(plain)
    else:
        import tomlkit

        sys.stdout.write(tomlkit.dumps(plain))
    return int(ExitCode.STOPPED)


def _show_origins(loaded: Loaded, plain: dict[str, Any], json: bool) -> None:
    rows = origins(loaded, plain)
    if json:
        _print_json(rows)
        return
    texts = [f"{row['key']} = {_toml(row['value'])}" for row in rows]
    width = min(max(map(len, texts)), 60)
    for text, row in zip(texts, rows, strict=True):
        _say(f"{text:<{width}}  # {row.get('place', 'default')}")


def _toml(value: Any) -> str:
    import tomlkit

    return str(tomlkit.item(value).as_string())


def _get(arguments: argparse.Namespace) -> int:
    value: Any = masked(read(find_config(arguments.config)).settings)
    path = locate(parse_key(arguments.key), value["models"])
    type_at(path)
    for part in path:
        if isinstance(value, dict) and part not in value:
            _complain(f"supervisor: {arguments.key} is not set.")
            return int(ExitCode.FAILED)
        value = value[int(part) if isinstance(value, list) else part]
    if arguments.json:
        _print_json(value)
    elif isinstance(value, str):
        _say(value)
    else:
        import tomlkit

        _say(tomlkit.dumps(value).rstrip("\n") if isinstance(value, dict) else _toml(value))
    return int(ExitCode.STOPPED)


# ---- editing


def _file(arguments: argparse.Namespace) -> Path:
    """A file named by --config may be new; without the option there must be one, as nobody could guess where."""
    return Path(arguments.config) if arguments.config else find_config(None)


def _set(arguments: argparse.Namespace) -> int:
    return _edit(arguments, arguments.value)


def _unset(arguments: argparse.Namespace) -> int:
    return _edit(arguments, None)


def _edit(arguments: argparse.Namespace, value: str | None) -> int:
    from supervisor.config_edit import NotThere, edit
    from supervisor.reload_plan import RESTARTS, Apply, apply_of

    try:
        edited = edit(_file(arguments), {arguments.key: value}, convert=value_of)
    except NotThere as error:
        _complain(f"supervisor: {error}.")
        return int(ExitCode.FAILED)
    for key, place in edited.stronger.items():
        _complain(f"supervisor: {key} is given in {place} too, which is stronger.")
    apply = apply_of(arguments.key)
    if arguments.json:
        _print_json({"key": arguments.key, "apply": apply, "etag": edited.etag, "stronger": edited.stronger})
    elif apply is Apply.RESTART:
        _say(f"{arguments.key}: a supervisor that runs takes it up after: {RESTARTS}")
    else:
        _say(f"{arguments.key}: a supervisor that runs takes it up by itself")
    return int(ExitCode.STOPPED)


def _migrate(arguments: argparse.Namespace) -> int:
    from supervisor.config_layers import drop_ins
    from supervisor.config_migrate import migrate_file

    path = find_config(arguments.config)
    work = [(file, *migrate_file(file)) for file in (path, *drop_ins(path))]
    changed = [(file, migrated) for file, migrated, difference in work if difference]
    for _, _, difference in work:
        sys.stdout.write(difference)
    if not changed:
        _say(f"{path}: nothing to migrate")
    elif arguments.write:
        from supervisor.worker_toml import replace_whole

        read(path)  # which migrates in memory: what is written is what was checked
        for file, migrated in changed:
            replace_whole(file.resolve(), migrated.before.encode(), migrated.text.encode())
            _say(f"{file}: rewritten; the old content is in {file.name}.bak1")
    else:
        _say("nothing was written; --write does it")
    return int(ExitCode.STOPPED)


# ---- for editors and programs


def _schema(arguments: argparse.Namespace) -> int:
    from supervisor.config_schema import schema

    if not arguments.write:
        _print_json(schema())
        return int(ExitCode.STOPPED)
    from supervisor.worker_toml import WorkerToml, put_beside

    toml = WorkerToml(_file(arguments), whole=False)
    file = toml.path.with_name(SCHEMA_FILE)
    toml.put_top_line(f"#:schema ./{SCHEMA_FILE}")
    toml.save()
    put_beside(file, msgspec.json.format(msgspec.json.encode(schema())) + b"\n")
    _say(f"{file}: written; {toml.path.name} names it in its first line")
    return int(ExitCode.STOPPED)


def _path(arguments: argparse.Namespace) -> int:
    from supervisor.config_layers import drop_ins

    path = find_config(arguments.config)
    if not arguments.json:
        _say(str(path.resolve()))
        return int(ExitCode.STOPPED)
    files = [str(file.resolve()) for file in (path, *drop_ins(path))]
    _print_json({"path": str(path.resolve()), "files": files, "searched": list(SEARCH)})
    return int(ExitCode.STOPPED)
