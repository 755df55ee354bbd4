"""How many jobs may wait: so many of a tenant, and so many more of all together.

What waits is counted in the store once in a while (`Store.waiting`); between two counts what comes and goes is added
up here. So a look costs nothing, and is right to within what other replicas have done since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coordinator.records import JobRecord, Submission
from protocol.faults import refuse

RETRY_HINT_S = 5


class Room:
    """Counts of what waits, by tenant: what is due, and what was asked to start later.

    What starts later never stands in the way of a job that is due now: whoever asks for an answer now is refused only
    for what is due. A job that starts later has room while both together are below the limits.

    Args:
        most: of all tenants.
        most_of_tenant: of one.
    """

    def __init__(self, most: int, most_of_tenant: int) -> None:
        self._most, self._most_of_tenant = most, most_of_tenant
        self._due: dict[str, int] = {}
        self._later: dict[str, int] = {}
        self._all_due = self._all_later = 0

    @property
    def total(self) -> int:
        """About how many jobs wait."""
        return self._all_due + self._all_later

    def counted(self, found: Mapping[str, tuple[int, int]]) -> None:
        """The store says, by tenant, how many jobs are due and how many are to start later."""
        self._due = {tenant: due for tenant, (due, _) in found.items()}
        self._later = {tenant: later for tenant, (_, later) in found.items()}
        self._all_due, self._all_later = sum(self._due.values()), sum(self._later.values())

    def came(self, records: Iterable[JobRecord]) -> None:
        """These wait from now on."""
        for record in records:
            if record.run_after_ms:
                self._later[record.tenant] = self._later.get(record.tenant, 0) + 1
                self._all_later += 1
            else:
                self._due[record.tenant] = self._due.get(record.tenant, 0) + 1
                self._all_due += 1

    def went(self, record: JobRecord) -> None:
        """This one was due, and waits no more."""
        waited = self._due.get(record.tenant, 0)
        if waited:  # one that was counted among those of later is found out by the next count
            self._due[record.tenant] = waited - 1
            self._all_due -= 1

    def check(self, submission: Submission, more: int) -> None:
        """Whether there is room for one more, with `more` of the same call before it.

        Raises:
            FaultError: rate_limited for the tenant's own limit, overloaded for that of all.
        """
        tenant = submission.tenant
        his, alls = self._due.get(tenant, 0) + more, self._all_due + more
        if submission.run_after_ms:
            his, alls = his + self._later.get(tenant, 0), alls + self._all_later
        if his >= self._most_of_tenant:
            raise refuse(
                "rate_limited",
                f"The tenant {tenant!r} has {self._most_of_tenant} jobs waiting and may have no more "
                "(max_queued_per_tenant in coordinator.toml); submit again when some have run or are cancelled.",
                retry_after_s=RETRY_HINT_S,
            )
        if alls >= self._most:
            raise refuse(
                "overloaded",
                f"{self._most} jobs of all tenants wait, and there is room for no more (max_queued in "
                "coordinator.toml); submit again later, or add workers.",
                retry_after_s=RETRY_HINT_S,
            )
