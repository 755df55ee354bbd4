"""How long a load may take."""

from __future__ import annotations

import pytest

from supervisor.intake.loading import End, Keep, LoadWatch, judge_load

FRESH = LoadWatch(began_at=100.0, silent_s=60.0)


def test_a_deadline_follows_progress():
    watch = FRESH
    for step in range(1, 50):  # 49 minutes of healthy loading
        now = 100.0 + step * 59
        assert isinstance(judge_load(watch, now, waiting=1), Keep)
        watch = watch.seen(now, step)
    assert judge_load(watch, now + 59.9, waiting=1) == Keep(now + 60.0)
    ended = judge_load(watch, now + 60.0, waiting=1)
    assert ended == End("the load made no progress for 60 s", "engine")


def test_the_same_number_again_is_no_progress():
    watch = FRESH.seen(110.0, 5).seen(150.0, 5).seen(160.0, 4)
    assert watch.deadline == 170.0


def test_a_load_may_be_bounded_as_a_whole():
    watch = LoadWatch(began_at=0.0, silent_s=60.0, most_s=100.0).seen(90.0, 1)
    assert watch.deadline == 100.0
    assert judge_load(watch, 100.0, waiting=1) == End("the load took longer than 100 s", "engine")


@pytest.mark.parametrize(
    ("done", "waiting", "wanted", "goes_on"),
    [(10, 1, False, True), (10, 0, False, False), (10, 0, True, True), (95, 0, False, True), (0, 0, False, False)],
)
def test_a_load_nobody_waits_for_ends_unless_it_is_nearly_done(done, waiting, wanted, goes_on):
    watch = FRESH.seen(110.0, done, 100)
    judged = judge_load(watch, 120.0, waiting=waiting, wanted=wanted)
    assert isinstance(judged, Keep) == goes_on
    if isinstance(judged, End):
        assert judged.owner == ""
        assert judged.reason.startswith("nobody waits for it any more")


def test_what_is_left_is_told_at_its_pace():
    assert FRESH.left_s(110.0) is None
    assert FRESH.seen(110.0, 25, 100).left_s(110.0) == pytest.approx(30.0)
