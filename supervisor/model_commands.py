"""`supervisor models search | list | remove | verify | gc`. Pulling is in `pull`."""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from supervisor.config import SEARCH, load
from supervisor.control.commands.layout import Row, paper_of, say, table
from supervisor.errors import ConfigError, ExitCode, NoPermission
from supervisor.known_models import OWN, known_models, near, search
from supervisor.model_gc import Going, Held, is_named, named_paths, plan, survey
from supervisor.model_guess import shards
from supervisor.model_places import config_path, models_dir
from supervisor.model_store import Manifest, Store, StoreError, folder_bytes, home_of
from supervisor.model_verify import Verified, compared, damages
from supervisor.pull_progress import ProgressLine, size
from supervisor.pull_source import folder_name
from supervisor.settings import ModelTable
from supervisor.worker_toml import WorkerToml

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}


def add_arguments(commands: Any) -> None:
    """Add these commands to the subparsers of `supervisor models`."""
    finding = commands.add_parser("search", help="show the models that can be pulled by name")
    finding.add_argument("words", nargs="*", metavar="WORD", help="each must occur in the name, kind, engine or text")
    listing = commands.add_parser("list", help="show the models of worker.toml and of the models folder")
    remove = commands.add_parser("remove", help="take a model out of worker.toml, and its pulled files away")
    remove.add_argument("name")
    remove.add_argument("--keep-files", action="store_true", help="only the entry goes")
    verify = commands.add_parser("verify", help="read the files again and compare their digests")
    verify.add_argument("names", nargs="*", metavar="NAME", help="default: all models")
    gc = commands.add_parser("gc", help="delete pulled models that no worker.toml names, the longest unused first")
    gc.add_argument("--budget", required=True, metavar="SIZE", help="what the models folder may hold: 50GB, 20GiB, 0")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    for each in (finding, listing, verify, gc):
        each.add_argument("--json", action="store_true", help="for programs")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands on models have."""
    parser.add_argument("--config", help=f"worker.toml; default: the first of {', '.join(SEARCH)}")
    parser.add_argument("--models-dir", help="default: models/ in the state folder")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands; returns its exit code. Raises SupervisorError."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "search": _search,
        "list": _list,
        "remove": _remove,
        "verify": _verify,
        "gc": _gc,
    }
    return commands[args.models_command](args)


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


# ---- search ------------------------------------------------------------------------------------------------


def _search(args: argparse.Namespace) -> int:
    config = config_path(args.config)
    known = known_models(config)
    found = search(known, args.words)
    if args.json:
        _print_json([{"name": name, **msgspec.to_builtins(model)} for name, model in found.items()])
        return ExitCode.STOPPED if found else ExitCode.FAILED
    if not found:
        maybe = near(known, args.words[0])
        hint = f" Did you mean {maybe}?" if maybe else ""
        words = " and ".join(args.words)
        raise StoreError(f"No known model has {words}.{hint} Your own go into {config.parent / OWN}.")
    rows = [
        Row(
            (name, model.kind, model.engine, _gib(model.size_gb), _gib(model.vram_gb)),
            "; ".join(filter(None, (model.about, model.licence and f"licence {model.licence}"))),
        )
        for name, model in found.items()
    ]
    heads = ("MODEL", "KIND", "ENGINE", "GiB", "VRAM")
    say(table(heads, rows, paper_of(sys.stdout), why="WHAT IT IS", right=(3, 4), whole=(0,)))
    return ExitCode.STOPPED


def _gib(value: float) -> str:
    return f"{value:g}" if value else "?"


# ---- list --------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    config = config_path(args.config)
    store = Store(models_dir(args.models_dir, config))
    models = load(config).models if config.exists() else []
    named = [text for model in models for text in (model.path, *model.files.values())]
    rows = [_row(model) for model in models]
    rows += [_unnamed(store, key) for key in store.keys() if not is_named(store.folder(key), named)]
    rows += [_begun(store, key) for key in store.interrupted()]
    if args.json:
        _print_json(rows)
    elif not rows:
        sys.stdout.write("No models yet; `supervisor models pull SOURCE` brings one, `search` shows known ones.\n")
    else:
        shown = [
            Row(
                (row["name"], row["engine"], size(row["bytes"]), row["device"], row["state"], _ago(row)),
                row["path"],
            )
            for row in rows
        ]
        heads = ("MODEL", "ENGINE", "SIZE", "DEVICE", "FILES", "LOADED")
        say(table(heads, shown, paper_of(sys.stdout), why="PATH", right=(2,), whole=(0,)))
    return ExitCode.STOPPED


def _row(model: ModelTable) -> dict[str, Any]:
    """A model of worker.toml, with what the store it lies in knows about it."""
    path = Path(model.path)
    home = home_of(path) if model.path else None
    found = {
        "name": model.name,
        "engine": model.engine,
        "path": model.path,
        "bytes": _bytes(path) if model.path else 0,
        "sha256": dict(model.sha256),
        "device": model.device or "auto",
        "state": "ready" if not model.path or path.exists() else "missing",
    }
    return found | _history(home)


def _unnamed(store: Store, key: str) -> dict[str, Any]:
    manifest = store.manifest(key)
    return {
        "name": manifest.name if manifest else key,
        "engine": manifest.guess.engine if manifest else "",
        "path": str(store.folder(key)),
        "bytes": folder_bytes(store.folder(key)),
        "sha256": {},
        "device": "",
        "state": "unnamed",
    } | _history((store, key))


def _begun(store: Store, key: str) -> dict[str, Any]:
    return {
        "name": key,
        "engine": "",
        "path": str(store.staging(key)),
        "bytes": folder_bytes(store.staging(key)),
        "sha256": {},
        "device": "",
        "state": "pulling" if store.is_pulled_now(key) else "interrupted",
    } | _history((store, key))


def _history(home: tuple[Store, str] | None) -> dict[str, Any]:
    """Whence it came and when it was used; all null for files that were not pulled. Times: seconds since 1970."""
    store, key = home or (None, "")
    manifest = store.manifest(key) if store else None
    failure = store.failure(key) if store else None
    return {
        "source": manifest.origin if manifest else None,
        "revision": manifest.revision or None if manifest else None,
        "pulled_at": manifest.pulled_at if manifest else None,
        "last_loaded": store.last_loaded(key) if store else None,
        "loaded_now": store.is_loaded(key) if store else None,
        "problem": failure.message if failure else None,
    }


def _ago(row: dict[str, Any]) -> str:
    if row["loaded_now"]:
        return "now"
    when = row["last_loaded"]
    if when is None:
        return "never" if row["pulled_at"] else ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(part.stat().st_size for name in shards(path.name) if (part := path.with_name(name)).is_file())


# ---- remove ------------------------------------------------------------------------------------------------


def _remove(args: argparse.Namespace) -> int:
    toml = WorkerToml(config_path(args.config), whole=False)  # its files may be gone: that must not keep the entry
    store, key = Store(models_dir(args.models_dir, toml.path)), folder_name(args.name)
    folder = store.folder(key)
    try:
        toml.remove_model(args.name)
    except KeyError:
        known = ", ".join(str(model["name"]) for model in toml.models) or "none"
        if args.keep_files or not _remove_left(store, key, toml):
            raise StoreError(f"{toml.path} has no model named {args.name}; it has: {known}.") from None
        sys.stdout.write(f"{toml.path} has no model named {args.name}; what a pull of it left is deleted.\n")
        return ExitCode.STOPPED
    toml.save()
    tail = ""
    if not args.keep_files and folder.is_dir() and not is_named(folder, named_paths(load(toml.path))):
        gone = _deleted(store, key, functools.partial(_is_named_in, toml.path, folder))
        tail = f", and {folder} is deleted" if gone else f"; a running supervisor uses {folder}: `gc` deletes it later"
    sys.stdout.write(f"{args.name} is out of {toml.path}{tail}.\n")
    return ExitCode.STOPPED


def _remove_left(store: Store, key: str, toml: WorkerToml) -> bool:
    """Delete what a pull for this worker.toml left that ended before its entry was written; whether there was some.

    Raises:
        StoreError: somebody uses it.
        NoPermission: it cannot be deleted.
    """
    folder, manifest = store.folder(key), store.manifest(key)
    named = functools.partial(_is_named_in, toml.path, folder)
    if folder.exists():
        ours = manifest is not None and manifest.config == str(toml.path) and not named()
    else:
        ours = store.staging(key).exists() and store.begun_for(key) in ("", str(toml.path))
    if ours and not _deleted(store, key, named):
        raise StoreError(f"What a pull of {key} left is in use, by a pull at work or a running supervisor; end that.")
    return ours


def _is_named_in(config: Path, folder: Path) -> bool:
    return folder.exists() and config.exists() and is_named(folder, named_paths(load(config)))


def _deleted(store: Store, key: str, named: Callable[[], bool]) -> bool:
    """Whether nobody used it, so that it is gone. Raises NoPermission."""
    try:
        return store.remove(key, named)
    except OSError as error:
        where = store.folder(key)
        raise NoPermission(f"{where} cannot be deleted: {error.strerror}; run this as its owner.") from None


# ---- verify ------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    config = config_path(args.config)
    store = Store(models_dir(args.models_dir, config))
    models = load(config).models if config.exists() else []
    line = ProgressLine(sys.stderr)
    found: list[Verified] = []
    try:
        for name, check in _checks(store, models, line):
            if not args.names or name in args.names:
                found.append(check())
    finally:
        line.close()
    if unknown := [name for name in args.names if name not in {one.name for one in found}]:
        raise StoreError(f"There is no model {', '.join(unknown)}; `supervisor models list` shows what is here.")
    if args.json:
        _print_json(found)
    for one in found if not args.json else ():
        verdict = {True: "as it was pulled", None: "no digest to compare with", False: "NOT as it was pulled"}[one.ok]
        sys.stdout.write(f"{one.name}: {verdict} ({size(one.bytes)})\n")
        for problem in one.problems:
            sys.stdout.write(f"  {problem}\n")
    if any(one.ok is False for one in found):
        sys.stderr.write("Pull what is damaged again, with --force.\n")
        return ExitCode.FAILED
    return ExitCode.STOPPED


def _checks(store: Store, models: Sequence[ModelTable], line: ProgressLine) -> list[tuple[str, Callable[[], Verified]]]:
    """Name and check of each model; nothing is read before a check is called."""
    checks: list[tuple[str, Callable[[], Verified]]] = []
    seen = set()
    for model in models:
        home = home_of(Path(model.path)) if model.path else None
        manifest = home[0].manifest(home[1]) if home else None
        if home and manifest:
            seen.add((home[0].models, home[1]))
            folder = home[0].folder(home[1])
            checks.append((model.name, functools.partial(_checked, folder, manifest, model.name, line)))
        elif model.path:
            checks.append((model.name, functools.partial(compared, model, line.say)))
    for key in store.keys():
        manifest = store.manifest(key)
        if manifest is not None and (store.models, key) not in seen:
            check = functools.partial(_checked, store.folder(key), manifest, manifest.name, line)
            checks.append((manifest.name, check))
    return checks


def _checked(folder: Path, manifest: Manifest, name: str, line: ProgressLine) -> Verified:
    problems = damages(folder, manifest, line.say)
    total = sum(kept.size_bytes for kept in manifest.files.values())
    return Verified(name=name, path=str(folder), ok=not problems, bytes=total, problems=tuple(problems))


# ---- gc ----------------------------------------------------------------------------------------------------


def read_size(text: str) -> int:
    """Bytes of `50GB` (powers of ten), `20GiB` (of two), `0`. Raises StoreError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise StoreError(f"--budget: {text!r} is no size; write 50GB, 20GiB or 0.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _gc(args: argparse.Namespace) -> int:
    budget = read_size(args.budget)
    config = config_path(args.config)
    if not config.exists():
        raise StoreError(f"{config} does not exist, so nobody can tell which models are named; give it with --config.")
    store = Store(models_dir(args.models_dir, config))
    held = survey(store, _all_named(store, config))
    chosen = plan(held, budget)
    after, gone = chosen.after_bytes, []
    for going in chosen.going:
        if args.dry_run or _delete(store, going.held, config):
            gone.append(going)
        else:
            after += going.frees_bytes
    if args.json:
        _print_json(
            {
                "budget_bytes": budget,
                "before_bytes": chosen.before_bytes,
                "after_bytes": after,
                "dry_run": args.dry_run,
                "deleted": [_going_row(going) for going in gone],
                "kept": [{"name": one.key, "why": one.keep} for one in held if one.keep],
            }
        )
    else:
        _tell_gc(gone, held, chosen.before_bytes, after, budget, args.dry_run)
    return ExitCode.STOPPED if after <= budget else ExitCode.FAILED


def _all_named(store: Store, config: Path) -> list[str]:
    """Paths of this worker.toml and of those that the models here were pulled for.

    Raises:
        ConfigError: one of them cannot be read: what it names would be lost.
    """
    configs = {config.resolve()}
    for key in store.keys():
        manifest = store.manifest(key)
        if manifest is not None and manifest.config:
            configs.add(Path(manifest.config).resolve())
    found: list[str] = []
    for path in sorted(configs):
        if path.exists():
            try:
                found += named_paths(load(path))
            except ConfigError as error:
                raise ConfigError(
                    [*error.problems, "nothing was deleted: which models it names is not known"]
                ) from None
    return found


def _delete(store: Store, held: Held, config: Path) -> bool:
    folder = store.folder(held.key)
    try:
        if held.what == "leftover":
            shutil.rmtree(store.models / held.key)
            return True
        if held.what == "interrupted":
            return store.remove_staging(held.key)
        return store.remove(held.key, lambda: is_named(folder, _all_named(store, config)))
    except OSError as error:
        raise NoPermission(f"{store.models / held.key} cannot be deleted: {error.strerror}.") from None


def _going_row(going: Going) -> dict[str, Any]:
    held = going.held
    return {"name": held.key, "what": held.what, "frees_bytes": going.frees_bytes, "last_used": held.last_used}


def _tell_gc(gone: Sequence[Going], held: Sequence[Held], before: int, after: int, budget: int, dry: bool) -> None:
    verb = "would go" if dry else "is deleted"
    what = {"model": "", "interrupted": " (interrupted pull)", "leftover": " (leftover)"}
    for going in gone:
        sys.stdout.write(f"{going.held.key}{what[going.held.what]} {verb}: {size(going.frees_bytes)}\n")
    sys.stdout.write(f"The models folder {'would hold' if dry else 'holds'} {size(after)}, before {size(before)}.\n")
    if after > budget:
        kept = "; ".join(f"{one.key}: {one.keep}" for one in held if one.keep)
        sys.stderr.write(f"That is more than {size(budget)}. What stays: {kept or 'nothing that can go'}.\n")
