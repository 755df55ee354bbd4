from __future__ import annotations

import math
import threading

import pytest

from supervisor.observe.metrics_table import Metric
from supervisor.observe.registry import MOST_VALUES, Registry

TABLE = (
    Metric("jobs_total", "counter", "", "Jobs.", ("model",)),
    Metric("depth", "gauge", "", "Depth."),
    Metric("wait_seconds", "histogram", "s", "Wait.", ("kind",), (0.1, 1.0)),
)


def test_the_text_of_each_kind() -> None:
    registry = Registry(TABLE)
    assert registry.lines() == []
    registry.add("jobs_total", model='a"\\\n')
    registry.add("jobs_total", 2, model="b")
    registry.set("depth", 1.5)
    for value in (0.05, 0.1, 0.5, 7):
        registry.observe("wait_seconds", value, kind="llm")
    assert registry.lines() == [
        "# HELP bulkhead_jobs_total Jobs.",
        "# TYPE bulkhead_jobs_total counter",
        'bulkhead_jobs_total{model="a\\"\\\\\\n"} 1',
        'bulkhead_jobs_total{model="b"} 2',
        "# HELP bulkhead_depth Depth.",
        "# TYPE bulkhead_depth gauge",
        "bulkhead_depth 1.5",
        "# HELP bulkhead_wait_seconds Wait.",
        "# TYPE bulkhead_wait_seconds histogram",
        'bulkhead_wait_seconds_bucket{kind="llm",le="0.1"} 2',
        'bulkhead_wait_seconds_bucket{kind="llm",le="1"} 3',
        'bulkhead_wait_seconds_bucket{kind="llm",le="+Inf"} 4',
        'bulkhead_wait_seconds_sum{kind="llm"} 7.65',
        'bulkhead_wait_seconds_count{kind="llm"} 4',
    ]
    registry.set("depth", None)
    assert not [line for line in registry.lines() if "depth" in line]


def test_values_of_a_label_are_bounded_and_configured_ones_keep_their_place() -> None:
    registry = Registry(TABLE, known={"model": ["mine"]})
    for n in range(1000):
        registry.add("jobs_total", model=f"m{n}")
    registry.add("jobs_total", model="mine")
    registry.add("jobs_total", model="x" * 1000)
    lines = [line for line in registry.lines() if line.startswith("bulkhead_jobs_total")]
    assert len(lines) == MOST_VALUES + 2
    assert f'bulkhead_jobs_total{{model="other"}} {1000 - MOST_VALUES + 1}' in lines
    assert 'bulkhead_jobs_total{model="mine"} 1' in lines


def test_a_counter_never_goes_down() -> None:
    registry = Registry(TABLE)
    registry.add("jobs_total", 2, model="m")
    for amount in (-1, math.nan, math.inf):
        registry.add("jobs_total", amount, model="m")
        registry.observe("wait_seconds", amount, kind="k")
    registry.raise_to("jobs_total", 5, model="m")
    registry.raise_to("jobs_total", 3, model="m")
    assert registry.lines()[2:] == ['bulkhead_jobs_total{model="m"} 5']


def test_numbers_are_written_as_the_format_asks() -> None:
    registry = Registry(TABLE)
    for value, text in ((math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (1e20, "1e+20"), (3.0, "3")):
        registry.set("depth", value)
        assert registry.lines()[-1] == f"bulkhead_depth {text}"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: r.add("nothing_total"),
        lambda r: r.add("depth"),
        lambda r: r.set("jobs_total", 1, model="m"),
        lambda r: r.observe("depth", 1),
        lambda r: r.add("jobs_total"),
        lambda r: r.add("jobs_total", model="m", kind="k"),
    ],
)
def test_what_the_table_does_not_have_is_refused(wrong) -> None:
    registry = Registry(TABLE)
    with pytest.raises(ValueError, match=r"the table of metrics has no|has the labels"):
        wrong(registry)
    assert registry.lines() == []


def test_threads_lose_no_count() -> None:
    registry = Registry(TABLE)

    def count() -> None:
        for _ in range(500):
            registry.add("jobs_total", model="m")
            registry.observe("wait_seconds", 0.5, kind="k")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 'bulkhead_jobs_total{model="m"} 2000' in registry.lines()
    assert 'bulkhead_wait_seconds_count{kind="k"} 2000' in registry.lines()


def test_a_value_that_becomes_known_later_has_its_place_though_the_room_is_full() -> None:
    registry = Registry(TABLE, known={"model": ["mine"]})
    for number in range(MOST_VALUES + 5):
        registry.add("jobs_total", model=f"m{number}")
    registry.know("model", "late")
    registry.know("model", "late")
    registry.add("jobs_total", model="late")
    registry.add("jobs_total", model="one-more")
    text = "\n".join(registry.lines())
    assert 'model="late"' in text
    assert 'model="one-more"' not in text
