"""How patient the dispatcher is, and how much it takes."""

from __future__ import annotations

import msgspec


class DispatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables, in seconds unless named otherwise.

    Attributes:
        poll_s: longest pause between two looks at the queue.
        sweep_s: pause between two looks for deadlines, orphans and unanswered offers.
        worker_grace_s: how long a worker may be away before its attempts are lost. A reconnect takes about 1 s.
        startup_grace_s: the same after a start of ours, when all workers reconnect at once.
        offer_s: how long an offer may stay unanswered.
        deadline_slack_s: a running job is ended by its worker; only this long after the deadline by us.
        retention_s: how long ended jobs and their files are kept.
        purge_s, orphan_sweep_s: pause between two purges of old jobs, and of files without a job.
        repair_s: a silent watcher reads the row this often, in case an event was lost.
        blob_url_s: how long a worker may fetch inputs and leave outputs.
        max_queued: waiting jobs of all tenants beyond this are refused as overloaded, see `Room`.
        max_queued_per_tenant: those of one tenant beyond this are refused as rate_limited.
    """

    poll_s: float = 0.5
    sweep_s: float = 1.0
    worker_grace_s: float = 4.0
    startup_grace_s: float = 10.0
    offer_s: float = 10.0
    deadline_slack_s: float = 5.0
    retention_s: float = 86_400.0
    purge_s: float = 60.0
    orphan_sweep_s: float = 3600.0
    repair_s: float = 5.0
    blob_url_s: float = 86_400.0
    max_queued: int = 100_000
    max_queued_per_tenant: int = 10_000
