"""Limits of keys and tenants: requests per minute, as token buckets; the stricter one holds.

A bucket holds a minute's requests and fills evenly. Each replica gives out its own share: the limit divided by the
number of replicas that live, so that all together keep to it when clients are spread evenly, as a load balancer does.
A client that stays with one replica gets that replica's share. Jobs that are open at once are counted in the store,
which all replicas share, in the transaction that makes a new one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from coordinator.register.known import Key, Tenant
from protocol.faults import Fault, FaultError

MINUTE_S = 60.0
MAX_BUCKETS = 20_000
# What is not counted: looking, telling a job to stop, and an admin's orders.
UNCOUNTED = ("/v1/workers", "/v1/registrations", "/v1/keys", "/v1/tenants")


class Spent(NamedTuple):
    """How a caller stands after a request was counted, by its strictest limit."""

    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> Mapping[str, str]:
        """As official clients read it."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": duration(self.reset_s),
        }


def duration(seconds: float) -> str:
    """A length of time as these headers have it: 120ms, 7s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < MINUTE_S else f"{whole // 60}m{whole % 60}s"


def counted(method: str, path: str) -> bool:
    """Whether a request counts: those that may make work."""
    return method == "POST" and not path.endswith("/cancel") and not path.startswith(UNCOUNTED)


class RateLimited(FaultError):
    """The caller has made as many requests as it may; `headers` say when it may make more."""

    def __init__(self, message: str, wait_s: float, spent: Spent) -> None:
        super().__init__(Fault("rate_limited", message, detail={"retry_after_s": max(1, math.ceil(wait_s))}))
        self.headers = spent.headers()


class _Bucket:
    """Requests that may still be made."""

    def __init__(self, size: float, now: float) -> None:
        self.size, self.left, self.at = size, size, now

    def fill(self, size: float, now: float) -> None:
        """Let the time pass; the limit may have changed meanwhile."""
        grown = self.left + (now - self.at) * size / MINUTE_S
        self.size, self.at = size, now
        self.left = min(size, grown)

    @property
    def wait_s(self) -> float:
        """Until one more request may be made."""
        return max(0.0, (1 - self.left) * MINUTE_S / self.size)

    @property
    def full_s(self) -> float:
        """Until as many may be made as ever."""
        return max(0.0, (self.size - self.left) * MINUTE_S / self.size)


class Rates:
    """Counts requests. Belongs to the event loop.

    Args:
        now: seconds that only grow.
        replicas: how many coordinators share the limits.
    """

    def __init__(self, now: Callable[[], float], replicas: Callable[[], int] = lambda: 1) -> None:
        self._now, self._replicas = now, replicas
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def take(self, key: Key, tenant: Tenant) -> Spent | None:
        """Count one request; None when neither the key nor its tenant has a limit.

        Raises:
            RateLimited: nothing is counted then.
        """
        limits = [
            (("key", key.prefix), key.rpm, f"The key {key.prefix}"),
            (("tenant", tenant.name), tenant.rpm, f"The tenant {tenant.name!r}"),
        ]
        now, share = self._now(), max(1, self._replicas())
        found = [(self._bucket(name, rpm / share, now), rpm, who) for name, rpm, who in limits if rpm]
        if not found:
            return None
        for bucket, rpm, who in found:
            if bucket.left < 1:
                message = f"{who} may make {rpm} requests per minute."
                raise RateLimited(message, bucket.wait_s, Spent(rpm, 0, bucket.full_s))
        for bucket, _, _ in found:
            bucket.left -= 1
        bucket, rpm, _ = min(found, key=lambda one: one[0].left)
        return Spent(rpm, int(bucket.left), bucket.full_s)

    def _bucket(self, name: tuple[str, str], size: float, now: float) -> _Bucket:
        size = max(size, 1.0)  # a share below one request would never be one
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(size, now)
            while len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        bucket.fill(size, now)
        return bucket
