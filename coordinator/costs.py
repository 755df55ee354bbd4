"""What a tenant's jobs of a model have taken lately, in seconds of a slot: the price of its turns in the queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

from coordinator.records import JobRecord

K = TypeVar("K", bound=Hashable)
UNKNOWN = 1.0
_SHARE = 0.2  # of the newest job in the mean
_MOST = 10_000  # names come from clients, so their number is not ours to trust


class Costs:
    """A running mean per tenant and model, and per model over all tenants. The least recently used are forgotten."""

    def __init__(self) -> None:
        self._means: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._of_all: OrderedDict[str, float] = OrderedDict()

    def note(self, record: JobRecord) -> None:
        """A job has succeeded; others say nothing of what such jobs take."""
        if record.state != "succeeded" or record.started_ms is None or record.finished_ms is None:
            return
        took = record.usage.get("compute_ms", max(0, record.finished_ms - record.started_ms)) / 1000
        _note(self._means, (record.tenant, record.model), took)
        _note(self._of_all, record.model, took)

    def of(self, tenant: str, model: str) -> float:
        """Seconds that the next one will take, as far as can be told: as this tenant's, or as anybody's, or unknown."""
        return self._means.get((tenant, model), self._of_all.get(model, UNKNOWN))


def _note(means: OrderedDict[K, float], key: K, took: float) -> None:
    before = means.get(key)
    means[key] = took if before is None else before + _SHARE * (took - before)
    means.move_to_end(key)
    if len(means) > _MOST:
        means.popitem(last=False)
