"""Holds that live: kept, lifted in time, told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from supervisor.intake.holds import Mode, Source
from supervisor.observe.paced import AT_ONCE
from supervisor.pausing import SET_BACK_S, Pausing, always_on

START = 1_000_000.0


class Clock:
    """A wall clock that follows trio's, and can be set."""

    def __init__(self) -> None:
        self.ahead = START - trio.current_time()

    def __call__(self) -> float:
        return trio.current_time() + self.ahead


def pausing(tmp_path: Path, clock: Clock) -> tuple[Pausing, list[str]]:
    told: list[str] = []
    made = Pausing(tmp_path / "holds.json", now=clock, length=trio.current_time)
    made.on_change = lambda: told.append(made.reason())
    return made, told


async def test_a_timed_pause_ends_by_itself(tmp_path, autojump_clock, nursery):
    made, told = pausing(tmp_path, Clock())
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, "a game", for_s=7200, mode=Mode.UNLOAD)
    assert made.left_s() == 7200
    await trio.sleep(7199)
    assert told == ["held by the operator (a game)"]
    await trio.sleep(2)
    assert told[1:] == [""]
    assert (tmp_path / "holds.json").read_text().count("operator") == 0


async def test_a_pause_outlives_a_restart(tmp_path, autojump_clock, caplog):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    hold = made.put(Source.OPERATOR, "a game", for_s=7200)
    await trio.sleep(3600)
    again, _ = pausing(tmp_path, clock)
    assert again.holds().items == (hold,)
    assert again.left_s() == 3600
    assert "still paused" in caplog.text
    await trio.sleep(3601)
    assert pausing(tmp_path, clock)[0].reason() == ""


async def test_without_an_end_only_the_operator_lifts_it(tmp_path, autojump_clock, nursery):
    made, told = pausing(tmp_path, Clock())
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR)
    await trio.sleep(86_000)
    assert made.reason() == "held by the operator"
    assert made.left_s() is None
    assert made.lift(Source.OPERATOR)
    assert not made.lift(Source.OPERATOR)
    assert told == ["held by the operator", ""]


async def test_a_clock_that_is_set_forward_ends_a_pause_soon(tmp_path, autojump_clock, nursery):
    clock = Clock()
    made, told = pausing(tmp_path, clock)
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, for_s=7200)
    await trio.sleep(1)
    clock.ahead += 7200
    assert made.reason() == ""  # at once, for whoever asks
    await trio.sleep(6)
    assert told[-1] == ""


async def test_a_second_pause_replaces_the_first(tmp_path, autojump_clock, nursery):
    made, _ = pausing(tmp_path, Clock())
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, for_s=10)
    await trio.sleep(1)
    made.put(Source.OPERATOR, for_s=100)
    await trio.sleep(50)
    assert made.left_s() == 50


async def test_a_broken_file_is_said_and_not_fatal(tmp_path, autojump_clock, caplog):
    (tmp_path / "holds.json").write_bytes(b"{nonsense")
    with caplog.at_level(logging.ERROR):
        made, _ = pausing(tmp_path, Clock())
    assert made.reason() == ""
    assert "cannot be read" in caplog.text
    made.put(Source.OPERATOR)
    (sight,) = made.sights()
    assert sight.unknown
    assert "lost" in sight.text
    assert (tmp_path / "holds.json.unreadable").read_bytes() == b"{nonsense"
    again, _ = pausing(tmp_path, Clock())
    assert again.reason() == "held by the operator"
    assert again.sights() == ()


async def test_a_full_disk_does_not_stop_a_pause(tmp_path, autojump_clock, caplog):
    made = Pausing(tmp_path / "no such folder" / "holds.json", now=Clock())
    made.put(Source.OPERATOR)
    assert made.reason() == "held by the operator"
    assert "a restart would forget them" in caplog.text
    assert "a restart would forget them" in made.sights()[0].text
    (tmp_path / "no such folder").mkdir()
    made.put(Source.OPERATOR)
    assert made.sights() == ()


async def test_models_come_back_warm_after_the_last_hold(tmp_path, autojump_clock, nursery):
    made, _ = pausing(tmp_path, Clock())
    nursery.start_soon(made.run)
    back: list[tuple[str, ...]] = []
    made.on_warm = back.append
    made.loaded = lambda _gpu: ("llama", "whisper")
    made.put(Source.OPERATOR, for_s=100, mode=Mode.UNLOAD)
    made.loaded = lambda _gpu: ()
    made.put(Source.PRESENCE, mode=Mode.UNLOAD)
    await trio.sleep(200)
    assert back == []
    made.lift(Source.PRESENCE)
    assert back == [("llama", "whisper")]


async def test_a_cordon_pauses_one_gpu(tmp_path, autojump_clock):
    made, _ = pausing(tmp_path, Clock())
    made.put(Source.OPERATOR, "a new fan", gpu="GPU-1")
    assert made.reason() == ""
    assert made.reason(gpu="GPU-1") == "held by the operator (GPU GPU-1: a new fan)"
    assert not made.lift(Source.OPERATOR)
    assert made.lift(Source.OPERATOR, gpu="GPU-1")


# ---- the clock


async def test_a_clock_that_is_set_back_makes_no_pause_longer(tmp_path, autojump_clock, nursery):
    clock = Clock()
    made, told = pausing(tmp_path, clock)
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, for_s=7200)
    await trio.sleep(3600)
    clock.ahead -= 86_400
    assert made.left_s() == pytest.approx(3600)  # at once, for whoever asks
    await trio.sleep(3590)
    assert made.reason()
    await trio.sleep(11)
    assert told[-1] == ""


async def test_corrections_of_the_clock_move_no_end(tmp_path, autojump_clock, nursery):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    nursery.start_soon(made.run)
    hold = made.put(Source.OPERATOR, for_s=7200)
    for _ in range(10):
        await trio.sleep(60)
        clock.ahead -= SET_BACK_S / 20
    assert made.holds().items == (hold,)


async def test_a_clock_set_back_while_the_supervisor_was_down(tmp_path, autojump_clock):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    made.put(Source.OPERATOR, for_s=7200)
    clock.ahead -= 365 * 86_400
    again, _ = pausing(tmp_path, clock)
    assert again.left_s() == pytest.approx(7200)
    await trio.sleep(7201)
    assert again.reason() == ""


async def test_the_machine_sleeps_through_the_end_of_a_pause(tmp_path, autojump_clock, nursery):
    """The clock of tasks stands still meanwhile; the wall's goes on, and so does the one that is never set."""
    clock, asleep = Clock(), [0.0]
    made = Pausing(tmp_path / "holds.json", now=clock, length=lambda: trio.current_time() + asleep[0])
    back: list[tuple[str, ...]] = []
    made.on_warm = back.append
    made.loaded = lambda _gpu: ("llama",)
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, for_s=7200, mode=Mode.UNLOAD)
    await trio.sleep(10)
    clock.ahead += 28_800
    asleep[0] += 28_800
    assert made.reason() == ""
    assert back == []
    await trio.sleep(6)
    assert back == [("llama",)]


def test_this_system_has_a_clock_that_is_never_set():
    read = always_on()
    assert 0 <= read() <= read()


# ---- an earlier life


async def test_models_come_back_warm_when_the_pause_ran_out_while_nobody_looked(tmp_path, autojump_clock, nursery):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    made.loaded = lambda _gpu: ("llama",)
    made.put(Source.OPERATOR, for_s=100, mode=Mode.UNLOAD)
    clock.ahead += 1000
    for expected in ([("llama",)], []):  # once, not at every start from then on
        again, _ = pausing(tmp_path, clock)
        back: list[tuple[str, ...]] = []
        again.on_warm = back.append
        async with trio.open_nursery() as inner:
            inner.start_soon(again.run)
            await trio.sleep(1)
            inner.cancel_scope.cancel()
        assert back == expected


async def test_models_come_back_warm_when_the_pause_is_lifted_in_a_later_life(tmp_path, autojump_clock):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    made.loaded = lambda _gpu: ("llama",)
    made.put(Source.OPERATOR, mode=Mode.UNLOAD)
    again, _ = pausing(tmp_path, clock)
    back: list[tuple[str, ...]] = []
    again.on_warm = back.append
    assert again.lift(Source.OPERATOR)
    assert back == [("llama",)]


@pytest.mark.parametrize("source", [Source.COORDINATOR, Source.UPDATE])
async def test_what_is_of_one_life_is_not_taken_over(tmp_path, autojump_clock, source):
    clock = Clock()
    made, _ = pausing(tmp_path, clock)
    made.put(source, "a release")
    made.put(Source.OPERATOR)
    assert made.reason().startswith("held ")
    again, _ = pausing(tmp_path, clock)
    assert [hold.source for hold in again.holds().items] == [Source.OPERATOR]


# ---- what comes back


async def test_what_the_operator_unloaded_meanwhile_stays_away(tmp_path, autojump_clock):
    made, _ = pausing(tmp_path, Clock())
    back: list[tuple[str, ...]] = []
    made.on_warm = back.append
    made.loaded = lambda _gpu: ("llama", "whisper")
    made.put(Source.PRESENCE, mode=Mode.UNLOAD)
    made.forget_warm(["llama"])
    assert pausing(tmp_path, Clock())[0].holds().items[0].warm == ("whisper",)
    made.lift(Source.PRESENCE)
    assert back == [("whisper",)]


async def test_a_pause_that_unloads_nothing_brings_nothing_back(tmp_path, autojump_clock):
    made, _ = pausing(tmp_path, Clock())
    made.on_warm = lambda models: pytest.fail(f"{models} were never away")
    made.loaded = lambda _gpu: ("llama",)
    made.put(Source.OPERATOR)
    assert made.lift(Source.OPERATOR)


# ---- task kinds


async def test_a_kind_is_held_for_a_while(tmp_path, autojump_clock, nursery):
    made, told = pausing(tmp_path, Clock())
    nursery.start_soon(made.run)
    made.put(Source.OPERATOR, "a bad release", kind="video", for_s=100)
    made.put(Source.OPERATOR, kind="image", gpu="GPU-1")
    assert made.reason() == ""
    assert made.reason(kind="video") == "held by the operator (video: a bad release)"
    assert made.kinds_held(["llm", "video", "image"]) == {
        "video": ("held by the operator (video: a bad release)", 100.0)
    }
    assert made.kinds_held(["image"], ["GPU-1"]) == {"image": ("held by the operator (image: GPU GPU-1)", None)}
    await trio.sleep(101)
    assert made.kinds_held(["video"]) == {}
    assert len(told) == 3


async def test_a_kind_alone_cannot_be_unloaded(tmp_path, autojump_clock):
    made, _ = pausing(tmp_path, Clock())
    with pytest.raises(ValueError, match="can only stop accepting"):
        made.put(Source.OPERATOR, kind="video", mode=Mode.UNLOAD)
    assert made.holds().items == ()


async def test_a_coordinator_that_pauses_without_end_fills_no_log_and_the_last_word_counts(
    tmp_path, autojump_clock, caplog
):
    caplog.set_level(logging.INFO, "supervisor")
    made, _ = pausing(tmp_path, Clock())
    for number in range(300):
        made.put(Source.COORDINATOR, f"reason {number}", for_s=60.0)
        made.lift(Source.COORDINATOR)
        await trio.sleep(0.01)
    made.put(Source.COORDINATOR, "the last", for_s=60.0)
    assert made.reason() == "held by the coordinator (the last)"
    assert len(caplog.records) <= AT_ONCE
