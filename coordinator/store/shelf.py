"""Files that clients keep here, and batches: many requests in one file, worked off through the queue.

A batch owns no queue of its own. Its requests are jobs like any other; `note_items` remembers which job answers which
line, and as long as the batch is open these jobs are kept, because its output is made of them at the end.

    validating ──► in_progress ──► finalizing ──► completed, or expired when its window had passed
        │              │
        │              └► cancelling ──► cancelled
        └► failed      (from validating to cancelling as well)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from coordinator.records import JobRecord
from coordinator.store.forgetting import Forgets
from protocol.faults import Fault

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
BATCH_ENDS: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a client left, or that a batch made. `blob` is its key in the blobs.

    Attributes:
        name: as the client called it; never used as a path.
        expires_ms: instant by the store's clock; 0 means never.
    """

    id: str
    tenant: str
    name: str
    purpose: str
    blob: str
    size: int
    sha256: str
    created_ms: int = 0
    expires_ms: int = 0


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One batch.

    Attributes:
        input_file, input_blob: the file whose lines are its requests, and where its bytes are.
        end: how a batch that is finalizing will have ended; "" before.
        moved: state -> when it was entered, by the store's clock.
        expires_ms: end of its window.
        total: lines of its file; 0 until they were counted.
        completed, failed: lines that were answered, and lines with an error.
        errors: why it failed as a whole, by line of its file (0: the file itself).
        keep_s: how long its output files are kept; 0 means until they are deleted.
        usage: sums over its jobs.
        version: rises with every change; who changes it names the one that they saw.
    """

    id: str
    tenant: str
    endpoint: str
    input_file: str
    input_blob: str = ""
    key_id: str = ""
    state: BatchState = "validating"
    end: str = ""
    created_ms: int = 0
    expires_ms: int = 0
    moved: dict[str, int] = {}
    metadata: dict[str, str] = {}
    model: str = ""
    output_file: str = ""
    error_file: str = ""
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: tuple[tuple[int, Fault], ...] = ()
    keep_s: int = 0
    usage: dict[str, float] = {}
    version: int = 0

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in BATCH_ENDS


class BatchItem(msgspec.Struct, frozen=True):
    """What became of line `n` (from 0): a job, or a refusal."""

    n: int
    job: str = ""
    fault: Fault | None = None


class Shelf(Forgets, Protocol):
    """The part of a store that keeps files and batches; each function is one transaction."""

    def add_file(self, file: FileRecord, keep_ms: int = 0) -> FileRecord:
        """Keep a file for `keep_ms`, or until it is deleted. Raises FaultError(storage_full)."""

    def get_file(self, file_id: str, tenant: str) -> FileRecord | None:
        """The tenant's file, unless its time has passed."""

    def list_files(
        self, tenant: str, limit: int, after: str = "", purpose: str = "", oldest_first: bool = False
    ) -> list[FileRecord]:
        """The tenant's files behind the one with the id `after`, newest first."""

    def stored_bytes(self, tenant: str) -> int:
        """Sum of the sizes of the tenant's files."""

    def remove_file(self, file_id: str, tenant: str) -> FileRecord | None:
        """Forget a file; None when the tenant has none of that id.

        Raises:
            FaultError: conflict while a batch that has not ended reads it.
        """

    def purge_files(self, limit: int = 500) -> list[FileRecord]:
        """Forget files whose time has passed and that no open batch reads."""

    def add_batch(self, batch: BatchRecord, window_ms: int) -> BatchRecord:
        """Make a batch that expires in `window_ms`.

        Raises:
            FaultError: not_found when the tenant has no such input file, storage_full.
        """

    def get_batch(self, batch_id: str, tenant: str) -> BatchRecord | None:
        """The tenant's batch."""

    def list_batches(self, tenant: str, limit: int, after: str = "") -> list[BatchRecord]:
        """The tenant's batches behind the one with the id `after`, newest first."""

    def open_batches(self) -> list[BatchRecord]:
        """All that have not ended, oldest first."""

    def save_batch(self, batch: BatchRecord, files: Sequence[FileRecord] = ()) -> BatchRecord | None:
        """Change a batch that still has the version which `batch` names; None when it was changed meanwhile.

        A new state is noted in `moved`. With a terminal one its items are forgotten.

        Args:
            files: what it made; kept with the change or not at all, for the batch's `keep_s`.
        """

    def note_items(self, batch_id: str, items: Sequence[BatchItem]) -> None:
        """Remember what became of lines; a line that is known already stays as it is."""

    def batch_items(self, batch_id: str, first: int, limit: int) -> list[tuple[BatchItem, JobRecord | None]]:
        """Known lines from number `first` on, in their order, each with its job as it is now."""

    def batch_counts(self, batch_id: str) -> dict[str, int]:
        """State of the job -> lines; "refused" counts lines that made none."""

    def purge_batches(self, retention_ms: int, limit: int = 500) -> int:
        """Forget batches that ended more than `retention_ms` ago; how many."""
