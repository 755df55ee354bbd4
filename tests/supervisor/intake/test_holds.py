"""The list of holds."""

from __future__ import annotations

import pytest

from supervisor.intake.holds import Hold, Holds, Mode, Source, decode, encode, last_end, to_reload

PAUSE = Hold(source=Source.OPERATOR, reason="a game", since=100.0, until=200.0)
FOR_EVER = Hold(source=Source.OPERATOR, since=150.0, mode=Mode.UNLOAD)


def test_a_source_has_one_hold():
    assert Holds().put(PAUSE).put(FOR_EVER).items == (FOR_EVER,)


def test_lifting_takes_away_what_the_source_put():
    assert Holds().put(PAUSE).lift(Source.OPERATOR) == Holds()
    assert Holds().lift(Source.OPERATOR) == Holds()


@pytest.mark.parametrize(("now", "left"), [(199.9, (PAUSE,)), (200.0, ()), (1e12, ())])
def test_a_hold_runs_out_at_its_end(now, left):
    assert Holds().put(PAUSE).at(now).items == left


def test_a_hold_without_an_end_stays():
    holds = Holds().put(FOR_EVER)
    assert holds.at(1e12) == holds
    assert holds.until is None
    assert holds.next_end() is None


def test_when_work_may_be_taken_again():
    assert Holds().until is None
    assert Holds().put(PAUSE).until == 200.0
    assert Holds().put(PAUSE).next_end() == 200.0


@pytest.mark.parametrize(
    ("hold", "phrase"), [(PAUSE, "held by the operator (a game)"), (FOR_EVER, "held by the operator")]
)
def test_the_reason_is_a_phrase(hold, phrase):
    assert Holds().put(hold).reason() == phrase
    assert Holds().reason() == ""


@pytest.mark.parametrize("holds", [Holds(), Holds((PAUSE,)), Holds((FOR_EVER,))])
def test_what_is_written_is_read_back(holds):
    assert decode(encode(holds)) == (holds, "")


def test_one_broken_hold_costs_itself_only_and_is_named():
    data = encode(Holds((PAUSE,))).replace(b'"items": [', b'"items": [{"source": "the moon", "since": 1},')
    holds, problem = decode(data)
    assert holds == Holds((PAUSE,))
    assert "the moon" in problem


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"items": 5}', b"\xff\xfe"])
def test_a_broken_file_is_named(data):
    holds, problem = decode(data)
    assert holds == Holds()
    assert "cannot be read" in problem


def test_of_two_holds_of_one_source_the_last_counts():
    assert decode(encode(Holds((PAUSE, FOR_EVER))))[0] == Holds((FOR_EVER,))


# ---- scopes

CORDON = Hold(source=Source.OPERATOR, reason="a new fan", since=1.0, gpu="GPU-1")
NO_VIDEO = Hold(source=Source.OPERATOR, since=1.0, kind="video")
VIDEO_ON_1 = Hold(source=Source.OPERATOR, since=1.0, kind="video", gpu="GPU-1")


@pytest.mark.parametrize(
    ("hold", "kind", "gpu", "held"),
    [
        (FOR_EVER, "", "", True),
        (FOR_EVER, "llm", "GPU-1", True),
        (CORDON, "", "", False),
        (CORDON, "", "GPU-1", True),
        (CORDON, "llm", "GPU-1", True),
        (CORDON, "llm", "GPU-2", False),
        (CORDON, "llm", "", False),
        (NO_VIDEO, "", "", False),
        (NO_VIDEO, "video", "GPU-2", True),
        (NO_VIDEO, "llm", "GPU-2", False),
        (VIDEO_ON_1, "video", "GPU-1", True),
        (VIDEO_ON_1, "video", "GPU-2", False),
        (VIDEO_ON_1, "llm", "GPU-1", False),
    ],
)
def test_a_hold_is_about_its_scope(hold, kind, gpu, held):
    holds = Holds().put(hold)
    assert bool(holds.reason(kind, gpu)) is held
    assert holds.mode(kind, gpu) == (hold.mode if held else None)


def test_a_cordon_says_what_it_is_about():
    assert Holds().put(CORDON).reason(gpu="GPU-1") == "held by the operator (GPU GPU-1: a new fan)"
    assert Holds().put(VIDEO_ON_1).reason("video", "GPU-1") == "held by the operator (video: GPU GPU-1)"


def test_resume_leaves_cordons_alone():
    holds = Holds().put(CORDON).put(FOR_EVER).put(NO_VIDEO)
    assert len(holds.items) == 3
    assert holds.lift(Source.OPERATOR).items == (CORDON, NO_VIDEO)
    assert holds.lift(Source.OPERATOR, gpu="GPU-1").items == (FOR_EVER, NO_VIDEO)
    assert holds.lift(Source.OPERATOR).scoped() == (CORDON, NO_VIDEO)


def test_a_cordon_does_not_move_the_end_of_a_pause():
    assert Holds().put(PAUSE).put(CORDON).until == 200.0


def test_the_strictest_mode_counts():
    holds = Holds().put(PAUSE).put(Hold(source=Source.BATTERY, since=1, mode=Mode.ABORT)).put(CORDON)
    assert holds.mode() is Mode.ABORT


def test_a_file_of_an_earlier_version_is_read():
    old = b'{"items": [{"source": "operator", "reason": "a game", "since": 100.0, "until": 200.0}]}'
    assert decode(old) == (Holds((PAUSE,)), "")


def test_scope_and_warm_models_are_kept():
    holds = Holds((Hold(source=Source.THERMAL, since=1, gpu="GPU-1", kind="llm", warm=("a", "b"), mode=Mode.UNLOAD),))
    assert decode(encode(holds)) == (holds, "")


@pytest.mark.parametrize("source", list(Source))
def test_every_source_has_a_phrase(source):
    assert Holds().put(Hold(source=source, since=1)).reason().startswith("held ")


# ---- coming back warm


def unload(source: Source, *warm: str, gpu: str = "", until: float | None = None) -> Hold:
    return Hold(source=source, since=1.0, mode=Mode.UNLOAD, warm=warm, gpu=gpu, until=until)


def test_what_was_loaded_comes_back_when_the_hold_ends():
    before = Holds().put(unload(Source.OPERATOR, "a", "b"))
    assert to_reload(before, before.lift(Source.OPERATOR)) == ("a", "b")


def test_a_hold_that_unloads_nothing_brings_nothing_back():
    before = Holds().put(Hold(source=Source.OPERATOR, since=1, warm=("a",)))
    assert before.items[0].warm == ()
    assert to_reload(before, before.lift(Source.OPERATOR)) == ()


@pytest.mark.parametrize("first", [Source.OPERATOR, Source.PRESENCE])
def test_models_come_back_after_the_last_of_several_holds(first):
    """Presence came second, when everything was unloaded already: it must not forget what the operator's hold knew."""
    second = Source.PRESENCE if first is Source.OPERATOR else Source.OPERATOR
    both = Holds().put(unload(Source.OPERATOR, "a")).put(unload(Source.PRESENCE))
    one = both.lift(first)
    assert to_reload(both, one) == ()
    assert to_reload(one, one.lift(second)) == ("a",)


def test_a_hold_that_runs_out_hands_on_too():
    both = Holds().put(unload(Source.OPERATOR, "a", until=5.0)).put(unload(Source.PRESENCE))
    one = both.at(5.0)
    assert to_reload(both, one) == ()
    assert to_reload(one, one.lift(Source.PRESENCE)) == ("a",)


def test_a_second_pause_forgets_nothing():
    first = Holds().put(unload(Source.OPERATOR, "a"))
    second = first.put(unload(Source.OPERATOR))
    assert to_reload(first, second) == ()
    assert to_reload(second, second.lift(Source.OPERATOR)) == ("a",)


def test_a_pause_that_no_longer_unloads_brings_them_back():
    first = Holds().put(unload(Source.OPERATOR, "a"))
    assert to_reload(first, first.put(PAUSE)) == ("a",)


def test_a_hold_of_another_gpu_keeps_nothing_away():
    both = Holds().put(unload(Source.FOREIGN_VRAM, "a", gpu="GPU-1")).put(unload(Source.FOREIGN_VRAM, "b", gpu="GPU-2"))
    assert to_reload(both, both.lift(Source.FOREIGN_VRAM, gpu="GPU-1")) == ("a",)


def test_a_hold_of_one_gpu_remembers_what_the_whole_worker_had():
    """Which model lives where is not known here: all are named, and the one whose GPU is held is named again."""
    both = Holds().put(unload(Source.OPERATOR, "a", "b")).put(unload(Source.FOREIGN_VRAM, gpu="GPU-1"))
    one = both.lift(Source.OPERATOR)
    assert to_reload(both, one) == ("a", "b")
    assert to_reload(one, one.lift(Source.FOREIGN_VRAM, gpu="GPU-1")) == ("a", "b")


# ---- task kinds


def test_a_kind_is_held_for_the_models_that_it_is_about():
    holds = Holds().put(NO_VIDEO).put(CORDON).put(VIDEO_ON_1)
    assert holds.kinds_held(["llm", "video"], ["GPU-2"]) == {"video": "held by the operator (video)"}
    both = "held by the operator (video); held by the operator (video: GPU GPU-1)"
    assert holds.kinds_held(["llm", "video"], ["GPU-1", "GPU-2"]) == {"video": both}
    assert Holds().put(VIDEO_ON_1).kinds_held(["video"]) == {}
    assert Holds().put(FOR_EVER).kinds_held(["video"]) == {}  # that is the whole worker's


def test_what_was_unloaded_for_good_does_not_come_back():
    before = Holds().put(unload(Source.OPERATOR, "a", "b")).forget(["a"])
    assert to_reload(before, before.lift(Source.OPERATOR)) == ("b",)


def test_the_last_end_of_several():
    assert last_end([PAUSE, CORDON]) is None
    assert last_end([PAUSE, unload(Source.PRESENCE, until=300.0)]) == 300.0
    assert last_end([]) is None
