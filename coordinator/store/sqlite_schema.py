"""Schema of the SQLite store as numbered migrations. A migration that was released is never edited.

`clock.shift_ms` moves the one clock that every statement reads, so that tests need not wait for days.
"""

from __future__ import annotations

# `strftime('%s')` has whole seconds only and SQLite 3.40 (Debian 12) has no 'subsec'; a julian day as a double
# resolves about 40 µs.
CLOCK = "(CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) + (SELECT shift_ms FROM clock))"

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE clock (shift_ms INTEGER NOT NULL);
    INSERT INTO clock VALUES (0);

    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        key_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        fingerprint BLOB NOT NULL,
        kind TEXT NOT NULL,
        model TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'queued'
            CHECK (state IN ('queued', 'offered', 'running', 'succeeded', 'failed', 'cancelled')),
        attempt INTEGER NOT NULL DEFAULT 0,
        tries INTEGER NOT NULL DEFAULT 0,
        max_attempts INTEGER NOT NULL,
        priority INTEGER NOT NULL,
        run_after_ms INTEGER NOT NULL DEFAULT 0,
        deadline_at_ms INTEGER NOT NULL,
        created_ms INTEGER NOT NULL,
        started_ms INTEGER,
        finished_ms INTEGER,
        worker TEXT NOT NULL DEFAULT '',
        stream INTEGER NOT NULL,
        streamed INTEGER NOT NULL DEFAULT 0,
        vram_gb_estimate REAL NOT NULL,
        traceparent TEXT NOT NULL,
        labels BLOB NOT NULL,
        params BLOB NOT NULL,
        inputs BLOB NOT NULL,
        result BLOB,
        files BLOB,
        usage BLOB,
        fault BLOB
    );
    CREATE UNIQUE INDEX jobs_by_key ON jobs (tenant, idempotency_key) WHERE idempotency_key <> '';
    CREATE INDEX jobs_waiting ON jobs (model, priority DESC, seq) WHERE state = 'queued';
    CREATE INDEX jobs_open ON jobs (state) WHERE state IN ('offered', 'running');
    CREATE INDEX jobs_deadline ON jobs (deadline_at_ms)
        WHERE deadline_at_ms > 0 AND state IN ('queued', 'offered', 'running');
    CREATE INDEX jobs_finished ON jobs (finished_ms) WHERE finished_ms IS NOT NULL;
    CREATE INDEX jobs_recent ON jobs (tenant, seq);

    CREATE TABLE input_blobs (
        key TEXT NOT NULL,
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        PRIMARY KEY (key, job)
    ) WITHOUT ROWID;
    CREATE INDEX input_blobs_by_job ON input_blobs (job);
    """,
    """
    ALTER TABLE jobs ADD COLUMN attended INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX jobs_attended ON jobs (attended) WHERE attended = 1 AND state IN ('queued', 'offered', 'running');
    """,
    """
    ALTER TABLE jobs ADD COLUMN alone INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN spared INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        purpose TEXT NOT NULL,
        blob TEXT NOT NULL,
        size INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL
    );
    CREATE INDEX files_by_tenant ON files (tenant, seq);
    CREATE INDEX files_by_blob ON files (blob);
    CREATE INDEX files_expiring ON files (expires_ms) WHERE expires_ms > 0;

    CREATE TABLE batches (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        input_file TEXT NOT NULL,
        state TEXT NOT NULL,
        ended_ms INTEGER,
        version INTEGER NOT NULL,
        body BLOB NOT NULL
    );
    CREATE INDEX batches_by_tenant ON batches (tenant, seq);
    CREATE INDEX batches_by_file ON batches (input_file);
    CREATE INDEX batches_open ON batches (seq) WHERE ended_ms IS NULL;
    CREATE INDEX batches_ended ON batches (ended_ms) WHERE ended_ms IS NOT NULL;

    CREATE TABLE batch_items (
        batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
        n INTEGER NOT NULL,
        job TEXT,
        fault BLOB,
        PRIMARY KEY (batch, n)
    ) WITHOUT ROWID;
    CREATE INDEX batch_items_by_job ON batch_items (job) WHERE job IS NOT NULL;
    """,
    """
    ALTER TABLE jobs ADD COLUMN gateway TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN origin TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN vt INTEGER NOT NULL DEFAULT 0;
    DROP INDEX jobs_open;
    CREATE INDEX jobs_open ON jobs (gateway) WHERE state IN ('offered', 'running');
    DROP INDEX jobs_waiting;
    CREATE INDEX jobs_waiting ON jobs (model, priority DESC, vt, seq) WHERE state = 'queued';
    CREATE INDEX jobs_turns ON jobs (model, priority, tenant, vt) WHERE state = 'queued';
    """,
    """
    CREATE TABLE usage_days (
        day INTEGER NOT NULL,
        tenant TEXT NOT NULL,
        key_id TEXT NOT NULL,
        worker TEXT NOT NULL,
        kind TEXT NOT NULL,
        model TEXT NOT NULL,
        succeeded INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        cancelled INTEGER NOT NULL,
        tokens_in INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        tokens_cached INTEGER NOT NULL,
        audio_ms INTEGER NOT NULL,
        images INTEGER NOT NULL,
        frames INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        documents INTEGER NOT NULL,
        gpu_ms INTEGER NOT NULL,
        busy_ms INTEGER NOT NULL,
        PRIMARY KEY (day, tenant, key_id, worker, kind, model)
    );
    CREATE TABLE usage_fresh (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        day INTEGER NOT NULL,
        tenant TEXT NOT NULL,
        key_id TEXT NOT NULL,
        worker TEXT NOT NULL,
        kind TEXT NOT NULL,
        model TEXT NOT NULL,
        succeeded INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        cancelled INTEGER NOT NULL,
        tokens_in INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        tokens_cached INTEGER NOT NULL,
        audio_ms INTEGER NOT NULL,
        images INTEGER NOT NULL,
        frames INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        documents INTEGER NOT NULL,
        gpu_ms INTEGER NOT NULL,
        busy_ms INTEGER NOT NULL
    );
    """,
    """
    -- What is to be served by how many workers, which were chosen, and which there are (`deploy/`).
    CREATE TABLE deployments (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE placements (
        deployment TEXT NOT NULL,
        revision TEXT NOT NULL,
        worker TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('wanted', 'fetching', 'ready', 'failed', 'leaving')),
        reason TEXT NOT NULL,
        failures INTEGER NOT NULL,
        changed_ms INTEGER NOT NULL,
        PRIMARY KEY (deployment, revision, worker)
    ) WITHOUT ROWID;
    CREATE INDEX placements_by_worker ON placements (worker);
    CREATE TABLE presence (
        worker TEXT PRIMARY KEY,
        gateway TEXT NOT NULL,
        connected INTEGER NOT NULL,
        draining INTEGER NOT NULL,
        body BLOB NOT NULL,
        changed_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    -- Browsers that look at the dashboard: hashes alone, of their secret and of their key's.
    CREATE TABLE sessions (hash BLOB PRIMARY KEY, key_hash BLOB NOT NULL, expires_ms INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX sessions_by_key ON sessions (key_hash, expires_ms);
    """,
    """
    ALTER TABLE jobs ADD COLUMN needs TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN lot TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN dead INTEGER NOT NULL DEFAULT 0;
    UPDATE jobs SET vt = vt * 1000 WHERE state = 'queued';
    DROP INDEX jobs_waiting;
    CREATE INDEX jobs_waiting ON jobs (model, needs, priority DESC, vt, seq, run_after_ms) WHERE state = 'queued';
    CREATE INDEX jobs_front ON jobs (model, priority, vt) WHERE state = 'queued';
    CREATE INDEX jobs_dead ON jobs (tenant, seq) WHERE dead = 1;
    CREATE INDEX jobs_by_lot ON jobs (lot) WHERE lot <> '';

    CREATE TABLE attempts (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        n INTEGER NOT NULL,
        worker TEXT NOT NULL,
        began_ms INTEGER,
        ended_ms INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        fault BLOB,
        PRIMARY KEY (job, n)
    ) WITHOUT ROWID;
    CREATE TABLE lots (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        total INTEGER NOT NULL,
        refused INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX lots_by_age ON lots (created_ms);
    """,
    """
    CREATE INDEX jobs_unended ON jobs (tenant, key_id) WHERE state IN ('queued', 'offered', 'running');
    """,
    """
    CREATE INDEX jobs_videos ON jobs (tenant, seq) WHERE kind = 'video';
    """,
    """
    -- What is served now is read from what was accepted (`sql_turns`); of what was deleted since, `turns` says how far
    -- it was. Jobs that start later have no turn until they are due.
    CREATE TABLE turns (
        model TEXT NOT NULL,
        priority INTEGER NOT NULL,
        vt INTEGER NOT NULL,
        PRIMARY KEY (model, priority)
    ) WITHOUT ROWID;
    UPDATE jobs SET vt = 4611686018427387904 + 1000 WHERE state = 'queued' AND attempt = 0 AND run_after_ms > 0;
    DROP INDEX jobs_front;
    DROP INDEX jobs_turns;
    -- An expression of the tenant, so that no index of a tenant's jobs is taken for it where there are no statistics.
    CREATE INDEX jobs_turns ON jobs (model, needs, kind, priority, (tenant || ''), vt) WHERE state = 'queued';
    CREATE INDEX jobs_served ON jobs (model, priority, vt) WHERE tries > 0;
    CREATE INDEX jobs_served_line ON jobs (model, needs, kind, priority, vt) WHERE tries > 0;
    CREATE INDEX jobs_later ON jobs (run_after_ms) WHERE state = 'queued' AND vt >= 4611686018427387904;
    """,
)
