"""Models that a studio's jobs bring the address of: fetched, proved, served, and kept for the next job.

Theory of operation. A claim names its model and where the files are. One that this worker serves runs as it is. With
`[coordinator.studio] models = "download"` another one is fetched first: the claim is accepted and held meanwhile, the
files come by the child that `supervisor models pull` has (pull_child.py; Range, sha256, disk and size are its matters,
the addresses are looked at by pull_guard.py), the engine is told from the files, and the model is taken on like one of
an order: proved, then announced. The words of this wire for progress are lines of the log that name the job.

One fetch goes on at a time. It goes on when the session breaks, so that the same job offered again finds it further;
what a cut connection or a restart left is resumed. What was fetched stays within `models_gb`: the model that was unused
for longest goes first, never the one that is being fetched, and one that has jobs goes when they are done.

    FOLDER/NAME/…             a model's files       FOLDER/.store/…           see model_store.py
    FOLDER/.store/named/NAME  where they came from, and the table by which they are served
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta

from engines.catalog import CATALOG
from engines.catalog_options import options_of
from supervisor.errors import SupervisorError
from supervisor.link.dialects.base import Roll
from supervisor.link.dialects.studio_frames import Claim, Words
from supervisor.link.dialects.studio_offers import Unfit
from supervisor.model_guess import Guess
from supervisor.model_store import Kept, Manifest, Store, folder_bytes
from supervisor.pull import entry, run_pull
from supervisor.pull_source import folder_name
from supervisor.pull_wire import Event, Finished, Note, Plan, Progress, Request, Wanted
from supervisor.roster import Origin
from supervisor.settings import ModelTable
from supervisor.settings_dialects import StudioTable
from supervisor.state import write_atomically

log = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0
MOST_FILES = 64
PACE_S = 600.0  # one fetch goes on at a time: a server that trickles would keep all others waiting for ever
PACE_BYTES = 2**20
# Which of a studio's programs have an engine here that loads the same files, and for which kinds.
SERVED: dict[str, frozenset[str]] = {
    "llama-cpp": frozenset({"llm"}),
    "onnx": frozenset({"audio_tts", "image", "video"}),
    "synthetic": frozenset({"llm", "audio_stt", "audio_tts", "image", "video"}),
}
_ROLES = frozenset({"diffusion-model", "text-encoder", "text-encoder-vision", "vae", "lora", "model"})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[^/\s?#:@\[\]]+)(:\d+)?(/[^\s]*)?\Z")


class _File(Words, frozen=True):
    """One file of a claim's `modelSource`."""

    role: str
    url: Annotated[str, Meta(min_length=1, max_length=4000)]
    filename: str
    approx_bytes: Annotated[int, Meta(ge=0)] | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None = None


class _Defaults(Words, frozen=True):
    """What of `cliDefaults` an engine here is told at its load; the rest is said with each job or left to the model."""

    context_size: Annotated[int, Meta(ge=16, le=2**31 - 1)] | None = None
    mmap: bool | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim asks for. Equal ones are the same model."""

    name: str
    kind: str
    slug: str
    files: tuple[Wanted, ...]
    main: str = ""
    options: dict[str, Any] = {}

    def same_files(self, other: Source) -> bool:
        """Whether the same bytes are meant, for the same program; what else is said of them may differ."""
        mine, theirs = ({(each.name, each.sha256 or each.url) for each in one.files} for one in (self, other))
        return (self.slug, self.options, mine) == (other.slug, other.options, theirs)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    source: Source
    table: ModelTable


class Failed(Exception):
    """The model cannot be had; one sentence. Another try may go better."""


def source_of(claim: Claim, kind: str, table: StudioTable) -> Source:
    """What a claim asks to be fetched.

    Raises:
        Unfit: it cannot be fetched, or nothing here could load it.
    """
    slug = claim.model_source.engine
    if kind not in SERVED.get(slug, ()):
        raise Unfit(f"modelSource.engine: no engine of this worker loads what {slug[:50]!r} does, for {kind}.")
    try:
        files = msgspec.convert(claim.model_source.files or [], list[_File])
        defaults = msgspec.convert(claim.model_source.cli_defaults or {}, _Defaults)
    except msgspec.ValidationError as error:
        raise Unfit(f"modelSource: {error}.") from None
    for number, file in enumerate(files):
        _check(file, f"modelSource.files[{number}]", table.hosts)
    names = [file.filename for file in files]
    if len(set(names)) < len(names) or len(files) > MOST_FILES or (not files and slug != "synthetic"):
        raise Unfit(f"modelSource.files: 1 to {MOST_FILES} files with different names are wanted.")
    total = sum(file.approx_bytes or 0 for file in files)
    if total > table.models_gb * 2**30:
        raise Unfit(
            f"modelSource.files: {total / 2**30:.1f} GiB are more than this worker keeps of models"
            f" ({table.models_gb:g} GiB, coordinator.studio.models_gb)."
        )
    wanted = tuple(
        Wanted(
            url=file.url,
            name=file.filename,
            sha256=(file.sha256 or "").lower(),
            approx_bytes=file.approx_bytes or 0,
        )
        for file in files
    )
    main = next((file.filename for file in files if file.role in ("model", "diffusion-model")), "")
    options = {"n_ctx": defaults.context_size, "use_mmap": defaults.mmap} if slug == "llama-cpp" else {}
    given = {name: value for name, value in options.items() if value is not None}
    return Source(name=claim.model, kind=kind, slug=slug, files=wanted, main=main, options=given)


def _check(file: _File, at: str, hosts: list[str]) -> None:
    if file.role not in _ROLES:
        raise Unfit(f"{at}.role: {file.role[:50]!r} is none of {', '.join(sorted(_ROLES))}.")
    if file.role == "lora":
        raise Unfit(f"{at}.role: no engine of this worker takes a lora.")
    parts = file.filename.split("/")
    if len(parts) > 4 or not all(_NAME.fullmatch(part) for part in parts) or file.filename.endswith(".part"):
        raise Unfit(f"{at}.filename: {file.filename[:100]!r} is no plain file name.")
    found = _URL.match(file.url)
    if found is None:
        raise Unfit(f"{at}.url: expected an https address without a password in it.")
    ours = found["host"].strip("[]").lower() in {host.lower() for host in hosts}
    if found["scheme"] == "http" and not (ours and file.sha256):
        raise Unfit(f"{at}.url: http needs a sha256 and a host that coordinator.studio.hosts names; use https.")


class _Fetch:
    """One that is under way, and who waits for it: each is told None, or why not."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waiting: dict[str, Callable[[str | None], None]] = {}


class Models:
    """See the module. `run` takes on what earlier lives have fetched; `begin` needs its nursery.

    Args:
        folder: for the files.
        roll: where models are served.
        fetch: as `supervisor.pull.run_pull`.
    """

    def __init__(self, folder: Path, table: StudioTable, roll: Roll, fetch: Any = run_pull) -> None:
        self._store, self._table, self._roll, self._fetch = Store(folder), table, roll, fetch
        self._named = folder / ".store" / "named"
        self._under_way: dict[str, _Fetch] = {}
        self._one = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that are asked for though no model serves them."""
        return tuple(self._table.kinds)

    def missing(self, claim: Claim, kind: str) -> Source | None:
        """What has to be fetched before a claim can run; None when it can run, or be declined, as it is.

        Raises:
            Unfit: its model is not served, and cannot be fetched.
        """
        origin = self._roll.origin(claim.model)
        if origin is not None and origin is not Origin.DOWNLOAD:
            return None
        try:
            source = source_of(claim, kind, self._table)
        except Unfit:
            if origin is None:
                raise
            return None  # what is here under this name does
        if origin is not None:
            record = self._record(self._key(claim.model))
            if record is None or record.source.same_files(source):
                return None
        return source

    def begin(self, source: Source, job: str, done: Callable[[str | None], None]) -> None:
        """Fetch and serve a model; `done` is told None, or in a sentence why it cannot be.

        A fetch of the same that is under way is joined.
        """
        assert self._nursery is not None
        under_way = self._under_way.get(source.name)
        if under_way is not None and under_way.source.same_files(source):
            under_way.waiting[job] = done
            return
        fetch = self._under_way[source.name] = _Fetch(source)
        fetch.waiting[job] = done
        self._nursery.start_soon(self._serve, fetch)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take on what earlier lives have fetched, then see to each `begin`. Runs until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            for key in self._store.keys():
                if (record := self._record(key)) is not None:
                    self._nursery.start_soon(self._again, record)
            await trio.sleep_forever()

    # ---- one model

    async def _again(self, record: _Record) -> None:
        if fault := await self._roll.take_on(record.table, Origin.DOWNLOAD):
            log.warning("%s was fetched earlier and is not served: %s", record.table.name, fault.message)

    async def _serve(self, fetch: _Fetch) -> None:
        problem: str | None = "The worker stopped before the model was there."
        try:
            async with self._one:
                table = await self._brought(fetch)
                fault = await self._roll.take_on(table, Origin.DOWNLOAD)
                problem = fault.message if fault is not None else None
        except Failed as error:
            problem = str(error)
        except (SupervisorError, OSError) as error:
            problem = f"The model {fetch.source.name!r} cannot be fetched: {error}"
        except Exception:  # the link would end of it
            log.exception("a model could not be fetched")
            problem = f"The model {fetch.source.name!r} cannot be fetched, by a mistake of this worker's program."
        finally:
            if self._under_way.get(fetch.source.name) is fetch:
                del self._under_way[fetch.source.name]
            for done in fetch.waiting.values():
                done(problem)

    async def _brought(self, fetch: _Fetch) -> ModelTable:
        """The table of a model whose files are here. Raises Failed, SupervisorError, OSError."""
        source = fetch.source
        if not source.files:
            return ModelTable(name=source.name, engine=source.slug)
        key = self._key(source.name)
        record = self._record(key)
        if record is not None and record.source.same_files(source) and self._whole(key):
            return record.table
        origin = self._roll.origin(source.name)
        if origin is not None and origin is not Origin.DOWNLOAD:
            raise Failed(f"The model {source.name!r} is served here by now, as {origin.value} wants it.")
        if origin is not None:
            await self._roll.let_go(source.name, "a job names other files for it")
        await self._make_room(sum(file.approx_bytes for file in source.files), key)
        with self._store.pulling(key):
            request = Request(
                kind="files",
                source=f"a studio's job, for {source.name}",
                staging=str(self._store.staging(key)),
                files=source.files,
                hosts=tuple(self._table.hosts),
                limit_bytes=int(self._table.models_gb * 2**30),
            )
            finished = await self._paced(request, fetch)
            table = await trio.to_thread.run_sync(self._settled, key, source, finished)
        await self._make_room(0, key)
        return table

    async def _paced(self, request: Request, fetch: _Fetch) -> Finished:
        """Fetch for as long as enough comes: `PACE_BYTES` in `PACE_S`. Raises Failed, SupervisorError."""
        with trio.move_on_after(PACE_S) as patience:
            _plan, finished = await self._fetch(request, _Teller(fetch, patience))
            assert isinstance(finished, Finished)
            return finished
        raise Failed(
            f"The files of {fetch.source.name!r} come too slowly: less than {PACE_BYTES // 2**20} MiB in"
            f" {PACE_S / 60:g} minutes; what came is kept."
        )

    def _settled(self, key: str, source: Source, finished: Finished) -> ModelTable:
        """Give the files their place. In a thread: an older model is deleted."""
        chosen = finished.guess
        if source.slug == "synthetic":
            chosen = Guess(engine="synthetic", main=source.main or next(iter(finished.files)), why="as the job says")
        if chosen.engine == "image" and source.kind == "video":
            chosen = msgspec.structs.replace(chosen, engine="video")  # the same layout
        if not chosen.engine or source.kind not in CATALOG[chosen.engine].kinds:
            raise Failed(f"No engine here does {source.kind} with the files of {source.name!r}: {chosen.why}.")
        table = entry(source.name, chosen, self._store.folder(key), finished.files)
        backend = chosen.backend or CATALOG[chosen.engine].backends[0]
        known = {field.name for field in msgspec.structs.fields(options_of(chosen.engine, backend))}
        table["options"] = {name: value for name, value in source.options.items() if name in known}
        made = msgspec.convert(table, ModelTable)
        staging = self._store.staging(key)
        sizes = {name: (staging / name).stat().st_size for name in finished.files}
        manifest = Manifest(
            name=source.name,
            kind="files",
            source="studio",
            origin="a studio's job",
            pulled_at=time.time(),
            files={name: Kept(size_bytes=sizes[name], sha256=digest) for name, digest in finished.files.items()},
            guess=chosen,
        )
        self._named.mkdir(parents=True, exist_ok=True)
        # Before the files have their name: a record without files is nothing, files without a record would stay.
        write_atomically(self._named / key, msgspec.json.encode(_Record(source=source, table=made)))
        self._store.settle(key, manifest)
        return made

    # ---- the disk

    async def _make_room(self, coming_bytes: int, but: str) -> None:
        """Let models go until what is here and what comes are within the budget; the longest unused first."""
        budget = int(self._table.models_gb * 2**30)
        while True:
            found = await trio.to_thread.run_sync(self._sizes)
            sizes = {key: size for key, size in found.items() if not self._is_owned(key)}
            partly = sizes.pop(but, 0) if coming_bytes else 0
            others = {key: size for key, size in sizes.items() if key != but}
            if sum(sizes.values()) + max(coming_bytes, partly) <= budget or not others:
                return
            key = min(others, key=self._last_used)
            record = self._record(key)
            name = record.table.name if record is not None else key
            log.info("the model %s is deleted: fetched models may take %g GiB", name, self._table.models_gb)
            if record is not None and self._roll.origin(name) is Origin.DOWNLOAD:
                await self._roll.let_go(name, "its place on the disk is needed for another")
            if not await trio.to_thread.run_sync(self._store.remove, key):
                raise Failed(f"There is no room for another model: {name} is in use by another program.")
            (self._named / key).unlink(missing_ok=True)

    def _is_owned(self, key: str) -> bool:
        """Whether somebody else serves what was fetched once: its owner in worker.toml, or an order."""
        record = self._record(key)
        origin = None if record is None else self._roll.origin(record.table.name)
        return origin is not None and origin is not Origin.DOWNLOAD

    def _sizes(self) -> dict[str, int]:
        """Model -> bytes, its interrupted fetch included."""
        keys = {*self._store.keys(), *self._store.interrupted()}
        return {key: folder_bytes(self._store.folder(key)) + folder_bytes(self._store.staging(key)) for key in keys}

    def _last_used(self, key: str) -> float:
        manifest = self._store.manifest(key)
        return self._store.last_loaded(key) or (manifest.pulled_at if manifest is not None else 0.0)

    def _whole(self, key: str) -> bool:
        """Whether the files are there, in the sizes that they came with; their content is judged before each load."""
        manifest, folder = self._store.manifest(key), self._store.folder(key)
        with contextlib.suppress(OSError):
            return manifest is not None and all(
                (folder / name).stat().st_size == kept.size_bytes for name, kept in manifest.files.items()
            )
        return False

    def _record(self, key: str) -> _Record | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self._named / key).read_bytes(), type=_Record)
        return None

    @staticmethod
    def _key(name: str) -> str:
        """Two names have two folders, however odd they are."""
        folder = folder_name(name) if name.strip(".") else ""
        return folder if folder == name else f"{folder[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


class _Teller:
    """Tells the jobs that wait how far their model is, in lines of the log; who waits for bytes gets new patience."""

    def __init__(self, fetch: _Fetch, patience: trio.CancelScope) -> None:
        self._fetch, self._patience = fetch, patience
        self._seen_bytes = 0
        self._told_at = -float("inf")

    def say(self, event: Event) -> None:
        """One line of the child."""
        name = self._fetch.source.name
        if isinstance(event, Progress):
            self._pace(event.done_bytes)
        match event:
            case Plan(files=files, total_bytes=total):
                size = f", about {total / 2**30:.2f} GiB" if total else ""
                self._log(f"{name} is fetched: {len(files)} files{size}")
            case Note(text=text):
                self._log(f"{name}: {text}")
            case Progress() if trio.current_time() >= self._told_at + TOLD_EVERY_S:
                of = f" of about {event.total_bytes / 2**30:.2f}" if event.total_bytes else ""
                self._log(f"{name}: {event.done_bytes / 2**30:.2f}{of} GiB are here")

    def _pace(self, done_bytes: int) -> None:
        self._seen_bytes = min(self._seen_bytes, done_bytes)  # a file that has changed begins anew
        if done_bytes >= self._seen_bytes + PACE_BYTES:
            self._seen_bytes = done_bytes
            self._patience.deadline = trio.current_time() + PACE_S

    def _log(self, text: str) -> None:
        self._told_at = trio.current_time()
        tell = partial(log.info, "%s", text)
        for job in self._fetch.waiting:
            tell(extra={"job": job})
