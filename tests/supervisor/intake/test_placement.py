"""Where a model could lie on an empty box, and jobs that say what they need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.intake.placement import CONTEXT_BYTES, Space, job_too_large, places

GIB = 2**30


def box(*sizes: int) -> list[Space]:
    return [Space(uuid=f"g{number}", room_bytes=size * GIB) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("need", "sizes", "more", "where"),
    [
        (10, (24, 8, 12), {}, [{"g0"}, {"g2"}]),
        (10, (24, 8, 12), {"allowed": ("g1", "g2")}, [{"g2"}]),
        (10, (8, 8), {}, []),
        (10, (), {"split": True}, []),
        (10, (8, 8, 8), {"split": True}, [{"g0", "g1"}, {"g0", "g2"}, {"g1", "g2"}]),  # the fewest devices
        (20, (8, 8, 8), {"split": True}, [{"g0", "g1", "g2"}]),
        (10, (24, 8), {"split": True}, [{"g0"}]),  # split only when it must
        (30, (24, 8), {"elastic": True}, [{"g0"}]),  # an estimate takes the largest whole
        (30, (24, 8), {"split": True}, [{"g0", "g1"}]),
        (40, (24, 8), {"split": True}, []),
    ],
)
def test_places(need, sizes, more, where):
    assert [set(place) for place in places(need * GIB, box(*sizes), **more)] == where


def test_shares_follow_the_room():
    [place] = places(90 * GIB, box(80, 20), split=True)
    assert place["g0"] > 3.5 * place["g1"]


@given(st.integers(1, 200), st.lists(st.integers(1, 80), min_size=1, max_size=5), st.booleans())
def test_no_place_exceeds_its_device_and_all_weights_are_placed(need, sizes, split):
    spaces = box(*sizes)
    rooms = {space.uuid: space.room_bytes for space in spaces}
    for place in places(need * GIB, spaces, split=split):
        assert all(0 < share <= rooms[uuid] for uuid, share in place.items())
        weights = sum(share - CONTEXT_BYTES for share in place.values())
        assert weights >= need * GIB - CONTEXT_BYTES


@pytest.mark.parametrize(
    ("estimate", "more", "says"),
    [
        (0, {"threshold_bytes": GIB}, ""),
        (12, {"threshold_bytes": 12 * GIB}, ""),
        (13, {"threshold_bytes": 12 * GIB}, "vram_threshold_gb"),
        (10, {"threshold_bytes": 12 * GIB, "rooms": {"g": 8 * GIB}}, "has 8.0 GiB"),  # clamped to what is there
        (10, {"rooms": {"g": 8 * GIB, "h": 8 * GIB}}, "has 8.0 GiB"),
        (10, {"rooms": {"g": 8 * GIB, "h": 8 * GIB}, "split": True}, ""),
        (10, {"rooms": {}}, ""),  # not measured
    ],
)
def test_what_a_job_says_it_needs(estimate, more, says):
    sentence = job_too_large(estimate * GIB, **more)
    assert says in sentence
    assert bool(says) == bool(sentence)
