"""Models that the coordinator has this worker serve: the orders `serve` and `unserve`.

The owner decides whether there are any: `[coordinator.deploy] sources` names the addresses from which models may
come. A deployed model is pulled as `supervisor models pull` would, with its digest, into worker.toml, where it is like
any other from then on: it outlives a restart, with or without a coordinator, and its owner may change it or throw it
out. Its name, `name@revision`, is one that no owner gives by accident; an order for any other is refused, and so is one
for a model of that name whose files were not pulled under it: nothing of the owner's is replaced or deleted.

Some are fetched side by side (`fetches`), each with a pull, a stall clock and an end of its own. What they are known to
become counts against `max_gb` from the moment that it is known: one that turns out to be too large for what the others
leave is called off.

Both orders may be given again: what is under way is waited for, what is done is answered at once. `unserve` calls off
what is still being fetched, and deletes what was fetched of it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import re
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from engines.catalog import CATALOG
from protocol.faults import Fault
from protocol.link_wire import Fetch
from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import Refused as PullRefused
from supervisor.link.remote import Refused, Serve, Unserve
from supervisor.model_store import Manifest, folder_bytes, home_of
from supervisor.pull_source import folder_name
from supervisor.pulls import Pulls
from supervisor.settings import ModelTable, Settings

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[0-9a-f]{10}\Z")
# A user (`https://models.test@elsewhere.test/`), what programs read in more than one way, and the way out of a folder.
_ODD = re.compile(r"^https://[^/?#]*@|[\x00-\x20\x7f\\]|/(\.|%2e)(\.|%2e)?(/|$)", re.IGNORECASE)
LET_GO_S = 3600.0  # what jobs of a model get that is not to be served any more
STALL_S, STALL_BYTES = 600.0, 2**20  # less than this in that time is no download
_STALLED = f"It stalls: less than {STALL_BYTES >> 20} MiB came in {STALL_S / 60:g} minutes; what was fetched is kept."
LOOK_BYTES = 64 * 2**20
CALL_OFF_S = 15.0  # until the processes of a pull have ended


class Models(Protocol):
    """The part of `Roster` that is used here."""

    async def take_on(self, table: ModelTable) -> Fault | None:
        """See `Roster.take_on`."""

    async def let_go(self, model: str, reason: str, *, within_s: float) -> Fault | None:
        """See `Roster.let_go`."""


class Deployed:
    """See the module. All methods belong to the trio thread.

    Args:
        settings: those in force.
        pulls: brings models into worker.toml and takes them out again.
        models: serves them.
        reload: takes up what changed in worker.toml.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        pulls: Pulls,
        models: Models,
        reload: Callable[[], Awaitable[Any]],
    ) -> None:
        self._settings, self._pulls, self._models, self._reload = settings, pulls, models, reload
        self._slots = trio.CapacityLimiter(1)
        self._lines = weakref.WeakValueDictionary[str, trio.Lock]()  # per model, one order at a time
        self._bringing: dict[str, set[trio.CancelScope]] = {}  # per model, who waits or fetches, and can be called off
        self._shares: dict[str, int] = {}  # of those that are being fetched: the bytes that they are known to become
        self._come: dict[str, tuple[int, int]] = {}  # of the same: bytes that are here, and in all (0: not known)
        self._proving = Counter[str]()  # orders that wait for a model to be loaded and proved

    async def serve(self, order: Serve) -> str:
        """Fetch a model, serve it, and say so when it was proved.

        Raises:
            Refused: it is not allowed, cannot be fetched, or did not pass its proof.

        Cancellation: the pull is called off, and the next order goes on with what it fetched.
        """
        self._check_name(order.name)
        await self._bring(order)
        table = self._named(order.name)
        if table is None:
            raise Refused(f"{order.name} was fetched, and is not in the configuration that is in force; reload it.")
        manifest = self._manifest(table)
        if order.sha256 and order.sha256 not in manifest.digests.values():
            raise Refused(f"{order.name} is here already, with other bytes than {order.sha256[:16]}…")
        self._proving[order.name] += 1
        try:
            fault = await self._models.take_on(table)
        finally:
            self._proving -= Counter([order.name])
        if fault is not None:
            raise Refused(fault.message)
        return f"{order.name} is served."

    async def unserve(self, order: Unserve) -> str:
        """Serve a model no more, and delete it, or what was fetched of it. Raises Refused for what was not deployed."""
        self._check_name(order.name)
        for scope in self._bringing.get(order.name, ()):
            scope.cancel()
        async with self._line(order.name):
            table = self._named(order.name)
            if table is not None:
                self._manifest(table)
            await self._models.let_go(order.name, "the coordinator wants it no more", within_s=LET_GO_S)
            if table is None and not await self._pulls.has_files(order.name):
                return f"{order.name} is not here."
            try:
                said = await self._pulls.remove(Remove(name=order.name))
            except PullRefused as problem:
                raise Refused(str(problem)) from None
            await self._reload()
            return said

    def fetches(self) -> tuple[Fetch, ...]:
        """How far each model is that was ordered and is not served yet."""
        coming = {name: self._come.get(name) for name in self._bringing}
        return (
            *(Fetch(name, "fetching", *come) if come else Fetch(name, "waiting") for name, come in coming.items()),
            *(Fetch(name, "proving") for name in self._proving if name not in coming),
        )

    def _line(self, name: str) -> trio.Lock:
        return self._lines.setdefault(name, trio.Lock())

    def _named(self, name: str) -> ModelTable | None:
        return next((table for table in self._settings().models if table.name == name), None)

    def _check_name(self, name: str) -> None:
        if not NAME.match(name):
            raise Refused(f"name: {name[:100]!r} is no name of a deployed model (NAME@REVISION).")

    def _manifest(self, table: ModelTable) -> Manifest:
        """What was pulled under this name. Raises Refused: its files are the owner's."""
        home = home_of(Path(table.path)) if table.path else None
        manifest = home[0].manifest(home[1]) if home is not None and home[1] == folder_name(table.name) else None
        if manifest is None:
            raise Refused(f"{table.name} is a model of this worker's owner: no order has fetched it.")
        return manifest

    def _allow(self, order: Serve) -> None:
        allowed = self._settings().coordinator.deploy
        if not allowed.sources:
            raise Refused(
                "The owner of this worker does not let a coordinator deploy: coordinator.deploy.sources is empty."
            )
        if _ODD.search(order.source):
            raise Refused("source: take a plain address, without a user, spaces, backslashes or a path of dots.")
        if not any(_matches(order.source, pattern) for pattern in allowed.sources):
            raise Refused(
                f"{order.source[:200]} is none of the sources that the owner of this worker allows "
                f"(coordinator.deploy.sources: {', '.join(allowed.sources)})."
            )
        is_repository = order.source.count("/") == 1 and ":" not in order.source and order.source[0] not in "./~"
        if not is_repository and not order.source.startswith("https://"):
            raise Refused("source: take an https URL or a repository (owner/repo).")
        if order.engine:
            self._allow_engine(order.engine, allowed.engines)

    def _allow_engine(self, engine: str, named: list[str]) -> None:
        """Engines that run a program of the model's choice are for the owner alone."""
        row = CATALOG.get(engine)
        if row is None or not row.needs_model:
            raise Refused(f"engine: {engine[:50]!r} is none that loads a model's files.")
        if named and engine not in named:
            raise Refused(f"engine: {engine} is none of coordinator.deploy.engines ({', '.join(named)}).")

    async def _bring(self, order: Serve) -> None:
        """Have it in worker.toml, unless it is. Raises Refused, also when it is called off meanwhile."""
        scopes = self._bringing.setdefault(order.name, set())
        with trio.CancelScope() as scope:
            scopes.add(scope)
            try:
                async with self._line(order.name):
                    if self._named(order.name) is not None:
                        return
                    self._allow(order)
                    self._slots.total_tokens = self._settings().coordinator.deploy.fetches
                    async with self._slots:
                        self._allow(order)  # the owner may have thought better of it meanwhile
                        self._shares[order.name], self._come[order.name] = 0, (0, 0)
                        try:
                            await self._pull(order)
                            scopes.discard(scope)  # from here on it is there, and goes by `unserve`
                            await self._reload()
                        finally:
                            del self._shares[order.name], self._come[order.name]
            finally:
                scopes.discard(scope)
                if not scopes:
                    self._bringing.pop(order.name, None)
        if scope.cancelled_caught:
            raise Refused(f"{order.name} is wanted no more.")

    async def _pull(self, order: Serve) -> None:
        allowed = self._settings().coordinator.deploy
        left = int(allowed.max_gb * 2**30) - self._taken(order.name)
        if left <= 0:
            raise self._no_room()
        asked = Pull(
            source=order.source,
            name=order.name,
            engine=order.engine,
            file=order.file,
            sha256=order.sha256,
            options=msgspec.json.encode(order.options, order="deterministic").decode() if order.options else "",
            max_gb=left / 2**30,
            token_file=allowed.token_file,
        )
        end = await self._follow(asked)
        if end.get("t") != "done":
            raise Refused(str(end.get("message", "The pull ended without a word.")))
        if allowed.engines and end.get("engine") not in allowed.engines:
            said = f"engine: its files are for {end.get('engine')}, none of coordinator.deploy.engines."
            try:
                await self._pulls.remove(Remove(name=order.name))
            except PullRefused as problem:
                raise Refused(f"{said} They are still here: {problem}") from None
            raise Refused(said)

    async def _follow(self, asked: Pull) -> Mapping[str, Any]:
        """Its end. Raises Refused: it cannot begin, stalls, or has no room; then it was called off."""
        end: Mapping[str, Any] = {}
        before, since = 0, trio.current_time()
        try:
            async with contextlib.aclosing(self._pulls.pull(asked)) as events:
                async for said in events:
                    end = said or end
                    here, total = end.get("done_bytes") or 0, end.get("total_bytes") or 0
                    if "done_bytes" in end:
                        self._come[asked.name] = here, total
                        before = min(before, here)  # a file that starts over comes anew from there
                    if here >= before + STALL_BYTES:
                        before, since = here, trio.current_time()
                    elif trio.current_time() > since + STALL_S:
                        raise Refused(_STALLED)
                    self._reckon(asked.name, here, total)
        except PullRefused as problem:
            raise Refused(str(problem)) from None
        finally:
            with trio.move_on_after(CALL_OFF_S, shield=True):
                await self._pulls.call_off(asked)
        return end

    def _reckon(self, name: str, here: int, total: int) -> None:
        """It is now known to become this large. Raises Refused when there is no room for that beside the others.

        Where no server told its size it grows with each event; then the disk is walked each `LOOK_BYTES` only.
        """
        bytes_, share = max(here, total), self._shares[name]
        if bytes_ <= share:
            return
        is_due = total >= here or not share or bytes_ // LOOK_BYTES > share // LOOK_BYTES
        if is_due and self._taken(name) + bytes_ > self._settings().coordinator.deploy.max_gb * 2**30:
            raise self._no_room()
        self._shares[name] = bytes_

    def _no_room(self) -> Refused:
        most = self._settings().coordinator.deploy.max_gb
        return Refused(
            f"The deployed models of this worker, with those that are being fetched, take all of "
            f"coordinator.deploy.max_gb ({most:g} GiB)."
        )

    def _taken(self, but: str) -> int:
        """Bytes of all deployed models besides this one, those that are being fetched included."""
        tables = [table for table in self._settings().models if NAME.match(table.name) and table.path]
        homes = [home for table in tables if (home := home_of(Path(table.path))) is not None]
        here = {store.folder(key) for store, key in homes}
        coming = sum(share for name, share in self._shares.items() if name != but)
        return coming + sum(folder_bytes(home) for home in here)


def _matches(source: str, pattern: str) -> bool:
    """Whether a pattern of the owner's allows an address. A star in its host stands for no other part of the address:
    `https://*.models.test/*` does not mean `https://elsewhere.test/x.models.test/`."""
    scheme = "https://"
    if not (source.startswith(scheme) and pattern.startswith(scheme)):
        return fnmatch.fnmatchcase(source, pattern)
    host, _, path = source.removeprefix(scheme).partition("/")
    wanted_host, slash, wanted_path = pattern.removeprefix(scheme).partition("/")
    if not slash and wanted_host.endswith("*"):  # a star at the end is all that follows
        wanted_path = "*"
    return fnmatch.fnmatchcase(host, wanted_host) and fnmatch.fnmatchcase(path, wanted_path)
