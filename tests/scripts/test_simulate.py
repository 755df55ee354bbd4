"""The simulator: what it measures, what it refuses, and what it finds on the shipped traces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
import bench_schedule  # noqa: E402
import simulate_road  # noqa: E402
from simulate_trace import Arrival, OwnUse, Trace, read, write  # noqa: E402
from simulate_world import Broken, World, quantile  # noqa: E402

from supervisor.intake import effects as fx  # noqa: E402

ONE = """
jobs = 10
every_s = 1.0
[[gpus]]
name = "g"
gb = 24.0
[[models]]
name = "a"
gb = 10.0
load_s = 5.0
"""


def trace(tmp_path: Path, lines: list[dict], head: str = ONE) -> Trace:
    """A trace of just these happenings."""
    spec = tmp_path / "spec.toml"
    spec.write_text(head)
    path = tmp_path / "trace.jsonl"
    write(read(spec, jobs=0), path)
    with path.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return read(path, jobs=1000)


def test_a_trace_worked_out_by_hand(tmp_path: Path):
    """Load 5 s, then two runs one after the other: starts at 5 and 8, ends at 12."""
    jobs = [{"t": 0.0, "model": "a", "work_s": 3.0}, {"t": 1.0, "model": "a", "work_s": 4.0}]
    made = trace(tmp_path, jobs)
    for name in simulate_road.POLICIES:
        figures = World(made, simulate_road.policy(name, made), name).run()
        assert (figures.done, figures.loads, figures.evictions) == (2, 1, 0)
        assert figures.lasted_s == pytest.approx(12.0)
        assert figures.busy == pytest.approx(7 / 12)
        assert figures.loading == pytest.approx(5 / 12)
        assert figures.wait_oldest_s == pytest.approx(7.0)
        assert figures.wait_mean_s == pytest.approx(6.0)


def test_two_models_on_one_gpu_share_it(tmp_path: Path):
    """Both work from 5 to 11 at half speed; the longer one has the GPU alone after that."""
    head = ONE + '[[models]]\nname = "b"\ngb = 10.0\nload_s = 5.0\n'
    jobs = [{"t": 0.0, "model": "a", "work_s": 3.0}, {"t": 0.0, "model": "b", "work_s": 4.0}]
    made = trace(tmp_path, jobs, head)
    figures = World(made, simulate_road.policy("bulkhead", made), "bulkhead").run()
    assert figures.lasted_s == pytest.approx(12.0)


def test_a_game_takes_the_gpu_and_gives_it_back(tmp_path: Path):
    lines = [
        {"t": 0.0, "model": "a", "work_s": 3.0},
        {"t": 6.0, "gpu": "g", "foreign_gb": 20.0, "hold": "a game"},
        {"t": 50.0, "model": "a", "work_s": 3.0},
        {"t": 100.0, "gpu": "g", "foreign_gb": 0.0},
        {"t": 101.0, "model": "a", "work_s": 3.0},
    ]
    made = trace(tmp_path, lines)
    for name in simulate_road.POLICIES:
        figures = World(made, simulate_road.policy(name, made), name).run()
        assert (figures.done, figures.refused, figures.evictions, figures.loads) == (2, 1, 1, 2)


def test_a_load_is_cancelled_by_a_game_and_made_good(tmp_path: Path):
    lines = [
        {"t": 0.0, "model": "a", "work_s": 3.0},
        {"t": 1.0, "gpu": "g", "foreign_gb": 20.0, "hold": "a game"},
        {"t": 100.0, "gpu": "g", "foreign_gb": 0.0},
    ]
    made = trace(tmp_path, lines)
    for name in simulate_road.POLICIES:
        figures = World(made, simulate_road.policy(name, made), name).run()
        assert (figures.done, figures.cancelled_loads, figures.loads) == (1, 1, 2)
        assert figures.lasted_s == pytest.approx(108.0)


class Reckless:
    """Loads the same model again and again."""

    def __init__(self) -> None:
        self.made = 0

    def due(self) -> None:
        return None

    def step(self, _event: fx.Event, _now: float) -> list[fx.Effect]:
        self.made += 1
        return [fx.Load(self.made, "a", {"g": 10 * 2**30})]


class Idle(Reckless):
    def step(self, _event: fx.Event, _now: float) -> list[fx.Effect]:
        return []


def test_the_world_refuses_what_must_never_happen(tmp_path: Path):
    made = trace(tmp_path, [{"t": float(t), "model": "a", "work_s": 1.0} for t in range(3)])
    with pytest.raises(Broken, match="exceeds g by"):
        World(made, Reckless(), "reckless").run()
    with pytest.raises(Broken, match="left 3 jobs waiting"):
        World(made, Idle(), "idle").run()


def test_a_seed_gives_the_same_trace_and_another_another(tmp_path: Path):
    path = simulate_road.TRACES / "desktop.toml"
    first, again, other = (list(read(path, jobs=300, seed=seed).happenings()) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert sum(isinstance(each, Arrival) for each in first) == 300
    copy = tmp_path / "copy.jsonl"
    write(read(path, jobs=300, seed=5), copy)
    assert list(read(copy).happenings()) == first


def test_every_use_by_the_owner_ends():
    uses = [each for each in read(simulate_road.TRACES / "desktop.toml").happenings() if isinstance(each, OwnUse)]
    assert [bool(each.hold) for each in uses] == [True, False] * (len(uses) // 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jobs = 1", "gpus"),
        (ONE + "colour = 1", "colour"),
        (ONE + '[[owner]]\ngpu = "x"\ngb = 1\nfirst_s = 1\nfor_s = 1\nevery_s = 2', "'x'"),
    ],
)
def test_a_broken_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert simulate_road.main([str(path)]) == 64
    said = capsys.readouterr().err
    assert says in said
    assert "bad.toml" in said


@pytest.mark.parametrize("name", simulate_road.SHIPPED)
def test_better_than_first_come_first_served(name: str, capsys: pytest.CaptureFixture[str]):
    assert simulate_road.main([name, "--jobs", "4000", "--json"]) == 0
    ours, fifo, _queues = json.loads(capsys.readouterr().out)
    assert (ours["policy"], fifo["policy"]) == ("bulkhead", "fifo+lru")
    assert ours["done"] + ours["refused"] == 4000
    assert ours["busy"] > fifo["busy"]
    assert ours["wait_p99_s"] < fifo["wait_p99_s"]
    # No starvation: an hour of the owner's game, or ten minutes of others.
    assert ours["wait_oldest_s"] < 4500 if name == "desktop" else ours["wait_oldest_s"] < 900


def test_the_table_says_by_how_much(capsys: pytest.CaptureFixture[str]):
    assert simulate_road.main(["hot-model", "--jobs", "500"]) == 0
    assert "Against fifo+lru: GPUs busy +" in capsys.readouterr().out


def test_quantiles_of_nothing():
    assert quantile([], 0.99) == 0.0


def test_the_bench_keeps_its_queues():
    crowd = bench_schedule.Crowd(500, models=20)
    assert len(crowd.run(2000)) >= 2000
    assert 400 <= sum(crowd.scheduler.queued().values()) <= 500
