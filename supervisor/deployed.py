"""Models that the coordinator has this worker serve: the orders `serve` and `unserve`.

The owner decides whether there are any: `[coordinator.deploy] sources` names the addresses from which models may
come. A deployed model is pulled as `supervisor models pull` would, with its digest, into worker.toml, where it is like
any other from then on: it outlives a restart, and its owner may change it or throw it out. Its name, `name@revision`,
is one that no owner gives by accident; an order for any other is refused, so that nothing of the owner's is replaced.

Both orders may be given again: what is under way is waited for, what is done is answered at once.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from engines.catalog import CATALOG
from protocol.faults import Fault
from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import Refused as PullRefused
from supervisor.link.remote import Refused, Serve, Unserve
from supervisor.model_store import folder_bytes
from supervisor.pulls import Pulls
from supervisor.settings import ModelTable, Settings

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[0-9a-f]{10}\Z")
# A user (`https://models.test@elsewhere.test/`), what programs read in more than one way, and the way out of a folder.
_ODD = re.compile(r"^https://[^/?#]*@|[\x00-\x20\x7f\\]|/(\.|%2e)(\.|%2e)?(/|$)", re.IGNORECASE)
LET_GO_S = 3600.0  # what jobs of a model get that is not to be served any more


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
        self._fetching = trio.Lock()  # one after the other, so that together they keep to `max_gb`
        self._last: Pull | None = None

    async def serve(self, order: Serve) -> str:
        """Fetch a model, serve it, and say so when it was proved.

        Raises:
            Refused: it is not allowed, cannot be fetched, or did not pass its proof.

        Cancellation: the pull goes on, and the next order finds it.
        """
        table = self._named(order.name)
        if table is None:
            self._allow(order)
            async with self._fetching:
                if self._named(order.name) is None:
                    self._allow(order)  # the owner may have thought better of it meanwhile
                    await self._pull(order)
                    await self._reload()
            table = self._named(order.name)
        if table is None:
            raise Refused(f"{order.name} was fetched, and is not in the configuration that is in force; reload it.")
        fault = await self._models.take_on(table)
        if fault is not None:
            raise Refused(fault.message)
        return f"{order.name} is served."

    async def unserve(self, order: Unserve) -> str:
        """Serve a model no more, and delete it. Raises Refused for what was not deployed."""
        self._check_name(order.name)
        await self._models.let_go(order.name, "the coordinator wants it no more", within_s=LET_GO_S)
        if self._named(order.name) is None:
            return f"{order.name} is not here."
        try:
            said = await self._pulls.remove(Remove(name=order.name))
        except PullRefused as problem:
            raise Refused(str(problem)) from None
        await self._reload()
        return said

    def _named(self, name: str) -> ModelTable | None:
        self._check_name(name)
        return next((table for table in self._settings().models if table.name == name), None)

    def _check_name(self, name: str) -> None:
        if not NAME.match(name):
            raise Refused(f"name: {name[:100]!r} is no name of a deployed model (NAME@REVISION).")

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

    async def _pull(self, order: Serve) -> None:
        before = self._last
        if before is not None and before.name != order.name and self._pulls.under_way(before):
            async for _said in self._pulls.pull(before):  # whoever asked for it was cancelled
                pass
            await self._reload()
        allowed = self._settings().coordinator.deploy
        left = allowed.max_gb - self._taken_gb()
        if left <= 0:
            raise Refused(
                f"The deployed models of this worker take all of coordinator.deploy.max_gb ({allowed.max_gb:g} GiB)."
            )
        asked = Pull(
            source=order.source,
            name=order.name,
            engine=order.engine,
            file=order.file,
            sha256=order.sha256,
            options=msgspec.json.encode(order.options, order="deterministic").decode() if order.options else "",
            max_gb=left,
            token_file=allowed.token_file,
        )
        self._last = asked
        end: Mapping[str, Any] = {}
        try:
            async for said in self._pulls.pull(asked):
                end = said or end
        except PullRefused as problem:
            raise Refused(str(problem)) from None
        if end.get("t") != "done":
            raise Refused(str(end.get("message", "The pull ended without a word.")))
        if allowed.engines and end.get("engine") not in allowed.engines:
            await self._pulls.remove(Remove(name=order.name))
            raise Refused(f"engine: its files are for {end.get('engine')}, none of coordinator.deploy.engines.")

    def _taken_gb(self) -> float:
        homes = {Path(table.path).parent for table in self._settings().models if NAME.match(table.name) and table.path}
        return sum(folder_bytes(home) for home in homes if home.is_dir()) / 2**30


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
