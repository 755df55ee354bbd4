"""The register's tables, for both databases: the words in braces are what each calls its types.

Every row that replicas keep in memory has the number of its last change, `changed`, from the counter in `changes`: who
knows all changes up to one number reads those behind it.
"""

from __future__ import annotations

Words = dict[str, str]
SQLITE: Words = {"blob": "BLOB", "int": "INTEGER", "real": "REAL", "rowless": " WITHOUT ROWID"}
POSTGRES: Words = {"blob": "BYTEA", "int": "BIGINT", "real": "DOUBLE PRECISION", "rowless": ""}

# Files of the first versions have this table before any migration has run.
_KEYS = """
CREATE TABLE IF NOT EXISTS keys (
    hash {blob} PRIMARY KEY,
    prefix TEXT NOT NULL,
    scope TEXT NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    worker TEXT NOT NULL,
    created_ms {int} NOT NULL,
    revoked_ms {int}
){rowless}
"""

# Append only: version N is what the first N have made.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE registrations (
            id TEXT PRIMARY KEY,
            install TEXT NOT NULL,
            address TEXT NOT NULL,
            secret {blob} NOT NULL,
            state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'approved', 'rejected')),
            reason TEXT NOT NULL DEFAULT '',
            worker TEXT,
            token {blob},
            agent TEXT NOT NULL,
            capabilities {blob} NOT NULL,
            created_ms {int} NOT NULL,
            seen_ms {int} NOT NULL,
            decided_ms {int}
        ){rowless}
        """,
        "CREATE UNIQUE INDEX registrations_worker ON registrations (worker) WHERE worker IS NOT NULL",
        "CREATE UNIQUE INDEX registrations_pending ON registrations (install, address) WHERE state = 'pending'",
    ),
    (
        _KEYS,
        "ALTER TABLE keys ADD COLUMN changed {int} NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN rpm {int} NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN concurrent {int} NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN models TEXT NOT NULL DEFAULT '[]'",
        "CREATE INDEX keys_changed ON keys (changed)",
        "CREATE INDEX keys_prefix ON keys (prefix)",
        "ALTER TABLE registrations ADD COLUMN changed {int} NOT NULL DEFAULT 0",
        "ALTER TABLE registrations ADD COLUMN protocol TEXT NOT NULL DEFAULT 'studio'",
        "CREATE INDEX registrations_changed ON registrations (changed)",
        """
        CREATE TABLE tenants (
            name TEXT PRIMARY KEY,
            weight {real} NOT NULL,
            store_content {int} NOT NULL,
            models TEXT NOT NULL,
            rpm {int} NOT NULL,
            concurrent {int} NOT NULL,
            created_ms {int} NOT NULL,
            changed {int} NOT NULL
        ){rowless}
        """,
        """
        CREATE TABLE enrolments (
            hash {blob} PRIMARY KEY,
            prefix TEXT NOT NULL,
            worker TEXT NOT NULL,
            created_ms {int} NOT NULL,
            expires_ms {int} NOT NULL,
            used_ms {int},
            used_by TEXT NOT NULL DEFAULT '',
            revoked_ms {int}
        ){rowless}
        """,
        """
        CREATE TABLE acts (
            number {int} PRIMARY KEY,
            at_ms {int} NOT NULL,
            who TEXT NOT NULL,
            what TEXT NOT NULL
        ){rowless}
        """,
        "CREATE TABLE changes (one {int} PRIMARY KEY CHECK (one = 1), number {int} NOT NULL)",
        "INSERT INTO changes VALUES (1, 1)",
    ),
    (
        "DROP INDEX registrations_pending",
        "CREATE UNIQUE INDEX registrations_asked ON registrations (install, address, protocol) WHERE state = 'pending'",
    ),
)
# What `coordinator migrate` copies.
TABLES = ("keys", "registrations", "tenants", "enrolments")


def statements(number: int, words: Words) -> list[str]:
    """The statements of the migration that makes version `number`."""
    return [statement.format_map(words) for statement in MIGRATIONS[number - 1]]
