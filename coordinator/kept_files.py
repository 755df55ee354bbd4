"""Files that clients keep here: rows in the store, bytes in the blobs, each tenant with its own and a bound on them."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.blobs.base import Blobs
from coordinator.store import Store
from coordinator.store.shelf import FileRecord
from coordinator.store.threads import StoreThreads
from protocol.faults import FaultError, refuse
from protocol.ids import RANDOM_BYTES, new_id

MAX_FILE_BYTES = 200 * 2**20  # OpenAI's own limit of a batch file
MAX_OUTPUT_BYTES = 8 * 2**30  # what a batch of ours may make
MAX_TENANT_BYTES = 20 * 2**30
MAX_FILENAME_CHARS = 255

# Inside the class `list` is the method.
Records = list[FileRecord]


class KeptFiles:
    """Files of all tenants. Every call but `purge` names a tenant and sees only that tenant's."""

    def __init__(self, store: Store, blobs: Blobs, tenant_bytes: int = MAX_TENANT_BYTES) -> None:
        self._store, self._blobs, self._tenant_bytes = store, blobs, tenant_bytes
        self._threads = StoreThreads()

    async def receive(
        self, data: AsyncIterator[bytes], record: FileRecord, limit: int = MAX_FILE_BYTES, *, bounded: bool = True
    ) -> FileRecord:
        """Store the bytes of a file that `keep` or `drop` gets next.

        Args:
            data: its bytes.
            record: without blob and size; its digest, when it has one, is what the bytes must have.
            limit: most bytes it may have.
            bounded: whether the tenant's bound counts; what a batch has made is never thrown away for it.

        Raises:
            FaultError: payload_too_large (this file, or all of the tenant's), storage_full, invalid_request (another
                digest).

        Cancellation: nothing stays behind.
        """
        room = limit
        if bounded:
            room = self._tenant_bytes - await self._threads.read(self._store.stored_bytes, record.tenant)
        if room <= 0:
            raise _tenant_full(self._tenant_bytes)
        try:
            blob = await self._blobs.put(data, min(limit, room), record.sha256)
        except FaultError as error:
            if error.fault.code == "upload_failed":
                message = "file: The bytes that came have another sha256 than x-content-sha256 says; send them again."
                raise refuse("invalid_request", message, "file") from None
            if error.fault.code == "payload_too_large" and room < limit:
                raise _tenant_full(self._tenant_bytes) from None
            raise
        return msgspec.structs.replace(
            record, name=record.name[:MAX_FILENAME_CHARS], blob=blob.key, size=blob.size, sha256=blob.sha256
        )

    async def keep(self, record: FileRecord, keep_s: int = 0) -> FileRecord:
        """Keep what was received for `keep_s` seconds, or until it is deleted. Raises FaultError(storage_full)."""
        return await self._threads.write(self._store.add_file, record, keep_s * 1000)

    async def drop(self, record: FileRecord) -> None:
        """Delete what was received, unless it was kept. Shielded from cancellation."""

        def unused() -> bool:
            return not self._store.has_blob(record.blob)

        with anyio.CancelScope(shield=True):
            if await self._threads.read(unused):
                await self._delete(record)

    async def get(self, file_id: str, tenant: str) -> FileRecord | None:
        """The tenant's file."""
        return await self._threads.read(self._store.get_file, file_id, tenant)

    async def find(self, file_id: str, tenant: str, field: str = "file_id") -> FileRecord:
        """The tenant's file. Raises FaultError(not_found) naming `field`."""
        record = await self.get(file_id, tenant)
        if record is None:
            raise refuse("not_found", f"There is no file {file_id[:100]!r}.", field)
        return record

    async def list(
        self, tenant: str, limit: int, after: str = "", purpose: str = "", oldest_first: bool = False
    ) -> Records:
        """The tenant's files behind the one with the id `after`."""
        return await self._threads.read(self._store.list_files, tenant, limit, after, purpose, oldest_first)

    async def remove(self, file_id: str, tenant: str) -> bool:
        """Delete; False when the tenant has no such file. Raises FaultError(conflict) while a batch reads it."""
        record = await self._threads.write(self._store.remove_file, file_id, tenant)
        if record is not None:
            await self._delete(record)
        return record is not None

    async def purge(self) -> None:
        """Delete what nobody wants to keep any longer; rows first, so that no row names a file that is gone."""
        while purged := await self._threads.write(self._store.purge_files):
            for record in purged:
                await self._delete(record)

    async def _delete(self, record: FileRecord) -> None:
        await run_sync(self._blobs.delete, "", (record.blob,))


def new_file_id() -> str:
    """A fresh id as OpenAI's look."""
    return new_id("file", int(time.time() * 1000), os.urandom(RANDOM_BYTES)).replace("_", "-", 1)


def _tenant_full(limit: int) -> FaultError:
    return refuse("payload_too_large", f"file: All files of this tenant may have {limit} bytes; delete some.", "file")
