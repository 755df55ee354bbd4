"""How many jobs a key or a tenant may have open at once: counted in the transaction that makes one more."""

from __future__ import annotations

from coordinator.records import Submission
from coordinator.store.sql_steps import SqlSteps
from protocol.faults import refuse

RETRY_S = 2
_UNENDED = "state IN ('queued', 'offered', 'running')"


def check_open(steps: SqlSteps, submission: Submission) -> None:
    """Refuse one job too many; submissions of one tenant that has a limit are made one after the other.

    Raises:
        FaultError: rate_limited.
    """
    if not submission.tenant_open and not submission.key_open:
        return
    steps._one_by_one(submission.tenant)
    tenant, key = submission.tenant, submission.key_id
    for limit, who, more in (
        (submission.key_open, f"The key {key}", "AND key_id = :key"),
        (submission.tenant_open, f"The tenant {tenant!r}", "AND :key <> ''"),
    ):
        rows = steps._all(
            f"SELECT seq FROM jobs WHERE tenant = :tenant AND {_UNENDED} {more} LIMIT :limit",
            tenant=tenant,
            key=key or "-",
            limit=limit,
        )
        if limit and len(rows) >= limit:
            jobs = "job" if limit == 1 else "jobs"
            message = f"{who} may have {limit} {jobs} waiting or running at once; try again when one has ended."
            raise refuse("rate_limited", message, retry_after_s=RETRY_S)
