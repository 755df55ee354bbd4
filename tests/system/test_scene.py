"""The owner's machine, played through by scripts/scene: who swaps, who steps aside, who comes back, and why.

The script judges itself while it plays: every status that it samples has a reason whenever nothing runs, and every
step has to come within its patience. Here its verdict is read, and what the owner was told on the way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900.0  # the scene's own bounds end it long before
GAME = "Half-Life 3 fills the screen"
USED = "because the machine is in use (Half-Life 3 fills the screen)"


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What `scripts/scene --json` said; the scene went as it is told."""
    argv = [sys.executable, str(ROOT / "scripts" / "scene_road.py"), "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its supervisor
            out, err = process.communicate(timeout=60)
    found = [json.loads(line) for line in out.splitlines()]
    assert found, err
    assert process.returncode == 0, f"{found[-1].get('wrong')}\n{out[-4000:]}\n{err}"
    return found


def statuses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line["status"] for line in lines if "status" in line]


def after(lines: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """Statuses from the story's line with these words on, up to the next line of the story."""
    (start,) = [number for number, line in enumerate(lines) if words in line.get("story", "")]
    rest = lines[start + 1 :]
    end = next((number for number, line in enumerate(rest) if "story" in line), len(rest))
    return statuses(rest[:end])


def test_it_goes_as_it_is_told_and_is_watched_all_the_while(lines):
    last = lines[-1]
    assert last["ok"] is True
    assert last["wrong"] == []
    assert last["samples"] >= 50
    assert last["jobs"] == 4


def test_two_that_do_not_fit_are_never_loaded_together(lines):
    for seen in statuses(lines):
        large = [name for name in ("synthetic-chat", "synthetic-draw") if seen["models"][name] in ("ready", "busy")]
        assert len(large) <= 1, seen


def test_the_owner_reads_why_at_every_moment(lines):
    for seen in statuses(lines):
        assert seen["why"] or seen["running"], seen
        assert seen["gpu"] or seen["running"], seen
    paused = [seen for seen in statuses(lines) if seen["state"] == "paused"]
    assert paused
    for seen in paused:
        assert seen["holds"]
        assert seen["why"].startswith("Paused because "), seen
    assert any(USED in seen["why"] and USED in seen["gpu"] for seen in paused)
    assert any(
        "another program uses the GPU" in seen["gpu"] and "others hold 6.0 GiB" in seen["gpu"] for seen in paused
    )


def test_what_is_over_is_not_told_any_more(lines):
    last = statuses(lines)[-1]
    assert (last["state"], last["why"], last["gpu"], last["holds"]) == (
        "idle",
        "There are no jobs.",
        "There are no jobs.",
        [],
    )
    for seen in statuses(lines):
        if not seen["holds"]:
            assert GAME not in seen["why"] + seen["gpu"], seen


def test_the_game_gets_its_memory_within_a_moment(lines):
    """A second to be noticed, one to be told, and what the end of two engines takes; generous for a loaded machine."""
    assert lines[-1]["idle_game_free_s"] < 60
    assert lines[-1]["working_game_free_s"] < 60


def test_the_same_models_come_back_although_nobody_asks_for_them(lines):
    warm = after(lines, "Nobody has asked for a model")
    assert warm[-1]["models"] == {
        "synthetic-chat": "ready",
        "synthetic-draw": "cold",
        "synthetic-ears": "ready",
    }
    assert not any(seen["running"] for seen in warm)
