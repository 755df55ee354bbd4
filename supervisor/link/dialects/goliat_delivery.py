"""Files of studies: their config in, their results out.

The native side uploads one file after the other, a dashboard wants all of an assignment at once. So `upload` only takes
a file into the parcel of its attempt; `hand_over` delivers the whole when the attempt is said to be complete. What the
outbox keeps is opened when it is needed; what could not be kept is opened at once, and its descriptor held, because the
attempt's folder is about to go.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import stat
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from protocol.engine_wire import OutputFile
from protocol.faults import refuse
from protocol.link_wire import RESULT_FILE, FileRef
from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.link.dialects.goliat_wire import Slip
from supervisor.link.ledger import Key
from supervisor.link.outbox import Outbox
from supervisor.link.transfer import Output
from supervisor.link.tries import Moved, nobody, unusable
from supervisor.link.web import Moving

if TYPE_CHECKING:
    from supervisor.link.dialects.goliat_upload import Part

log = logging.getLogger(__name__)

CONFIG = "config"  # name of the input file
_SCHEME = "assignment:"


class _Taken(NamedTuple):
    file: OutputFile
    open: Callable[[], int]
    moved: Moved
    held: int  # a descriptor that is ours to close, or -1


class GoliatDelivery:
    """The `Delivery` of this dialect.

    Args:
        kept: where results stay that the dashboard has no place for, `ID.ATTEMPT` for each. Nothing there is written
            over: attempts are numbered anew in each life, so a number that other results have is passed over.
    """

    def __init__(self, http: Http, kept: Path) -> None:
        self._http, self._kept = http, kept
        self._configs: dict[str, bytes] = {}
        self._parcels: dict[Key, dict[str, _Taken]] = {}
        self._slips: dict[Key, Slip] = {}

    # ---- in

    def offer(self, slip: Slip, config: bytes) -> FileRef:
        """Keep the config of an assignment until `drop`; the input file for its offer."""
        self._configs[slip.job] = config
        digest = hashlib.sha256(config).hexdigest()
        return FileRef(name=CONFIG, url=_SCHEME + slip.job, size=len(config), sha256=digest)

    async def fetch(self, file: FileRef, target: Callable[[], int], moved: Moved = nobody) -> None:
        """Write an input file; see `Transfer.fetch`. It was downloaded before the offer."""
        config = self._configs.get(file.url.removeprefix(_SCHEME))
        if config is None:
            raise refuse("input_unavailable", f"The input {file.name!r} is not here any more.", file.name)

        def write() -> None:
            with os.fdopen(target(), "wb") as out:
                out.write(config)

        try:
            await trio.to_thread.run_sync(write)
        except OSError as error:
            raise unusable(error) from None
        moved(len(config))

    # ---- out

    async def upload(
        self,
        template: str,
        file: OutputFile,
        source: Output,
        until: float | None = None,
        moved: Moved = nobody,
        patience_s: float | None = None,
    ) -> None:
        """Take an output into its parcel; see `Transfer.upload`. `template` is the slip of its attempt."""
        await trio.lowlevel.checkpoint()
        try:
            slip = Slip.read(template)
        except ValueError as error:
            raise refuse("upload_failed", f"The result belongs to a claim of another dialect: {error}.") from None
        self._slips[slip.key] = slip
        if file.name == RESULT_FILE or isinstance(source, bytes):
            return  # the words of the study itself: the dashboard has had its lines
        parcel = self._parcels.setdefault(slip.key, {})
        if file.name in parcel:
            return
        if patience_s == math.inf:  # kept on disk
            parcel[file.name] = _Taken(file, source, moved, -1)
            return
        try:
            fd = source()
        except OSError as error:
            raise unusable(error) from None
        parcel[file.name] = _Taken(file, functools.partial(_again, fd), moved, fd)

    def slip(self, key: Key) -> Slip | None:
        """Of an attempt whose outputs came here."""
        return self._slips.get(key)

    async def hand_over(self, slip: Slip, files: Iterable[OutputFile], *, to_dashboard: bool) -> str:
        """Deliver the parcel of an attempt.

        Returns:
            Where it lies on this machine, or "" when the dashboard has it or there is nothing.

        Raises:
            Trouble: the dashboard did not take it; with `again` it may later.
            FaultError: a file is not what the engine said.
            OSError: it cannot be read or kept now.
        """
        taken = self._parcels.get(slip.key, {})
        whole = [taken[file.name] for file in files if file.name in taken]
        if not whole:
            return ""
        if to_dashboard:
            try:
                await self._send(slip, whole)
            except Trouble as trouble:
                if trouble.again or trouble.status == 404:
                    raise
                log.warning("the dashboard refuses the results for good: %s", trouble, extra={"job": slip.job})
            else:
                return ""
        return await self._keep(slip, whole)

    async def _send(self, slip: Slip, whole: list[_Taken]) -> None:
        client = await self._http.client()
        from supervisor.link.dialects.goliat_upload import Form, Part  # after httpx, which takes its time

        patience = trio.CancelScope()
        parts: list[Part] = [Part(each.file, each.open, Moving(each.moved, patience)) for each in whole]
        form = Form(f"split_{slip.index}" if slip.index >= 0 else slip.job, parts)
        url = self._http.url(f"api/assignments/{_quoted(slip.id)}/results")
        request = client.build_request("POST", url, headers=form.headers)
        request.stream = form
        try:
            await self._http.send(request, patience)
        finally:
            with trio.CancelScope(shield=True):
                await form.aclose()

    async def _keep(self, slip: Slip, whole: list[_Taken]) -> str:
        await trio.to_thread.run_sync(lambda: self._kept.mkdir(mode=0o700, parents=True, exist_ok=True))
        outbox, number = Outbox(self._kept, 2**63 - 1), slip.attempt
        said = {each.file.name: each.file.sha256.lower() for each in whole}
        while (found := await trio.to_thread.run_sync(_digests, outbox.folder(slip.job, number))) not in (None, said):
            number += 1
        if found is None:
            await outbox.keep(slip.job, number, [(each.file, each.open) for each in whole])
        return str(outbox.folder(slip.job, number))

    def drop(self, slip: Slip, *, config: bool = True) -> None:
        """Its end has been told: forget its files."""
        if config:
            self._configs.pop(slip.job, None)
        self._slips.pop(slip.key, None)
        for each in self._parcels.pop(slip.key, {}).values():
            if each.held >= 0:
                os.close(each.held)

    def close(self) -> None:
        """Forget all files."""
        for parcel in self._parcels.values():
            for each in parcel.values():
                if each.held >= 0:
                    os.close(each.held)
        self._parcels.clear()


def _digests(folder: Path) -> dict[str, str] | None:
    """Name -> sha256 of what is kept there; None when there is nothing.

    Whatever people left there that cannot be read, or is no plain file, makes it something that we did not keep: empty.
    """
    if not os.path.lexists(folder):
        return None
    found = {}
    try:
        for path in folder.iterdir():
            if not stat.S_ISREG(path.lstat().st_mode):  # to open a pipe would wait for its other end
                return {}
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        log.warning("other results are taken to be in %s: %s", folder, error)
        return {}
    return found


def _again(fd: int) -> int:
    """Another descriptor of the same file, at its beginning."""
    os.lseek(fd, 0, os.SEEK_SET)
    return os.dup(fd)


def _quoted(id_: str) -> str:
    return urllib.parse.quote(id_, safe="")
