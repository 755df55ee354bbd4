"""Files and batches of a store, in SQL that both databases understand."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coordinator.records import JobRecord
from coordinator.store.rows import Row, record
from coordinator.store.shelf import BatchItem, BatchRecord, FileRecord
from coordinator.store.sql_forget import SqlForget
from coordinator.store.sql_steps import whole
from protocol.faults import Fault, refuse

_pack = msgspec.msgpack.encode
_READERS = "SELECT id FROM batches WHERE ended_ms IS NULL AND input_file ="


class SqlShelf(SqlForget):
    """The part of a store that keeps files and batches."""

    # ---- files ---------------------------------------------------------------------------------------------

    @whole
    def add_file(self, file: FileRecord, keep_ms: int = 0) -> FileRecord:
        """Keep a file for `keep_ms`, or until it is deleted."""
        with self._transaction() as now:
            return self._add_file(file, keep_ms, now)

    def _add_file(self, file: FileRecord, keep_ms: int, now: int) -> FileRecord:
        row = self._one(
            "INSERT INTO files (id, tenant, name, purpose, blob, size, sha256, created_ms, expires_ms) "
            "VALUES (:id, :tenant, :name, :purpose, :blob, :size, :sha256, :now, :expires) RETURNING *",
            id=file.id,
            tenant=file.tenant,
            name=file.name,
            purpose=file.purpose,
            blob=file.blob,
            size=file.size,
            sha256=file.sha256,
            now=now,
            expires=now + keep_ms if keep_ms else 0,
        )
        assert row is not None
        return _file(row)

    def get_file(self, file_id: str, tenant: str) -> FileRecord | None:
        """The tenant's file, unless its time has passed."""
        rows = self._read(
            f"SELECT * FROM files WHERE id = :id AND tenant = :tenant "
            f"AND (expires_ms = 0 OR expires_ms > {self.CLOCK})",
            id=file_id,
            tenant=tenant,
        )
        return _file(rows[0]) if rows else None

    def list_files(
        self, tenant: str, limit: int, after: str = "", purpose: str = "", oldest_first: bool = False
    ) -> list[FileRecord]:
        """The tenant's files behind the one with the id `after`, newest first."""
        step, order = (">", "ASC") if oldest_first else ("<", "DESC")
        rows = self._read(
            f"SELECT * FROM files WHERE tenant = :tenant AND (:purpose = '' OR purpose = :purpose) "
            f"AND (expires_ms = 0 OR expires_ms > {self.CLOCK}) AND (:after = '' OR "
            f"seq {step} (SELECT seq FROM files AS last WHERE last.id = :after AND last.tenant = :tenant)) "
            f"ORDER BY seq {order} LIMIT :limit",
            tenant=tenant,
            purpose=purpose,
            after=after,
            limit=limit,
        )
        return [_file(row) for row in rows]

    def stored_bytes(self, tenant: str) -> int:
        """Sum of the sizes of the tenant's files."""
        rows = self._read("SELECT coalesce(sum(size), 0) AS n FROM files WHERE tenant = :tenant", tenant=tenant)
        return int(rows[0]["n"])

    @whole
    def remove_file(self, file_id: str, tenant: str) -> FileRecord | None:
        """Forget a file."""
        with self._transaction():
            names = {"id": file_id, "tenant": tenant}
            if self._one(f"SELECT id FROM files WHERE id = :id AND tenant = :tenant{self.LOCK}", **names) is None:
                return None
            batch = self._one(f"{_READERS} :id AND tenant = :tenant LIMIT 1", **names)
            if batch is not None:
                message = f"The batch {batch['id']} still reads this file; cancel it first, or wait for its end."
                raise refuse("conflict", message, "file_id")
            row = self._one("DELETE FROM files WHERE id = :id AND tenant = :tenant RETURNING *", **names)
            return _file(row) if row is not None else None

    @whole
    def purge_files(self, limit: int = 500) -> list[FileRecord]:
        """Forget files whose time has passed and that no open batch reads."""
        with self._transaction() as now:
            rows = self._all(
                "DELETE FROM files WHERE seq IN (SELECT seq FROM files WHERE expires_ms > 0 AND expires_ms <= :now "
                f"AND NOT EXISTS ({_READERS} files.id) ORDER BY expires_ms LIMIT :limit{self.SKIP}) RETURNING *",
                now=now,
                limit=limit,
            )
            return [_file(row) for row in rows]

    # ---- batches -------------------------------------------------------------------------------------------

    @whole
    def add_batch(self, batch: BatchRecord, window_ms: int) -> BatchRecord:
        """Make a batch that expires in `window_ms`."""
        with self._transaction() as now:
            file = self._one(
                "SELECT id FROM files WHERE id = :id AND tenant = :tenant "
                f"AND (expires_ms = 0 OR expires_ms > :now){self.LOCK}",
                id=batch.input_file,
                tenant=batch.tenant,
                now=now,
            )
            if file is None:
                raise refuse("not_found", f"There is no file {batch.input_file[:100]!r}.", "input_file_id")
            made = msgspec.structs.replace(
                batch, created_ms=now, expires_ms=now + window_ms, moved={batch.state: now}, version=1
            )
            self._one(
                "INSERT INTO batches (id, tenant, input_file, state, ended_ms, version, body) "
                "VALUES (:id, :tenant, :input_file, :state, NULL, 1, :body) RETURNING id",
                id=made.id,
                tenant=made.tenant,
                input_file=made.input_file,
                state=made.state,
                body=_pack(made),
            )
            return made

    def get_batch(self, batch_id: str, tenant: str) -> BatchRecord | None:
        """The tenant's batch."""
        rows = self._read("SELECT body FROM batches WHERE id = :id AND tenant = :tenant", id=batch_id, tenant=tenant)
        return _batch(rows[0]) if rows else None

    def list_batches(self, tenant: str, limit: int, after: str = "") -> list[BatchRecord]:
        """The tenant's batches behind the one with the id `after`, newest first."""
        rows = self._read(
            "SELECT body FROM batches WHERE tenant = :tenant AND (:after = '' OR seq < "
            "(SELECT seq FROM batches AS last WHERE last.id = :after AND last.tenant = :tenant)) "
            "ORDER BY seq DESC LIMIT :limit",
            tenant=tenant,
            after=after,
            limit=limit,
        )
        return [_batch(row) for row in rows]

    def open_batches(self) -> list[BatchRecord]:
        """All that have not ended, oldest first."""
        return [_batch(row) for row in self._read("SELECT body FROM batches WHERE ended_ms IS NULL ORDER BY seq")]

    @whole
    def save_batch(self, batch: BatchRecord, files: Sequence[FileRecord] = ()) -> BatchRecord | None:
        """Change a batch that still has the version which `batch` names, and keep what it made."""
        with self._transaction() as now:
            moved = {batch.state: now, **batch.moved}
            saved = msgspec.structs.replace(batch, moved=moved, version=batch.version + 1)
            row = self._one(
                "UPDATE batches SET state = :state, version = version + 1, body = :body, ended_ms = :ended "
                "WHERE id = :id AND version = :version AND ended_ms IS NULL RETURNING id",
                id=batch.id,
                version=batch.version,
                state=batch.state,
                body=_pack(saved),
                ended=now if saved.ended else None,
            )
            if row is None:
                return None
            for file in files:
                self._add_file(file, batch.keep_s * 1000, now)
            if saved.ended:
                self._all("DELETE FROM batch_items WHERE batch = :id RETURNING n", id=batch.id)
            return saved

    @whole
    def note_items(self, batch_id: str, items: Sequence[BatchItem]) -> None:
        """Remember what became of lines."""
        with self._transaction():
            is_open = f"SELECT id FROM batches WHERE id = :id AND ended_ms IS NULL{self.LOCK}"
            if self._one(is_open, id=batch_id) is None:
                return
            for item in items:
                self._all(
                    "INSERT INTO batch_items (batch, n, job, fault) VALUES (:batch, :n, :job, :fault) "
                    "ON CONFLICT DO NOTHING RETURNING n",
                    batch=batch_id,
                    n=item.n,
                    job=item.job or None,
                    fault=_pack(item.fault) if item.fault else None,
                )

    def batch_items(self, batch_id: str, first: int, limit: int) -> list[tuple[BatchItem, JobRecord | None]]:
        """Known lines from number `first` on, in their order, each with its job as it is now."""
        rows = self._read(
            "SELECT n, batch_items.job AS item_job, batch_items.fault AS item_fault, jobs.* FROM batch_items "
            "LEFT JOIN jobs ON jobs.id = batch_items.job WHERE batch = :id AND n >= :first ORDER BY n LIMIT :limit",
            id=batch_id,
            first=first,
            limit=limit,
        )
        return [(_item(row), record(row) if row["id"] is not None else None) for row in rows]

    def batch_counts(self, batch_id: str) -> dict[str, int]:
        """State of the job -> lines."""
        rows = self._read(
            "SELECT CASE WHEN batch_items.job IS NULL THEN 'refused' WHEN jobs.state = 'offered' THEN 'queued' "
            "ELSE coalesce(jobs.state, 'refused') END AS state, count(*) AS n FROM batch_items "
            "LEFT JOIN jobs ON jobs.id = batch_items.job WHERE batch = :id GROUP BY 1",
            id=batch_id,
        )
        return {row["state"]: row["n"] for row in rows}

    @whole
    def purge_batches(self, retention_ms: int, limit: int = 500) -> int:
        """Forget batches that ended more than `retention_ms` ago; how many."""
        with self._transaction() as now:
            rows = self._all(
                "DELETE FROM batches WHERE seq IN (SELECT seq FROM batches WHERE ended_ms <= :before "
                f"ORDER BY ended_ms LIMIT :limit{self.SKIP}) RETURNING id",
                before=now - retention_ms,
                limit=limit,
            )
            return len(rows)


def _file(row: Row) -> FileRecord:
    return FileRecord(**{name: row[name] for name in FileRecord.__struct_fields__})


def _batch(row: Row) -> BatchRecord:
    return msgspec.msgpack.decode(row["body"], type=BatchRecord)


def _item(row: Row) -> BatchItem:
    fault = msgspec.msgpack.decode(row["item_fault"], type=Fault) if row["item_fault"] is not None else None
    return BatchItem(row["n"], row["item_job"] or "", fault)
