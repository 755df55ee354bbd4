"""On what terms work is taken: what the tenant and the key of a submission say is laid over it, in one place."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from coordinator.records import Submission
from coordinator.register.known import Known
from coordinator.tenants import Tenants
from protocol.faults import refuse


def terms(known: Known, tenants: Tenants) -> Callable[[Submission], Submission]:
    """A function that refuses what may not be submitted, and fills in the weight and the limits of the rest.

    It is asked of every submission, those of a batch's lines included; a line of a key that was revoked meanwhile is
    still judged by what that key allowed.
    """

    def laid_over(s: Submission) -> Submission:
        if not tenants.may_submit(s.tenant, s.key_id, s.model):
            raise refuse("forbidden", f"model: This key may not use the model {s.model[:200]!r}.", "model")
        tenant, key = tenants.get(s.tenant), known.prefixes.get(s.key_id)
        own = key.concurrent if key is not None else 0
        if tenant.weight == s.weight and not own and not tenant.concurrent:
            return s
        return msgspec.structs.replace(s, weight=tenant.weight, key_open=own, tenant_open=tenant.concurrent)

    return laid_over
