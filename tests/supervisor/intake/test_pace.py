"""Speed that collapsed, weights that lie in RAM."""

from __future__ import annotations

import random

import pytest

from supervisor.intake.pace import Memory, Pace, collapse_sentence, spill_sentence, spilled

GIB = 2**30


def after(*rates: float) -> Pace:
    pace = Pace()
    for rate in rates:
        pace = pace.seen(rate)
    return pace


def test_a_collapse_is_noticed_after_three_and_told():
    healthy = (50.0,) * 10
    assert after(*healthy, 5.0, 5.0).collapsed == 0
    pace = after(*healthy, 5.0, 5.0, 5.0)
    assert pace.collapsed == 5.0
    assert collapse_sentence("chat", pace).startswith("chat runs at 5.0 a second instead of 50.0")


def test_what_is_slow_for_long_never_becomes_normal():
    pace = after(*(50.0,) * 10, *(5.0,) * 500)
    assert pace.collapsed == 5.0
    assert pace.usual == 50.0
    assert after(*(50.0,) * 6, *(5.0,) * 100).usual in (5.0, 50.0)  # too short a history says nothing, or the truth


def test_a_recovery_is_noticed():
    pace = after(*(50.0,) * 10, *(5.0,) * 20, 45.0, 45.0)
    assert pace.collapsed == 0
    assert collapse_sentence("chat", pace) == ""


def test_a_new_model_is_not_judged():
    assert after(50.0, 50.0, 1.0, 1.0, 1.0).collapsed == 0


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_variance_is_no_collapse(seed):
    """Batching, prompts and a hot GPU vary a rate by a factor of three."""
    dice = random.Random(seed)
    pace = Pace()
    for _ in range(2000):
        pace = pace.seen(100 * dice.uniform(0.34, 1.0))
        assert pace.collapsed == 0


def test_rates_of_nothing_say_nothing():
    assert after(0.0, -1.0) == Pace()


@pytest.mark.parametrize(
    ("expected", "on_gpu", "in_ram", "usual", "count"),
    [
        (20, 10, 12, 2, 10),
        (20, 10, 8, 2, 6),
        (20, 17, 9, 2, 0),  # nearly all of it is there
        (20, 10, 3, 2, 0),  # less on the GPU and no more in RAM: a smaller context, not a spill
        (0, 10, 12, 2, 0),  # nothing was expected
        (20, 0, 30, 2, 0),  # not measured
    ],
)
def test_a_spill(expected, on_gpu, in_ram, usual, count):
    memory = Memory(expected=expected * GIB, on_gpu=on_gpu * GIB, in_ram=in_ram * GIB, usual_ram=usual * GIB)
    assert spilled(memory) == count * GIB
    assert bool(spill_sentence("chat", memory)) == bool(count)
