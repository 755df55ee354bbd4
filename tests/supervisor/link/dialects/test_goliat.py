"""Our worker obeys what every GOLIAT worker obeys, in both protocols; and what only one of them asks for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from supervisor.link.dialects import DIALECTS
from supervisor.link.dialects.goliat import MOST_NOT_FOUND
from supervisor.suspend import Clocks
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard
from tests.supervisor.link.dialects.goliat_conformance import GoliatWorkerCases, Start, read
from tests.supervisor.link.dialects.goliat_rig import (
    FAST,
    MACHINE,
    STUDY,
    Bench,
    exit_with,
    finish,
    open_bench,
    params,
)


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
            told = await dashboard.until(lambda: [text for text in dashboard.lines() if "are kept on box in" in text])
            assert read(told[0], "a.txt") == b"a"


async def test_results_that_a_proxy_does_not_find_a_place_for_are_delivered_later(tmp_path: Path) -> None:
    page = Answer(404, b"<html>404 page not found</html>")
    async with open_dashboard() as dashboard:
        (part,) = dashboard.study(STUDY, "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            dashboard.stumbles[f"/api/assignments/{part.id}/results"] = [page, page]
            dashboard.stumbles["/api/super-studies/s1/assignments"] = [page, page]
            finish(run, {"a.txt": b"hours of work"})
            await dashboard.until(dashboard.ends)
            await bench.empty()
            assert (part.status, part.files) == ("COMPLETED", {"a.txt": b"hours of work"})
            assert dashboard.ends() == ["finished"]


async def test_results_that_a_dashboard_never_finds_a_place_for_are_kept_and_the_next_study_comes(
    tmp_path: Path,
) -> None:
    async with open_dashboard() as dashboard:
        first, second = dashboard.study(STUDY, "{}", "{}")
        path = f"/api/assignments/{first.id}/results"
        dashboard.stumbles[path] = [Answer(404, b"<html>404 page not found</html>")] * 1000
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            finish(await bench.next_run(), {"a.txt": b"hours of work"})
            finish(await bench.next_run(), {"a.txt": b"b"})
            await dashboard.until(lambda: second.status == "COMPLETED")
            await bench.empty()
            (message,) = dashboard.messages("fatal_error")
            assert read(message["message"], "a.txt") == b"hours of work"
            assert dashboard.asked.count(("POST", path)) == MOST_NOT_FOUND
            assert (first.status, second.files) == ("RUNNING", {"a.txt": b"b"})


async def test_results_of_a_study_that_is_gone_are_kept(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        (part,) = dashboard.study(STUDY, "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            dashboard.before[f"/api/assignments/{part.id}/results"] = dashboard.studies.clear  # after the look
            finish(run, {"a.txt": b"a"})
            await bench.empty()
            assert dashboard.ends() == []
            (kept,) = (tmp_path / "goliat" / "results").rglob("a.txt")
            assert kept.read_bytes() == b"a"


@pytest.mark.parametrize("flat", [True, False])
async def test_results_from_before_a_change_of_the_protocol_are_kept_and_hold_nothing_up(
    tmp_path: Path, flat: bool
) -> None:
    async with open_dashboard() as dashboard:
        dashboard.give("a", b"{}", flat=flat)
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            run = await bench.next_run()
            dashboard.away = True
            finish(run, {"a.txt": b"a"})
            await bench.until(lambda: any(claim.end for claim in bench.attempts.ledger))
        dashboard.away = False
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            await bench.empty()
            assert dashboard.ends() == []
            (kept,) = (tmp_path / "goliat" / "results").rglob("a.txt")
            assert kept.read_bytes() == b"a"


async def test_a_study_that_ends_after_a_long_outage_is_completed_all_the_same(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        first, second = dashboard.study(STUDY, "{}", "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            dashboard.away = True
            finish(run, {"a.txt": b"a"})
            await bench.until(lambda: bench.ends)
            dashboard.later_s += 3600  # the next thing that it hears of us comes from a new worker
            dashboard.away = False
            following = await bench.next_run()
            assert len(dashboard.known.rows) == 2
            assert (first.status, first.files) == ("COMPLETED", {"a.txt": b"a"})
            assert (second.status, second.worker) == ("RUNNING", dashboard.workers[MACHINE].id)
            assert dashboard.ends() == ["finished", "finished"]
            finish(following)
            await bench.empty()
            await dashboard.until(lambda: second.status == "COMPLETED")


async def test_a_study_whose_end_meets_two_long_outages_is_completed_all_the_same(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        (part,) = dashboard.study(STUDY, "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            dashboard.away = True
            finish(run, {"a.txt": b"a"})
            await bench.until(lambda: bench.ends)
            ends = 0

            def again() -> None:  # once the assignment was claimed again: the end does not get through
                nonlocal ends
                if len(dashboard.known.rows) == 2 and part.worker == dashboard.workers[MACHINE].id:
                    ends, dashboard.away = len(bench.ends), True
                    dashboard.stumbles["/api/gui-update"] = [Answer(503)]

            dashboard.before["/api/gui-update"] = again
            dashboard.later_s += 3600
            dashboard.away = False
            await dashboard.until(lambda: dashboard.away)
            await bench.until(lambda: len(bench.ends) > ends)
            assert (part.status, part.worker) == ("RUNNING", dashboard.workers[MACHINE].id)
            dashboard.later_s += 3600
            dashboard.away = False
            await bench.empty()
            assert len(dashboard.known.rows) == 3
            assert (part.status, part.files) == ("COMPLETED", {"a.txt": b"a"})


async def test_a_dashboard_may_hand_what_runs_to_our_new_row(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        (part,) = dashboard.study(STUDY, "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            run = await bench.next_run()
            dashboard.later_s += 3600
            await dashboard.until(lambda: len(dashboard.known.rows) == 2)
            part.worker = dashboard.workers[MACHINE].id
            finish(run, {"a.txt": b"a"})
            await dashboard.until(dashboard.ends)
            await bench.empty()
            assert (part.status, part.files) == ("COMPLETED", {"a.txt": b"a"})


async def test_whoever_deletes_the_worker_has_its_assignments_done_again(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        done, failed = dashboard.study(STUDY, "{}", "{}")
        async with open_bench(tmp_path, dashboard.url, "shipped") as bench:
            finish(await bench.next_run(), {"a.txt": b"1"})
            exit_with(await bench.next_run(), 1)
            await bench.empty()
            assert [done.status, failed.status] == ["COMPLETED", "RUNNING"]
            async with httpx.AsyncClient(base_url=dashboard.url, trust_env=False) as person:
                (row,) = (await person.get("/api/workers")).json()
                assert (await person.delete(f"/api/workers/{row['id']}")).status_code == 200
            for content in (b"2", b"3"):
                finish(await bench.next_run(), {"a.txt": content})
            await dashboard.until(lambda: dashboard.ends().count("finished") >= 3)
            await bench.empty()
            assert [(each.status, each.files["a.txt"]) for each in (done, failed)] == [
                ("COMPLETED", b"2"),
                ("COMPLETED", b"3"),
            ]
            await bench.until(lambda: not list((tmp_path / "goliat" / "assignments").glob("*.json")))


async def test_an_assignment_that_came_without_an_id_gets_one(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        dashboard.give("a", b"{}", flat=True)
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            run = await bench.next_run()
            id_ = params(run)["env"]["GOLIAT_ASSIGNMENT_ID"]
            finish(run, {"a.txt": b"a"})
            await dashboard.until(dashboard.ends)
            assert dashboard.ends() == ["finished"]
            assert (tmp_path / "goliat" / "results" / f"{id_}.1" / "a.txt").read_bytes() == b"a"


async def test_what_is_declined_for_now_is_offered_again(tmp_path: Path) -> None:
    async with open_dashboard() as dashboard:
        async with open_bench(tmp_path, dashboard.url, "planned") as bench:
            pauses = iter([lambda: bench.pause("its owner came home")])
            dashboard.give("a", b"{}")
            dashboard.before["/configs/a"] = lambda: next(pauses, lambda: None)()
            await dashboard.until(lambda: ("GET", "/configs/a") in dashboard.asked)
            beats = dashboard.workers[MACHINE].beats
            await dashboard.until(lambda: dashboard.workers[MACHINE].beats >= beats + 5)
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
        beats = dashboard.workers[MACHINE].beats
        await dashboard.until(lambda: dashboard.workers[MACHINE].beats > beats)
        assert bench.ends
        assert not any(end.final for end in bench.ends)
        assert "HTTP 500" in bench.ends[0].sentence


def test_its_features_are_the_truth() -> None:
    features = DIALECTS["goliat"].features
    assert (features.push, features.many, features.cancel, features.streaming) == (False, False, False, False)
    assert (features.progress, features.resume, features.token) == (True, True, False)
