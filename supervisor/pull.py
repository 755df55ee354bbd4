"""`supervisor models pull | list | remove`: models on this machine and their entries in worker.toml.

    supervisor models pull ./my.gguf
    supervisor models pull https://host/model.gguf --sha256 HEX
    supervisor models pull owner/repo --file Q4_K_M

A pull runs in a child. It collects the files in `MODELS/.pulling-NAME`, where an interrupted pull is resumed by the
same command, then the folder gets its name by one rename, then worker.toml its entry.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from engines.catalog import CATALOG
from supervisor.columns import columns
from supervisor.config import SEARCH, find_config, load, state_dir
from supervisor.errors import ConfigError, ExitCode, NoPermission, SupervisorError
from supervisor.host.child import ChildSpec, open_child
from supervisor.interrupts import ended
from supervisor.machine.weights import folder_digest
from supervisor.model_guess import Guess, shards
from supervisor.pull_fetch import is_loopback
from supervisor.pull_progress import ProgressLine, size
from supervisor.pull_wire import Event, Finished, Note, Plan, Progress, PullFailed, Request
from supervisor.settings import Settings
from supervisor.worker_toml import WorkerToml

_REPO = re.compile(r"(?:hf:)?(?P<repo>[\w.-]+/[\w.-]+(?:@[\w./-]+?)?)(?::(?P<file>.+))?\Z")
_HUB_PAGE = re.compile(
    r"https://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?\Z"
)
_FILE_ENDINGS = (".gguf", ".onnx", ".bin")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")


class PullError(SupervisorError):
    """The command cannot do what was asked; the text is a sentence with the cure."""

    exit_code = ExitCode.FAILED


# ---- command line ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `supervisor models` to `parser`."""
    commands = parser.add_subparsers(dest="models_command", required=True, metavar="COMMAND")
    pull = commands.add_parser("pull", help="bring a model onto this machine and into worker.toml")
    pull.add_argument("source", help="a file or folder, an https URL, or a Hugging Face repository: owner/repo[:file]")
    pull.add_argument("--name", help="public name; default: from the file or repository")
    pull.add_argument("--engine", help="default: what the files say")
    pull.add_argument("--file", default="", help="of a repository: the file, or a part of its name such as Q4_K_M")
    pull.add_argument("--sha256", default="", help="expected digest of the file; required for http")
    pull.add_argument("--force", action="store_true", help="replace a model of the same name")
    listing = commands.add_parser("list", help="show the models of worker.toml")
    listing.add_argument("--json", action="store_true", help="an array of objects for programs")
    remove = commands.add_parser("remove", help="take a model out of worker.toml, and its pulled files away")
    remove.add_argument("name")
    remove.add_argument("--keep-files", action="store_true", help="only the entry goes")
    for each in (pull, listing, remove):
        each.add_argument("--config", help=f"worker.toml; default: the first of {', '.join(SEARCH)}")
        each.add_argument("--models-dir", help="default: models/ in the state folder")


def main(args: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit code and prints one sentence when it fails."""
    command = {"pull": _pull, "list": _list, "remove": _remove}[args.models_command]
    return ended(lambda: command(args), "stopped; run the same command again to go on where it stopped")


def config_path(given: str | None) -> Path:
    """The worker.toml to edit: the given one, else the one `supervisor run` finds, else where it will look."""
    if given:
        return Path(given).expanduser()
    try:
        return find_config(None)
    except ConfigError:
        # A named but missing file is the user's wish; otherwise a place found from every working folder.
        return Path(os.environ.get("BULKHEAD_CONFIG") or SEARCH[-1]).expanduser()


def _models_dir(given: str | None, config: Path) -> Path:
    if given:
        return Path(given).expanduser().absolute()
    settings = load(config) if config.exists() else Settings()
    return state_dir(settings) / "models"


# ---- pull --------------------------------------------------------------------------------------------------


def read_source(source: str, file: str, sha256: str) -> Request:
    """Tell what kind of source a user named; `staging` is still empty.

    Raises:
        PullError: it is none, or the digest it needs is missing.
    """
    if not source:
        raise PullError("SOURCE: expected a file, a folder, an https URL or a Hugging Face repository.")
    if sha256 and not _SHA256.match(sha256):
        raise PullError("--sha256: expected 64 hexadecimal digits.")
    digest = sha256.lower()
    path = Path(source).expanduser()
    if path.exists():
        return Request(kind="local", source=str(path.absolute()), staging="", sha256=digest)
    if page := _HUB_PAGE.match(source):
        repo = page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
        return Request(kind="hub", source=repo, file=file or page["file"] or "", staging="", sha256=digest)
    if source.startswith(("https://", "http://")):
        if source.startswith("http://"):
            _check_plain(source, digest)
        return Request(kind="url", source=source, staging="", sha256=digest)
    repo_ = _REPO.match(source)
    # `models/my.gguf` that is not there is a misspelt path, not the repository `my.gguf` of the user `models`.
    looks_like_a_path = source[0] in "./~" or (":" not in source and source.lower().endswith(_FILE_ENDINGS))
    if repo_ and not looks_like_a_path:
        return Request(kind="hub", source=repo_["repo"], file=file or repo_["file"] or "", staging="", sha256=digest)
    raise PullError(
        f"{source}: no such file or folder, and no https URL or Hugging Face repository (owner/repo) either."
    )


def _check_plain(url: str, sha256: str) -> None:
    host = url.removeprefix("http://").split("/")[0].rpartition("@")[2]
    bare = host.split("]")[0].lstrip("[") if host.startswith("[") else host.split(":")[0]
    if not is_loopback(bare):
        raise PullError(f"{url}: http is not encrypted; use https (http is for this machine's own servers only).")
    if not sha256:
        raise PullError(f"{url}: http needs --sha256, since nothing else would notice another file.")


def default_name(request: Request) -> str:
    """A public name from the source: the file's stem, or the repository's name."""
    if request.kind == "hub" and not request.file:
        name = request.source.split("@")[0].split("/")[1]
    elif request.kind == "hub":
        name = Path(request.file).name if "." in request.file else request.source.split("@")[0].split("/")[1]
    else:
        name = Path(request.source.split("?")[0].rstrip("/")).name
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", name)
    name = re.sub(r"\.(gguf|onnx|bin)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _pull(args: argparse.Namespace) -> int:
    request = read_source(args.source, args.file, args.sha256)
    name = args.name or default_name(request)
    toml = WorkerToml(config_path(args.config))
    if args.engine and args.engine not in {**CATALOG, **load_engines(toml)}:
        raise PullError(f"--engine: there is no engine {args.engine!r}; known are {', '.join(CATALOG)}.")
    if toml.has_model(name) and not args.force:
        raise PullError(f"{toml.path} has a model named {name} already; take another --name, or --force to replace it.")
    models = _models_dir(args.models_dir, toml.path)
    folder = models / folder_name(name)
    if folder.exists() and not args.force:
        raise PullError(f"{folder} exists already; take another --name, or --force to replace it.")
    request = msgspec.structs.replace(request, staging=str(models / f".pulling-{folder_name(name)}"))
    _make(models)
    line = ProgressLine(sys.stderr)
    try:
        plan, finished = trio.run(run_pull, request, line)
    finally:
        line.close()
    chosen = _choose(finished.guess, args.engine, finished.files)
    _settle(Path(request.staging), folder)
    toml.put_model(entry(name, chosen, folder, finished.files), comment=f"pulled from {plan.origin}")
    toml.save()
    total = sum((folder / file).stat().st_size for file in finished.files)
    sys.stdout.write(
        f"{name}: {size(total)} in {folder}, engine {chosen.engine} ({chosen.why}).\n"
        f"It is in {toml.path}; `supervisor run{_config_option(args.config)}` serves it.\n"
    )
    return ExitCode.STOPPED


def _config_option(given: str | None) -> str:
    return f" --config {given}" if given else ""


def load_engines(toml: WorkerToml) -> Mapping[str, Any]:
    """[engines] of worker.toml; empty when the file does not exist yet."""
    return load(toml.path).engines if toml.path.exists() else {}


def folder_name(name: str) -> str:
    """A folder for a public name, which may hold slashes and more. Raises PullError for a name like `..`."""
    folder = re.sub(r"[^A-Za-z0-9._-]", "--", name)
    if not folder.strip("."):
        raise PullError(f"--name: {name!r} cannot name a folder.")
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPermission(f"{folder} cannot be made: {error.strerror}; name another with --models-dir.") from None


def _choose(found: Guess, engine: str | None, files: Mapping[str, str]) -> Guess:
    """What the user said, else what the files say. Raises PullError when neither is enough."""
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
    return msgspec.structs.replace(found, engine=engine, backend=backend, why="as you said")


def _settle(staging: Path, folder: Path) -> None:
    """Give the collected files their place; an older model of that name goes only after the new one is whole."""
    old = folder.with_name(f".replaced-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def entry(name: str, chosen: Guess, folder: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """The [[models]] entry."""
    found: dict[str, Any] = {"name": name, "engine": chosen.engine}
    if chosen.backend and chosen.backend != CATALOG[chosen.engine].backends[0]:
        found["backend"] = chosen.backend
    found["path"] = str(folder / chosen.main) if chosen.main else str(folder)
    sha256 = {"model": digests[chosen.main] if chosen.main else folder_digest(digests)}
    if chosen.files:
        found["files"] = {role: str(folder / file) for role, file in chosen.files.items()}
        sha256 |= {role: digests[file] for role, file in chosen.files.items()}
    return found | {"sha256": sha256}


async def run_pull(request: Request, line: ProgressLine) -> tuple[Plan, Finished]:
    """Run the child to its end.

    Raises:
        PullError: with the child's sentence.

    Cancellation: the child is ended; what it fetched stays for the next pull.
    """
    spec = ChildSpec(name="model pull", argv=(sys.executable, "-I", "-m", "supervisor.pull_child"))
    plan: Plan | None = None
    last: Event | None = None
    rest = b""
    async with open_child(spec, term_grace_s=1.0) as child:
        await child.write(msgspec.json.encode(request))
        child.close_stdin()
        while data := await child.read():
            *lines, rest = (rest + data).split(b"\n")
            for text in lines:
                last = msgspec.json.decode(text, type=Event)
                if isinstance(last, Plan):
                    plan = last
                _show(last, line)
        how = await child.wait()
    if isinstance(last, Finished) and plan is not None:
        return plan, last
    if isinstance(last, PullFailed):
        raise PullError(last.message)
    raise PullError(f"The pull {how.describe()}: {' | '.join(child.stderr_tail(3))}; run the same command again.")


def _show(event: Event, line: ProgressLine) -> None:
    match event:
        case Plan(files=files, total_bytes=total, origin=origin):
            line.note(f"{origin}: {len(files)} file{'s' if len(files) != 1 else ''}, {size(total)}")
        case Progress():
            line.show(event)
        case Note(text=text):
            line.note(text)


# ---- list, remove ------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    config = config_path(args.config)
    models = load(config).models if config.exists() else []
    rows: list[dict[str, Any]] = [
        {
            "name": model.name,
            "engine": model.engine,
            "path": model.path,
            "bytes": _bytes(Path(model.path)) if model.path else 0,
            "sha256": dict(model.sha256),
            "device": model.device or "auto",
        }
        for model in models
    ]
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(rows)).decode() + "\n")
    elif not rows:
        sys.stdout.write("No models yet; `supervisor models pull SOURCE` brings one.\n")
    else:
        cells = [(str(r["name"]), str(r["engine"]), size(r["bytes"]), str(r["device"]), str(r["path"])) for r in rows]
        sys.stdout.write(columns(("name", "engine", "size", "device", "path"), cells, right=(2,)) + "\n")
    return ExitCode.STOPPED


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(part.stat().st_size for name in shards(path.name) if (part := path.with_name(name)).is_file())


def _remove(args: argparse.Namespace) -> int:
    toml = WorkerToml(config_path(args.config))
    try:
        toml.remove_model(args.name)
    except KeyError:
        known = ", ".join(str(model["name"]) for model in toml.models) or "none"
        raise PullError(f"{toml.path} has no model named {args.name}; it has: {known}.") from None
    toml.save()
    folder = _models_dir(args.models_dir, toml.path) / folder_name(args.name)
    gone = False
    if not args.keep_files and folder.is_dir() and not _used(folder, toml):
        shutil.rmtree(folder)
        gone = True
    sys.stdout.write(f"{args.name} is out of {toml.path}{f', and {folder} is deleted' if gone else ''}.\n")
    return ExitCode.STOPPED


def _used(folder: Path, toml: WorkerToml) -> bool:
    """Whether another entry names something in this folder."""
    inside = str(folder) + os.sep
    paths = [path for model in toml.models for path in [model.get("path", ""), *model.get("files", {}).values()]]
    return any((str(path) + os.sep).startswith(inside) for path in paths)
