from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engines.runtime import threads
from engines.runtime.threads import threads_of, usable_cores
from protocol.engine_wire import Model
from protocol.faults import FaultError


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Set which cores this process may use, and the quota of its container."""

    def put(cores: int, quota: str | None = None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        path = tmp_path / "cpu.max"
        if quota is not None:
            path.write_text(quota)
        monkeypatch.setattr(threads, "_CPU_MAX", path)

    return put


def model(**options: Any) -> Model:
    return Model(name="m", options=options)


@pytest.mark.parametrize(
    ("cores", "quota", "usable"),
    [
        (6, None, 6),
        (6, "max 100000\n", 6),
        (6, "200000 100000\n", 2),
        (6, "250000 100000\n", 3),
        (6, "1000 100000\n", 1),
        (2, "800000 100000\n", 2),
        (6, "nonsense", 6),
    ],
)
def test_cores_are_those_that_this_process_may_use(box, cores: int, quota: str | None, usable: int) -> None:
    box(cores, quota)
    assert usable_cores() == usable


def test_a_system_without_affinity_counts_its_cores(box, monkeypatch: pytest.MonkeyPatch) -> None:
    box(2)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_a_run_gets_its_share(box) -> None:
    box(12)
    assert threads_of(model()) == 12
    assert threads_of(model(), at_once=5) == 2
    assert threads_of(model(), at_once=50) == 1
    assert threads_of(model(), most=4) == 4


def test_what_was_asked_for_is_taken(box) -> None:
    box(2)
    assert threads_of(model(threads=7), at_once=4, most=4) == 7
    assert threads_of(model(threads=0)) == 2


@pytest.mark.parametrize("value", [-1, 1025, "four", 1.5])
def test_nonsense_names_the_option(value: Any) -> None:
    with pytest.raises(FaultError) as caught:
        threads_of(model(threads=value))
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", "options.threads")
