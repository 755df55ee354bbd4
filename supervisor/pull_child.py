"""The child that pulls a model: one request on stdin, JSON lines on stdout (`pull_wire`).

It holds the network and the parsers of foreign files away from the command that edits worker.toml, and it may be
ended at any time: what it has fetched stays in the staging folder and is taken up by the next pull.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TextIO
from urllib.parse import unquote, urlsplit

import msgspec

from supervisor.errors import ConfigError
from supervisor.machine.weights import folder_files, hash_file
from supervisor.model_guess import guess, shards
from supervisor.pull_fetch import FetchFailed, Remote, client, fetch, need_space
from supervisor.pull_guard import guarded_client
from supervisor.pull_hub import look_up
from supervisor.pull_wire import Event, Finished, Note, Plan, Progress, PullFailed, Request
from supervisor.secrets import secret

REPORT_EVERY_S = 0.1
ORPHAN_WAIT_S = 10.0  # for the child of a command that was killed: it ends as soon as it notices
_LOCK = ".lock"


def main() -> None:
    """Entry point: `python -I -m supervisor.pull_child LIFELINE`, a descriptor that ends with the command."""
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    out = os.dup(1)  # hub libraries print; the lines must stay whole
    os.dup2(2, 1)

    def say(event: Event) -> None:
        os.write(out, msgspec.json.encode(event) + b"\n")

    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        say(pull(request, say))
    except FetchFailed as failure:
        say(PullFailed(message=str(failure)))
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(PullFailed(message=f"{where}{error.strerror or error}."))
        sys.exit(1)


def _end_with(lifeline: int) -> None:
    """End this process when the command is gone, be it by kill -9: nobody would take what is fetched."""
    while os.read(lifeline, 64):
        pass
    os._exit(1)


def pull(request: Request, say: Callable[[Event], None]) -> Finished:
    """Bring every file into the staging folder. Raises FetchFailed, OSError."""
    staging = Path(request.staging)
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / _LOCK).open("w") as lock:
        _take(lock)
        if request.kind == "local":
            digests = _local(request, staging, say)
        elif request.kind == "files":
            digests = _named(request, staging, say)
        else:
            digests = _remote(request, staging, say)
        (staging / _LOCK).unlink()
    return Finished(files=digests, guess=guess(staging, sorted(digests)))


def _take(lock: TextIO) -> None:
    """Lock the staging folder. The command has made sure that no other one is at work: only an orphan can hold it."""
    until = time.monotonic() + ORPHAN_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise FetchFailed("Another pull of this model is running; wait for it to end.") from None
            time.sleep(0.05)


class _Meter:
    """Counts bytes over several files and reports at a bearable rate."""

    def __init__(self, say: Callable[[Event], None], total_bytes: int | None, phase: str) -> None:
        self._say, self._total, self._phase = say, total_bytes, phase
        self._before = 0
        self._here = 0
        self._last = 0.0

    def on_bytes(self, file: str) -> Callable[[int], None]:
        """For one file: called with its bytes so far."""

        def report(here: int) -> None:
            self._here = here
            if time.monotonic() - self._last >= REPORT_EVERY_S:
                self._last = time.monotonic()
                self._say(self._progress(file))

        return report

    def on_size(self, file: str) -> Callable[[int], None]:
        """For the only file, whose size is known by its server alone: called with it."""

        def report(size: int) -> None:
            self._total = size
            self._say(self._progress(file))

        return report

    def next_file(self, file: str) -> None:
        """The current file is done."""
        self._before, self._here = self._before + self._here, 0
        self._say(self._progress(file))

    def _progress(self, file: str) -> Progress:
        done = self._before + self._here
        return Progress(done_bytes=done, total_bytes=self._total, file=file, phase=self._phase)


# ---- network -----------------------------------------------------------------------------------------------


def _named(request: Request, staging: Path, say: Callable[[Event], None]) -> dict[str, str]:
    """Fetch files that somebody else has named one by one. How large they are is believed when it is seen."""
    wanted = {one.name: one for one in request.files}
    total = sum(one.approx_bytes for one in request.files) or None
    say(Plan(files=tuple(wanted), total_bytes=total, origin=request.source))
    _drop_others(staging, {name: Remote(url=one.url) for name, one in wanted.items()})
    if total is not None:
        need_space(staging, max(0, total - sum(_here(staging / name) for name in wanted)))
    meter = _Meter(say, total, "fetch")
    left, digests = request.limit_bytes, {}
    with guarded_client(request.hosts) as http:
        for name, one in wanted.items():
            remote = Remote(url=one.url, sha256=one.sha256, limit_bytes=max(1, left) if request.limit_bytes else 0)
            digests[name] = fetch(http, remote, staging / name, meter.on_bytes(name), lambda text: say(Note(text=text)))
            left -= (staging / name).stat().st_size
            meter.next_file(name)
    return digests


def _remote(request: Request, staging: Path, say: Callable[[Event], None]) -> dict[str, str]:
    token = _token(request)
    with client() as http:
        if request.kind == "hub":
            found = look_up(request.source, request.file, token)
            files, origin = found.files, f"hf:{found.origin}"
        else:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            files = {_name_of(request.source): Remote(url=request.source, sha256=request.sha256, headers=headers)}
            parts = urlsplit(request.source)  # secrets in the user part or the query stay out of worker.toml
            origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        files = _with_digest(files, request.sha256, request.said_by)
        sizes = [remote.size_bytes for remote in files.values()]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        say(Plan(files=tuple(files), total_bytes=total, origin=origin))
        _drop_others(staging, files)
        if total is not None:
            need_space(staging, max(0, total - sum(_here(staging / name) for name in files)))
        meter = _Meter(say, total, "fetch")
        digests = {}
        for name, remote in files.items():
            target, report = staging / name, meter.on_bytes(name)
            told = meter.on_size(name) if request.kind == "url" else lambda _size: None
            digests[name] = fetch(http, remote, target, report, lambda text: say(Note(text=text)), told)
            meter.next_file(name)
        return digests


def _token(request: Request) -> str:
    try:
        return secret("hub-token", request.token_file) if request.token_file else ""
    except ConfigError as error:
        raise FetchFailed(f"--token-file: {'; '.join(error.problems).removeprefix('hub-token: ')}.") from None


def _with_digest(files: Mapping[str, Remote], sha256: str, said_by: str) -> dict[str, Remote]:
    """Put the digest that the user gave on the main file, the first."""
    if not sha256:
        return dict(files)
    first = next(iter(files))
    known = files[first].sha256
    if known and known != sha256:
        raise FetchFailed(
            f"{said_by} says {sha256}, but the hub lists {first} with {known}: the file was changed there; name the"
            " revision that you mean, or correct the digest."
        )
    return {**files, first: msgspec.structs.replace(files[first], sha256=sha256)}


def _name_of(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return name if name and name not in (".", "..") else "model"


def _here(path: Path) -> int:
    for candidate in (path, path.with_name(path.name + ".part")):
        if candidate.exists():
            return candidate.stat().st_size
    return 0


def _drop_others(staging: Path, wanted: Mapping[str, Remote]) -> None:
    """An earlier, interrupted pull of something else under this name leaves nothing in the model."""
    kept = {_LOCK} | {name + ending for name in wanted for ending in ("", ".part", ".part.json")}
    for name, path in folder_files(staging).items():
        if name not in kept:
            path.unlink()


# ---- this machine ------------------------------------------------------------------------------------------


def _local(request: Request, staging: Path, say: Callable[[Event], None]) -> dict[str, str]:
    """Link the files where the file system allows it, else copy; the source stays as it is."""
    source, sha256, said_by = Path(request.source), request.sha256, request.said_by
    files = _local_files(source)
    total = sum(path.stat().st_size for path in files.values())
    say(Plan(files=tuple(files), total_bytes=total, origin=str(source)))
    _drop_others(staging, {})
    _bring(files, staging, total, say)
    meter = _Meter(say, total, "hash")
    digests = {}
    for name in files:
        done = 0
        report = meter.on_bytes(name)

        def count(read: int, report: Callable[[int], None] = report) -> None:
            nonlocal done
            done += read
            report(done)

        digests[name] = hash_file(staging / name, count)
        meter.next_file(name)
    first = next(iter(digests))
    if sha256 and digests[first] != sha256:
        shutil.rmtree(staging)
        raise FetchFailed(f"{source} has the sha256 {digests[first]} where {said_by} says {sha256}.")
    return digests


def _local_files(source: Path) -> dict[str, Path]:
    if source.is_dir():
        files = folder_files(source)
        if not files:
            raise FetchFailed(f"{source} holds no file.")
        return dict(sorted(files.items()))
    company = [source.with_name(name) for name in shards(source.name)]
    config = source.with_name(source.name + ".json")
    missing = [path for path in company if not path.is_file()]
    if missing:
        raise FetchFailed(f"{missing[0]} does not exist.")
    return {path.name: path for path in [*company, *([config] if config.is_file() else [])]}


def _bring(files: Mapping[str, Path], staging: Path, total: int, say: Callable[[Event], None]) -> None:
    meter = _Meter(say, total, "copy")
    checked = False
    for name, path in files.items():
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        real = path.resolve()
        try:
            os.link(real, target)
        except OSError:  # another file system, or a file of another user's
            if not checked:
                need_space(staging, total)
                checked = True
            _copy(real, target, meter.on_bytes(name))
        meter.next_file(name)


def _copy(source: Path, target: Path, report: Callable[[int], None]) -> None:
    done = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(2**20):
            writer.write(data)
            done += len(data)
            report(done)


if __name__ == "__main__":
    main()
