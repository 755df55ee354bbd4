"""Eviction: which loaded models cost least to end. Pure: what each holds and what its end would do to callers.

The price of ending a model is counted in *job-seconds*: seconds of waiting, summed over the jobs that will wait.
While another model takes its place and it is loaded again (`swap_s`), the jobs queued at it wait that long, and
those that arrive meanwhile wait half of it on average:

    harm = (queued + demand per second * swap_s / 2) * swap_s / copies loaded

Idle time enters by the demand, which decays while nobody asks; reload cost by `swap_s`; size because one large
model may be ended instead of several. Where nothing is known about demand and reload times every harm is 0, and
the fewest go, least recently used first among equals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

# Demand is forgotten with this time constant, in seconds: a chat's pause is remembered, yesterday's is not.
DEMAND_S = 300.0
# From the order to end until the driver has the memory back, in seconds.
UNLOAD_S = 2.0


class Demand(msgspec.Struct, frozen=True, gc=False):
    """How often a model was asked for lately: jobs per second at `at`, decaying with `DEMAND_S`."""

    per_s: float = 0.0
    at: float = 0.0

    def seen(self, now: float) -> Demand:
        """With one more job."""
        return Demand(self.rate(now) + 1 / DEMAND_S, now)

    def rate(self, now: float) -> float:
        """Jobs per second as of `now`."""
        return self.per_s * math.exp((self.at - now) / DEMAND_S)


def harm(*, queued: int, per_s: float, swap_s: float, copies: int = 1) -> float:
    """Price of ending one copy of a model, in job-seconds; see the module.

    Args:
        queued: jobs that wait for it now.
        per_s: its demand.
        swap_s: until it could be back: the other's load, its own, and the memory's return between them.
        copies: instances of it that are loaded; the others go on serving.
    """
    return (queued + per_s * swap_s / 2) * swap_s / max(1, copies)


class Tenant(msgspec.Struct, frozen=True, gc=False):
    """A loaded model that may be ended. Put the least recently used first.

    Attributes:
        holds: device -> bytes that come back.
        price: harm of its end, in job-seconds.
    """

    name: str
    holds: Mapping[str, int]
    price: float = 0.0


def greedy(tenants: Sequence[Tenant], missing: Mapping[str, int]) -> tuple[Tenant, ...]:
    """Nearly the cheapest, in n log n: the least harm per byte first, then without those that prove superfluous."""
    if not all(tenant.price == 0 for tenant in tenants):
        tenants = sorted(tenants, key=lambda each: each.price / max(1, _useful_bytes(each, missing)))
    rest, chosen = dict(missing), list[Tenant]()
    for tenant in tenants:
        if not rest:
            break
        if any(tenant.holds.get(uuid, 0) > 0 for uuid in rest):
            chosen.append(tenant)
            rest = lacking(rest, (tenant,))
    if rest:
        return ()
    for tenant in reversed(tuple(chosen)):
        without = [other for other in chosen if other is not tenant]
        if not lacking(missing, without):
            chosen = without
    return tuple(chosen)


def greedy_on_one(tenants: Sequence[Tenant], uuid: str, lack: int) -> tuple[Tenant, ...]:
    """`greedy` for one device, where most models lie; empty when all together do not suffice."""
    order = sorted(
        (tenant.price / tenant.holds[uuid], number)
        for number, tenant in enumerate(tenants)
        if tenant.holds.get(uuid, 0) > 0
    )
    chosen: list[Tenant] = []
    for _density, number in order:
        chosen.append(tenants[number])
        lack -= tenants[number].holds[uuid]
        if lack <= 0:
            break
    else:
        return ()
    kept: list[Tenant] = []
    for tenant in reversed(chosen):
        if lack + tenant.holds[uuid] <= 0:
            lack += tenant.holds[uuid]  # the later ones suffice without it
        else:
            kept.append(tenant)
    return tuple(reversed(kept))


def lacking(missing: Mapping[str, int], tenants: Sequence[Tenant]) -> dict[str, int]:
    """Device -> bytes that are still missing when these have gone; without the devices that have enough."""
    rest = {uuid: lack - sum(each.holds.get(uuid, 0) for each in tenants) for uuid, lack in missing.items()}
    return {uuid: lack for uuid, lack in rest.items() if lack > 0}


def _useful_bytes(tenant: Tenant, missing: Mapping[str, int]) -> int:
    return sum(min(lack, tenant.holds.get(uuid, 0)) for uuid, lack in missing.items())
