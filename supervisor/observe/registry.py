"""Counters, gauges and histograms with Prometheus' text format (0.0.4), for the families of `metrics_table`.

Label values are bounded: models, kinds and codes may come from callers and engines, and a store of time series dies of
too many. The first `MOST_VALUES` values of a label are kept, the rest is counted under "other". Names that are
configured are told beforehand and keep their places.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from supervisor.observe.metrics_table import COUNTED, PREFIX, Metric

MOST_VALUES = 64
OTHER = "other"
MOST_CHARS = 200

Key = tuple[str, ...]


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * (buckets + 1)  # the last is +Inf
        self.total = 0.0


class Registry:
    """The numbers of one supervisor. Any thread may count.

    Args:
        metrics: the families, in the order in which they are shown.
        known: label -> values that always stand for themselves.
    """

    def __init__(self, metrics: Iterable[Metric] = COUNTED, known: Mapping[str, Iterable[str]] | None = None) -> None:
        self._metrics = {metric.name: metric for metric in metrics}
        self._values: dict[str, dict[Key, float]] = defaultdict(dict)
        self._histograms: dict[str, dict[Key, _Histogram]] = defaultdict(dict)
        self._seen: dict[str, set[str]] = {label: set(values) for label, values in (known or {}).items()}
        self._room = {label: len(values) + MOST_VALUES for label, values in self._seen.items()}
        self._lock = threading.Lock()

    def know(self, label: str, value: str) -> None:
        """One more value that always stands for itself: what is served now must be seen, whoever filled the room."""
        with self._lock:
            seen = self._seen.setdefault(label, set())
            if value not in seen:
                seen.add(value)
                self._room[label] = self._room.get(label, MOST_VALUES) + 1

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count up; what is negative or no number is left out, a counter never goes down.

        Raises:
            ValueError: the table has no such counter, or not with these labels.
        """
        if amount < 0 or not math.isfinite(amount):
            return
        with self._lock:
            key = self._key(name, "counter", labels)
            values = self._values[name]
            values[key] = values.get(key, 0.0) + amount

    def raise_to(self, name: str, value: float, **labels: str) -> None:
        """Take over a count that is kept elsewhere; a smaller one than before is ignored.

        Raises:
            ValueError: see `add`.
        """
        with self._lock:
            key = self._key(name, "counter", labels)
            values = self._values[name]
            values[key] = max(values.get(key, 0.0), value)

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge; None takes it away: what is not known has no line.

        Raises:
            ValueError: the table has no such gauge, or not with these labels.
        """
        with self._lock:
            key = self._key(name, "gauge", labels)
            if value is None:
                self._values[name].pop(key, None)
            else:
                self._values[name][key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram; what is negative or no number is left out.

        Raises:
            ValueError: the table has no such histogram, or not with these labels.
        """
        if value < 0 or not math.isfinite(value):
            return
        with self._lock:
            key = self._key(name, "histogram", labels)
            buckets = self._metrics[name].buckets
            found = self._histograms[name].setdefault(key, _Histogram(len(buckets)))
            found.counts[bisect.bisect_left(buckets, value)] += 1
            found.total += value

    def _key(self, name: str, kind: str, labels: Mapping[str, str]) -> Key:
        metric = self._metrics.get(name)
        if metric is None or metric.kind != kind:
            raise ValueError(f"the table of metrics has no {kind} {name}")
        if set(labels) != set(metric.labels):
            raise ValueError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
        return tuple(self._bounded(label, labels[label]) for label in metric.labels)

    def _bounded(self, label: str, value: str) -> str:
        seen = self._seen.setdefault(label, set())
        if value in seen:
            return value
        if len(value) > MOST_CHARS or len(seen) >= self._room.get(label, MOST_VALUES):
            return OTHER
        seen.add(value)
        return value

    def lines(self) -> list[str]:
        """The text format; families without a value are left out."""
        with self._lock:
            return [line for metric in self._metrics.values() for line in self._family(metric)]

    def _family(self, metric: Metric) -> Iterator[str]:
        values, histograms = self._values.get(metric.name), self._histograms.get(metric.name)
        if not values and not histograms:
            return
        name = PREFIX + metric.name
        yield f"# HELP {name} {metric.help}"
        yield f"# TYPE {name} {metric.kind}"
        for key, value in sorted((values or {}).items()):
            yield f"{name}{_labels(metric.labels, key)} {_number(value)}"
        for key, found in sorted((histograms or {}).items()):
            below = 0
            for bound, count in zip((*metric.buckets, math.inf), found.counts, strict=True):
                below += count
                yield f"{name}_bucket{_labels((*metric.labels, 'le'), (*key, _number(bound)))} {below}"
            yield f"{name}_sum{_labels(metric.labels, key)} {_number(found.total)}"
            yield f"{name}_count{_labels(metric.labels, key)} {below}"


def _labels(names: Key, values: Key) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{inner}}}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
