"""Holds that live: kept, lifted in time, told."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from supervisor.intake.holds import Mode, Source
from supervisor.pausing import Pausing

START = 1_000_000.0


class Clock:
    """A wall clock that follows trio's, and can be set."""

    def __init__(self) -> None:
        self.ahead = START - trio.current_time()

    def __call__(self) -> float:
        return trio.current_time() + self.ahead


def pausing(tmp_path: Path, clock: Clock) -> tuple[Pausing, list[str]]:
    told: list[str] = []
    made = Pausing(tmp_path / "holds.json", now=clock)
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


async def test_a_full_disk_does_not_stop_a_pause(tmp_path, autojump_clock, caplog):
    made = Pausing(tmp_path / "no such folder" / "holds.json", now=Clock())
    made.put(Source.OPERATOR)
    assert made.reason() == "held by the operator"
    assert "a restart would forget them" in caplog.text


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
