"""Our worker obeys what every GOLIAT worker obeys, in both protocols; and what only one of them asks for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from supervisor.link.dialects import DIALECTS
from supervisor.suspend import Clocks
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard
from tests.supervisor.link.dialects.goliat_conformance import GoliatWorkerCases, Start
from tests.supervisor.link.dialects.goliat_rig import FAST, MACHINE, STUDY, Bench, finish, open_bench


@pytest.fixture(params=["planned", "shipped"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path, protocol: str) -> Start:
    @contextlib.asynccontextmanager
    async def start(dashboard: Dashboard) -> AsyncIterator[Bench]:
        async with open_bench(tmp_path, dashboard.url, protocol) as bench:
            yield bench

    return start


class TestOurWorker(GoliatWorkerCases):
    """Held against the suite."""


async def test_a_config_that_is_not_there_is_a_failure_and_the_next_study_comes(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        dashboard.give("a", b"{}")
        del dashboard.configs["a"]
        dashboard.give("b", b"{}")
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            finish(await bench.next_run())
            await dashboard.until(lambda: len(dashboard.ends()) == 2)
            assert dashboard.ends() == ["fatal_error", "finished"]
            assert "config" in dashboard.messages("fatal_error")[0]["message"]
            await bench.empty()


async def test_a_config_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        dashboard.give("a", b"late")
        dashboard.stumbles["/configs/a"] = [Answer(503), "drop", Answer(429)]
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            run = await bench.next_run()
            assert run.request.inputs["config"].read_bytes() == b"late"


async def test_a_split_without_a_config_is_a_failure(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        dashboard.study(STUDY, None)
        async with open_bench(tmp_path, dashboard.url, "shipped"):
            await dashboard.until(dashboard.ends)
            assert "no config" in dashboard.messages("fatal_error")[0]["message"]


async def test_an_assignment_that_was_given_and_never_begun_is_told_by_the_next_life(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        dashboard.give("a", b"{}")
        dashboard.stumbles["/configs/a"] = [Answer(503)] * 1000
        patient = msgspec.structs.replace(FAST, config_patience_s=60.0)
        async with open_bench(tmp_path, dashboard.url, "planned", timing=patient):
            await dashboard.until(lambda: len(dashboard.stumbles["/configs/a"]) < 998)
        assert dashboard.ends() == []
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            await dashboard.until(dashboard.ends)
            assert "before the study could begin" in dashboard.messages("fatal_error")[0]["message"]
            assert len(bench.attempts.ledger) == 0
            await bench.until(lambda: not list((tmp_path / "goliat" / "assignments").glob("*.json")))
        async with open_bench(tmp_path, dashboard.url, "planned"):
            dashboard.give("b", b"{}")
            await dashboard.until(lambda: not dashboard.queue)
            assert dashboard.ends() == ["fatal_error"], "told once"


async def test_after_a_sleep_of_the_machine_the_dashboard_is_asked_at_once(tmp_path: Path) -> None:
    slept_s = [0.0]
    clocks = Clocks(lambda: 0.0, lambda: slept_s[0])
    async with (
        open_dashboard() as dashboard,
        open_bench(tmp_path, dashboard.url, "planned", beat_s=3600.0, clocks=clocks),
    ):
        await dashboard.until(lambda: ("GET", "/api/assignment") in dashboard.asked)
        assert len(dashboard.bodies) == 1
        slept_s[0] = 3600.0
        await dashboard.until(lambda: len(dashboard.bodies) == 2)


async def test_results_of_a_study_that_went_to_another_worker_are_not_uploaded(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        (part,) = dashboard.study(STUDY, "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            part.worker, part.files = "w-other", {"theirs": b"1"}
            finish(run, {"a.txt": b"a"})
            await bench.empty()
            assert part.files == {"theirs": b"1"}
            assert dashboard.ends() == []


async def test_what_is_declined_for_now_is_offered_again(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            pauses = iter([lambda: bench.pause("its owner came home")])
            dashboard.give("a", b"{}")
            dashboard.before["/configs/a"] = lambda: next(pauses, lambda: None)()
            await dashboard.until(lambda: ("GET", "/configs/a") in dashboard.asked)
            beats = dashboard.workers[MACHINE]["beats"]
            await dashboard.until(lambda: dashboard.workers[MACHINE]["beats"] >= beats + 5)
            assert len(bench.attempts.ledger) == 0
            assert dashboard.ends() == []
            bench.pause("")
            finish(await bench.host.next_run())
            await dashboard.until(lambda: dashboard.ends() == ["finished"])


async def test_a_dashboard_that_answers_no_heartbeat_is_left_and_found_again(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard, open_bench(tmp_path, dashboard.url, "shipped") as bench:
        await dashboard.until(lambda: MACHINE in dashboard.workers)
        dashboard.stumbles["/api/heartbeat"] = [Answer(500)] * 4
        await dashboard.until(lambda: not dashboard.stumbles["/api/heartbeat"])
        beats = dashboard.workers[MACHINE]["beats"]
        await dashboard.until(lambda: dashboard.workers[MACHINE]["beats"] > beats)
        assert bench.ends
        assert not any(end.final for end in bench.ends)
        assert "HTTP 500" in bench.ends[0].sentence


def test_its_features_are_the_truth() -> None:
    features = DIALECTS["goliat"].features
    assert (features.push, features.many, features.cancel, features.streaming) == (False, False, False, False)
    assert (features.progress, features.resume, features.token) == (True, True, False)
