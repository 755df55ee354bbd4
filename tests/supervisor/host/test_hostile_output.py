"""Engines that say anything: whatever arrives, nothing escapes, every run ends typed, and the next engine serves.

BULKHEAD_HOSTILE_FRAMES and BULKHEAD_HOSTILE_SEED make it longer or repeat one; scripts/soak sends a million.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.testing_hostile import Tally, storm

FRAMES = int(os.environ.get("BULKHEAD_HOSTILE_FRAMES", "6000"))
SAFE = re.compile(r"[a-z][a-z0-9_]*\Z")  # a newer engine may know codes that we do not
SEED = int(os.environ.get("BULKHEAD_HOSTILE_SEED", "1"))


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What engines say goes to the log; a million lines of it need not be kept."""
    caplog.set_level(logging.CRITICAL + 1)


def raged(seed: int, count: int) -> Tally:
    with tempfile.TemporaryDirectory() as name:
        return trio.run(storm, seed, count, Path(name) / "s", clock=trio.testing.MockClock(autojump_threshold=0))


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_any_output_ends_every_run_typed_and_harms_nothing(seed: int):
    tally = raged(seed, 150)
    assert tally.frames >= 150
    assert not {code for code in tally.ends if not SAFE.match(code)}


def test_a_long_storm():
    print(f"seed {SEED}, {FRAMES} frames")  # noqa: T201  pytest shows it with a failure
    tally = raged(SEED, FRAMES)
    assert tally.frames >= FRAMES
    assert tally.lives > 10
    assert tally.ends.get("engine_protocol", 0) > 0
    assert not {code for code in tally.ends if not SAFE.match(code)}
