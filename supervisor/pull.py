"""`supervisor models pull`: a model onto this machine, and its entry into worker.toml.

    supervisor models pull qwen3-4b
    supervisor models pull ./my.gguf
    supervisor models pull https://host/model.gguf --sha256 HEX
    supervisor models pull owner/repo --file Q4_K_M

A pull runs in a child. It collects the files in `MODELS/.pulling-NAME`, where an interrupted pull is resumed by the
same command, then the folder gets its manifest and its name (`model_store`), then worker.toml its entry. The other
commands of `supervisor models` are in `model_commands`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from engines.catalog import CATALOG
from supervisor import model_commands
from supervisor.errors import ExitCode
from supervisor.host.child import ChildSpec, open_child
from supervisor.interrupts import ended
from supervisor.known_models import Known, known_models
from supervisor.machine.weights import folder_digest
from supervisor.model_guess import Guess
from supervisor.model_places import config_path, load_engines, models_dir
from supervisor.model_store import Kept, Manifest, Store
from supervisor.model_verify import damages
from supervisor.pull_progress import EventLines, ProgressLine, size
from supervisor.pull_source import (
    PullError,
    default_name,
    folder_name,
    plain_source,
    read_known,
    read_source,
    unknown_word,
)
from supervisor.pull_wire import Event, Finished, Note, Plan, Progress, PullFailed, Request
from supervisor.worker_toml import WorkerToml

__all__ = ["PullError", "add_arguments", "config_path", "main"]
_OFFLINE = ("1", "ON", "YES", "TRUE")  # as huggingface-hub reads its variable


# ---- command line ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `supervisor models` to `parser`."""
    commands = parser.add_subparsers(dest="models_command", required=True, metavar="COMMAND")
    pull = commands.add_parser("pull", help="bring a model onto this machine and into worker.toml")
    pull.add_argument(
        "source",
        help="a known model (`models search`), a file or folder, an https URL, or a Hugging Face repository:"
        " owner/repo[@revision][:file]",
    )
    pull.add_argument("--name", help="public name; default: from the file or repository")
    pull.add_argument("--engine", help="default: what the files say")
    pull.add_argument("--file", default="", help="of a repository: the file, or a part of its name such as Q4_K_M")
    pull.add_argument("--sha256", default="", help="expected digest of the file; required for http")
    pull.add_argument("--token-file", default="", metavar="FILE", help="holds the server's token; else HF_TOKEN")
    pull.add_argument("--options", default="", metavar="JSON", help='load options of the engine: {"n_ctx": 8192}')
    pull.add_argument("--max-gb", type=float, default=0.0, metavar="GIB", help="fetch no more than this; default: any")
    pull.add_argument("--offline", action="store_true", help="only from what is here; HF_HUB_OFFLINE=1 says the same")
    pull.add_argument("--force", action="store_true", help="replace a model of the same name")
    pull.add_argument("--json", action="store_true", help="events as JSON lines on stdout")
    model_commands.add_arguments(commands)
    for each in commands.choices.values():
        model_commands.add_places(each)


def main(args: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit code and prints one sentence when it fails."""
    if args.models_command == "pull":
        return ended(lambda: _pull(args), "stopped; run the same command again to go on where it stopped")
    return ended(lambda: model_commands.run(args), "stopped")


# ---- pull --------------------------------------------------------------------------------------------------


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a command line asks for."""

    request: Request
    name: str
    engine: str
    known: Known | None


def _read(args: argparse.Namespace, toml: WorkerToml) -> _Asked:
    """Raises PullError, and ConfigError for a broken catalogue.toml."""
    known = None
    source = args.source
    # A path is stronger than a catalogue, and a catalogue's mistakes are nothing to whoever names something else.
    if source and "/" not in source and ":" not in source and not Path(source).expanduser().exists():
        catalogue = known_models(toml.path)
        known = catalogue.get(source)
        if known is None:
            try:
                request = read_source(source, args.file, args.sha256)
            except PullError as error:
                raise PullError(f"{error}{unknown_word(source, catalogue)}") from None
        else:
            request = read_known(source, known, args.file, args.sha256)
    else:
        request = read_source(source, args.file, args.sha256)
    token_file = str(Path(args.token_file).expanduser().absolute()) if args.token_file else ""
    request = msgspec.structs.replace(request, token_file=token_file, max_bytes=_limit(args.max_gb))
    name = args.name or (source if known else default_name(request))
    return _Asked(request=request, name=name, engine=args.engine or (known.engine if known else ""), known=known)


def _limit(gib: float) -> int:
    """`--max-gb` in bytes. Raises PullError."""
    if not 0 <= gib < 2**20:  # NaN fails, too
        raise PullError("--max-gb: expected a number of GiB.")
    return int(gib * 2**30)


def _options(text: str) -> dict[str, Any]:
    """`--options` as a table of worker.toml. Raises PullError."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text else {}
    except msgspec.MsgspecError as error:
        raise PullError(f"--options: expected an object in JSON: {error}.") from None


def _pull(args: argparse.Namespace) -> int:
    line = EventLines(sys.stdout) if args.json else ProgressLine(sys.stderr)
    try:
        return _pull_shown(args, line)
    except Exception as error:
        if args.json:
            line.say(PullFailed(message=str(error)))
        raise
    finally:
        line.close()


def _pull_shown(args: argparse.Namespace, line: ProgressLine | EventLines) -> int:
    # With --force a mistake in it may be what this pull mends: an entry whose files are gone.
    toml = WorkerToml(config_path(args.config), whole=not args.force)
    asked = _read(args, toml)
    name, key, options = asked.name, folder_name(asked.name), _options(args.options)
    if args.engine and args.engine not in {**CATALOG, **load_engines(toml)}:
        raise PullError(f"--engine: there is no engine {args.engine!r}; known are {', '.join(CATALOG)}.")
    _check_free(toml, name, args.force)
    store = Store(models_dir(args.models_dir, toml.path))
    with store.pulling(key, str(toml.path)):
        manifest = None if args.force else _adopted(store, key, asked, line)
        if manifest is None:
            if store.folder(key).exists() and not args.force:
                raise PullError(f"{store.folder(key)} exists already; take another --name, or --force to replace it.")
            _check_network(asked, args.offline, store)
            manifest = _bring(store, key, asked, toml.path, line)
        chosen = _choose(manifest.guess, asked, manifest.digests)
        folder = store.folder(key)
        found = entry(name, chosen, folder, manifest.digests)
        if asked.known is not None and asked.known.options and chosen.engine == asked.known.engine:
            found["options"] = asked.known.options
        if options:
            found["options"] = {**found.get("options", {}), **options}
        with store.editing():
            toml = WorkerToml(toml.path, whole=not args.force)  # hours may have passed: others have edited it
            _check_free(toml, name, args.force)
            if store.manifest(key) != manifest or not folder.is_dir():
                store.settle(key, manifest)
            toml.put_model(found, comment=f"pulled from {manifest.origin}")
            toml.save()
    _tell(args, name, folder, chosen, manifest, toml.path, line)
    return ExitCode.STOPPED


def _check_free(toml: WorkerToml, name: str, force: bool) -> None:
    if toml.has_model(name) and not force:
        raise PullError(f"{toml.path} has a model named {name} already; take another --name, or --force to replace it.")


def _adopted(store: Store, key: str, asked: _Asked, line: ProgressLine | EventLines) -> Manifest | None:
    """What an earlier pull of the same thing brought, if it is whole: its entry in worker.toml is all that is missing.

    Raises:
        PullError: it is damaged.
    """
    manifest = store.manifest(key)
    request = asked.request
    if manifest is None or not store.folder(key).is_dir():
        return None
    if (manifest.kind, manifest.source, manifest.file) != (request.kind, plain_source(request), request.file):
        return None
    if request.sha256 and request.sha256 not in manifest.digests.values():
        return None
    when = time.strftime("%Y-%m-%d", time.localtime(manifest.pulled_at))
    line.say(Note(text=f"{store.folder(key)} has it since {when}; --force fetches it anew"))
    found = damages(store.folder(key), manifest, line.say)
    if found:
        raise PullError(f"{store.folder(key)}: {found[0]}; run the same command with --force to fetch it anew.")
    return manifest


def _check_network(asked: _Asked, offline: bool, store: Store) -> None:
    """Raises PullError when the source is elsewhere and the network must not be used."""
    variable = os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE
    if asked.request.kind == "local" or not (offline or variable):
        return
    here = ", ".join(store.keys()) or "nothing"
    said = "--offline" if offline else "HF_HUB_OFFLINE"
    raise PullError(
        f"{plain_source(asked.request)} is not here, and {said} forbids the network; {store.models} has: {here}."
    )


def _bring(store: Store, key: str, asked: _Asked, config: Path, line: ProgressLine | EventLines) -> Manifest:
    """Run the child, and write down what it brought. Raises PullError, after noting why for a later load."""
    request = msgspec.structs.replace(asked.request, staging=str(store.staging(key)))
    try:
        plan, finished = trio.run(run_pull, request, line)
    except PullError as error:
        store.note_failure(key, str(error))
        raise
    staging = store.staging(key)
    _, _, commit = plan.origin.rpartition("@")
    return Manifest(
        name=asked.name,
        kind=request.kind,
        source=plain_source(request),
        file=request.file,
        origin=plan.origin,
        revision=commit if request.kind == "hub" else "",
        pulled_at=time.time(),
        files={
            name: Kept(size_bytes=(staging / name).stat().st_size, sha256=digest)
            for name, digest in finished.files.items()
        },
        guess=finished.guess,
        config=str(config),
    )


def _tell(
    args: argparse.Namespace,
    name: str,
    folder: Path,
    chosen: Guess,
    manifest: Manifest,
    config: Path,
    line: ProgressLine | EventLines,
) -> None:
    total = sum(kept.size_bytes for kept in manifest.files.values())
    if isinstance(line, EventLines):
        line.done(
            name=name,
            engine=chosen.engine,
            folder=str(folder),
            bytes=total,
            origin=manifest.origin,
            files=manifest.digests,
            config=str(config),
        )
        return
    option = f" --config {shlex.quote(args.config)}" if args.config else ""
    sys.stdout.write(
        f"{name}: {size(total)} in {folder}, engine {chosen.engine} ({chosen.why}).\n"
        f"It is in {config}; `supervisor run{option}` serves it.\n"
    )


def _choose(found: Guess, asked: _Asked, files: Mapping[str, str]) -> Guess:
    """What the user said, else the catalogue, else the files. Raises PullError when none of them is enough."""
    engine = asked.engine
    if not found.engine and not engine:
        names = ", ".join(name for name, row in CATALOG.items() if row.needs_model)
        raise PullError(
            f"No engine was found for it: {found.why}. Run the same command with --engine ({names}); what was fetched"
            " is kept."
        )
    if not engine or engine == found.engine:
        return found
    backend = ""
    if engine == "embed":
        backend = "gguf" if found.main.endswith(".gguf") else "onnx"
    said = asked.known is not None and engine == asked.known.engine
    return msgspec.structs.replace(
        found, engine=engine, backend=backend, why="as the catalogue says" if said else "as you said"
    )


def entry(name: str, chosen: Guess, folder: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """The [[models]] entry."""
    found: dict[str, Any] = {"name": name, "engine": chosen.engine}
    backends = CATALOG[chosen.engine].backends if chosen.engine in CATALOG else ("",)
    if chosen.backend and chosen.backend != backends[0]:
        found["backend"] = chosen.backend
    found["path"] = str(folder / chosen.main) if chosen.main else str(folder)
    sha256 = {"model": digests[chosen.main] if chosen.main else folder_digest(digests)}
    if chosen.files:
        found["files"] = {role: str(folder / file) for role, file in chosen.files.items()}
        sha256 |= {role: digests[file] for role, file in chosen.files.items()}
    return found | {"sha256": sha256}


def _beyond(said: Event, most: int) -> str:
    """Why a pull ends because it is more than may be fetched, as its server says or as it turns out; else ""."""
    size_ = said.total_bytes if isinstance(said, Plan) else said.done_bytes if isinstance(said, Progress) else None
    if most and size_ is not None and size_ > most:
        return f"It has {size(size_)}, and at most {size(most)} may be fetched; nothing of it was taken on."
    return ""


async def run_pull(request: Request, line: ProgressLine | EventLines) -> tuple[Plan, Finished]:
    """Run the child to its end.

    Raises:
        PullError: with the child's sentence.

    Cancellation: the child is ended; what it fetched stays for the next pull.
    """
    argv = (sys.executable, "-I", "-m", "supervisor.pull_child")
    spec = ChildSpec(name="model pull", argv=argv, lifeline=True)
    plan: Plan | None = None
    last: Event | None = None
    rest, beyond = b"", ""
    async with open_child(spec, term_grace_s=1.0) as child:
        await child.write(msgspec.json.encode(request))
        child.close_stdin()
        while data := await child.read():
            *lines, rest = (rest + data).split(b"\n")
            for text in lines:
                last = msgspec.json.decode(text, type=Event)
                if isinstance(last, Plan):
                    plan = last
                beyond = beyond or _beyond(last, request.max_bytes)
                if isinstance(last, Plan | Progress | Note):
                    line.say(last)
            if beyond:
                child.kill("it is more than may be fetched")
                break
        how = await child.wait()
    if beyond:
        raise PullError(beyond)
    if isinstance(last, Finished) and plan is not None:
        return plan, last
    if isinstance(last, PullFailed):
        raise PullError(last.message)
    raise PullError(f"The pull {how.describe()}: {' | '.join(child.stderr_tail(3))}; run the same command again.")
