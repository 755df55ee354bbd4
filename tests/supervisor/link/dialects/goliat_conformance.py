"""What a GOLIAT worker has to do, in both protocols: a suite that any worker of ours can be held against.

Use: a class in a test module that inherits `GoliatWorkerCases` and has the fixtures `protocol` ("planned" or "shipped")
and `start`, which opens a worker against a dashboard. test_goliat.py does so.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from supervisor.testing_goliat import Answer, Dashboard, Part, open_dashboard
from tests.supervisor.link.dialects.goliat_rig import MACHINE, STUDY, Bench, exit_with, finish, line, params

Start = Callable[[Dashboard], contextlib.AbstractAsyncContextManager[Bench]]
CONFIG = b'{"phantom": "thelonious", "frequency_mhz": 700}'


class Case:
    """A dashboard of one protocol."""

    def __init__(self, dashboard: Dashboard, protocol: str) -> None:
        self.dashboard, self.protocol = dashboard, protocol
        self.shipped = protocol == "shipped"

    def give(self, *ids: str) -> list[Part]:
        """Have these assignments done; the parts, which only the shipped protocol has."""
        if self.shipped:
            return self.dashboard.study(STUDY, *([CONFIG.decode()] * len(ids)))
        for id_ in ids:
            self.dashboard.give(id_, CONFIG)
        return []

    async def ended(self, count: int = 1) -> list[str]:
        """Wait for so many ends; their types."""
        found = await self.dashboard.until(lambda: ends if len(ends := self.dashboard.ends()) >= count else None)
        return list(found)

    async def beats(self, count: int) -> None:
        """Wait for so many heartbeats."""
        until = self.dashboard.workers[MACHINE].beats + count
        await self.dashboard.until(lambda: self.dashboard.workers[MACHINE].beats >= until)


def read(sentence: str, name: str) -> bytes:
    """A file of the folder that a sentence ends with."""
    return (Path(sentence.rpartition(" in ")[2].rstrip(".")) / name).read_bytes()


class GoliatWorkerCases:
    """See the module."""

    @pytest.fixture
    async def case(self, protocol: str) -> AsyncIterator[Case]:
        async with open_dashboard() as dashboard:
            yield Case(dashboard, protocol)

    # ---- presence

    async def test_heartbeats_name_the_machine_and_go_on_while_a_study_runs(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            await case.beats(3)
            assert case.dashboard.bodies[0]["machineId"] == MACHINE
            assert ("hostname" in case.dashboard.bodies[0]) == case.shipped
            finish(run)
            assert await case.ended() == ["finished"]

    async def test_idle_it_asks_again_and_again(self, case: Case, start: Start) -> None:
        path = "/api/super-studies" if case.shipped else "/api/assignment"
        async with start(case.dashboard):
            await case.dashboard.until(lambda: case.dashboard.asked.count(("GET", path)) >= 3)

    async def test_a_paused_worker_asks_for_nothing_and_goes_on_when_it_may(self, case: Case, start: Start) -> None:
        async with start(case.dashboard) as bench:
            await case.dashboard.until(lambda: MACHINE in case.dashboard.workers)
            bench.pause("its owner is at home")
            await case.beats(3)  # a question that was under way is answered by then
            case.give("a")
            await case.beats(3)
            assert len(bench.attempts.ledger) == 0
            bench.pause("")
            finish(await bench.next_run())
            assert await case.ended() == ["finished"]

    # ---- a study

    async def test_the_study_gets_its_config_and_its_environment(self, case: Case, start: Start) -> None:
        parts = case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            assert run.request.kind == "command"
            assert run.request.inputs["config"].read_bytes() == CONFIG
            id_ = parts[0].id if case.shipped else "a"
            assert params(run)["env"] == {"GOLIAT_ASSIGNMENT_ID": id_, "GOLIAT_REUPLOAD_RESULTS": "false"}

    async def test_only_variables_that_the_operator_allows_are_passed(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            bench.limits = {"args": [], "env": ["GOLIAT_ASSIGNMENT_ID"]}
            bench.worker.announce()
            run = await bench.next_run()
            assert set(params(run)["env"]) == {"GOLIAT_ASSIGNMENT_ID"}

    async def test_one_study_at_a_time_and_the_next_after_the_end_of_the_last(self, case: Case, start: Start) -> None:
        case.give("a", "b")
        async with start(case.dashboard) as bench:
            first = await bench.next_run()
            await case.beats(3)
            assert len(bench.attempts.ledger) == 1
            finish(first)
            second = await bench.next_run()
            assert case.dashboard.ends() == ["finished"]
            finish(second)
            assert await case.ended(2) == ["finished", "finished"]
            await bench.empty()

    async def test_lines_and_progress_arrive_in_order_before_the_end(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            line(run, 1, "setting up")
            finish(run, lines=("setting up", '{"type": "overall_progress", "current": 1, "total": 2}', "ERROR: no"))
            await case.ended()
            told = [message["type"] for message in (each.message for each in case.dashboard.told)]
            assert told[-1] == "finished"
            assert case.dashboard.messages("overall_progress") == [
                {"type": "overall_progress", "current": 1, "total": 2}
            ]
            lines = [each for message in case.dashboard.messages("log_batch") for each in message["logs"]]
            assert [each["message"] for each in lines[-2:]] == ["setting up", "ERROR: no"]
            assert lines[-1]["log_type"] == "error"
            numbers = [message["sequence"] for message in case.dashboard.messages("log_batch")]
            assert numbers == list(range(1, len(numbers) + 1))

    async def test_a_study_cannot_say_itself_how_it_ended(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            exit_with(run, 1, ('{"type": "finished", "exit_code": 0}',))
            assert await case.ended() == ["fatal_error"]
            await bench.empty()
            assert case.dashboard.ends() == ["fatal_error"]

    # ---- results

    async def test_all_results_of_an_assignment_are_delivered_before_the_end(
        self, case: Case, start: Start, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        parts = case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            files = {"sar.csv": b"1,2\n", 'odd "name".bin': bytes(range(256)) * 9000, "empty": b""}
            finish(run, files)
            assert await case.ended() == ["finished"]
            await bench.empty()
            if case.shipped:
                assert {name.replace("%22", '"'): data for name, data in parts[0].files.items()} == files
                assert parts[0].uploads == 1
                assert parts[0].relative_path == "split_0"
                assert parts[0].status == "COMPLETED"
            else:
                told = next(text for text in case.dashboard.lines() if "are kept on box in" in text)
                assert read(told, "sar.csv") == b"1,2\n"

    async def test_an_upload_that_fails_is_tried_again_and_costs_no_second_run(self, case: Case, start: Start) -> None:
        parts = case.give("a")
        if not case.shipped:
            pytest.skip("the planned protocol has no place for results")
        path = f"/api/assignments/{parts[0].id}/results"
        case.dashboard.stumbles[path] = [Answer(500), Answer(503), "drop", Answer(429, b"", (("retry-after", "0"),))]
        async with start(case.dashboard) as bench:
            finish(await bench.next_run(), {"a.txt": b"a"})
            assert await case.ended() == ["finished"]
            assert parts[0].files == {"a.txt": b"a"}
            await bench.empty()

    async def test_results_that_are_refused_for_good_are_kept_and_the_study_is_not_done(
        self, case: Case, start: Start
    ) -> None:
        parts = case.give("a")
        if not case.shipped:
            pytest.skip("the planned protocol has no place for results")
        case.dashboard.stumbles[f"/api/assignments/{parts[0].id}/results"] = [Answer(413)]
        async with start(case.dashboard) as bench:
            finish(await bench.next_run(), {"a.txt": b"a"})
            assert await case.ended() == ["fatal_error"]
            (message,) = case.dashboard.messages("fatal_error")
            assert read(message["message"], "a.txt") == b"a"
            assert parts[0].status == "RUNNING"

    # ---- failures

    @pytest.mark.parametrize("code", [1, 2, 255])
    async def test_another_exit_code_is_a_failure_that_is_never_finished(
        self, case: Case, start: Start, code: int
    ) -> None:
        parts = case.give("a")
        async with start(case.dashboard) as bench:
            exit_with(await bench.next_run(), code, ("Traceback", "ValueError: no phantom"))
            assert await case.ended() == ["fatal_error"]
            await bench.empty()
            assert case.dashboard.ends() == ["fatal_error"]
            assert str(code) in case.dashboard.messages("fatal_error")[0]["message"]
            assert "ValueError: no phantom" in case.dashboard.lines()
            if case.shipped:
                assert parts[0].status == "RUNNING"
            assert len(bench.host._running) == 0

    async def test_out_of_memory_is_tried_again_and_may_then_succeed(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            exit_with(await bench.next_run(), 42)
            again = await bench.next_run()
            assert again.request.inputs["config"].read_bytes() == CONFIG
            finish(again, {"a.txt": b"a"})
            assert await case.ended() == ["finished"]
            (message,) = case.dashboard.messages("memory_error")
            assert message["exit_code"] == 42
            await bench.empty()

    async def test_out_of_memory_is_tried_again_three_times_at_most(self, case: Case, start: Start) -> None:
        case.give("a")
        async with start(case.dashboard) as bench:
            for _ in range(4):
                exit_with(await bench.next_run(), 42)
            assert await case.ended() == ["fatal_error"]
            assert len(case.dashboard.messages("memory_error")) == 4
            assert "4 times" in case.dashboard.messages("fatal_error")[0]["message"]
            await bench.empty()

    async def test_after_a_failure_it_is_idle_and_takes_the_next(self, case: Case, start: Start) -> None:
        case.give("a", "b")
        async with start(case.dashboard) as bench:
            exit_with(await bench.next_run(), 1)
            finish(await bench.next_run())
            assert (await case.ended(2))[:2] == ["fatal_error", "finished"]

    async def test_a_failed_study_is_never_completed_by_the_end_of_another(self, case: Case, start: Start) -> None:
        parts = case.give("a", "b", "c", "d")
        async with start(case.dashboard) as bench:
            exit_with(await bench.next_run(), 1)
            exit_with(await bench.next_run(), 2)
            finish(await bench.next_run())
            await bench.next_run()  # not asked for before all that is settled
        async with start(case.dashboard) as bench:  # a later life knows as well
            await case.dashboard.until(lambda: case.dashboard.ends().count("fatal_error") == 3)
            case.give("e")
            finish(await bench.next_run())
            await bench.empty()
            if case.shipped:
                assert [part.status for part in parts] == ["RUNNING", "RUNNING", "COMPLETED", "RUNNING"]

    # ---- a dashboard that is away, slow or odd

    async def test_a_dashboard_that_goes_away_in_the_middle_loses_neither_lines_nor_results(
        self, case: Case, start: Start
    ) -> None:
        parts = case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            case.dashboard.away = True
            line(run, 1, "while it was away")
            finish(run, {"a.txt": b"a"})
            await bench.until(lambda: bench.ends)
            case.dashboard.away = False
            assert await case.ended() == ["finished"]
            assert "while it was away" in case.dashboard.lines()
            if case.shipped:
                assert parts[0].files == {"a.txt": b"a"}
            await bench.empty()

    async def test_throttled_it_waits_and_does_not_leave(self, case: Case, start: Start) -> None:
        throttled = Answer(429, {"error": "slow down", "code": "RATE_LIMIT_EXCEEDED"}, (("Retry-After", "0"),))
        case.dashboard.stumbles["/api/gui-update"] = [throttled] * 5
        case.dashboard.stumbles["/api/heartbeat"] = [Answer(200, {"success": True}), *[throttled] * 10]
        case.give("a")
        async with start(case.dashboard) as bench:
            finish(await bench.next_run())
            assert await case.ended() == ["finished"]
            await case.dashboard.until(lambda: not case.dashboard.stumbles["/api/heartbeat"])
            assert bench.ends == []

    @pytest.mark.parametrize(
        "odd", [b"<html>", b"[]", b"null", b"\xff\xfe", b'{"assigned": true}', b'{"assignment": 7}', b'[{"id": {}}, 3]']
    )
    async def test_odd_replies_never_end_the_poller(self, case: Case, start: Start, odd: bytes) -> None:
        for path in ("/api/assignment", "/api/super-studies", "/api/super-studies/s1/assignments"):
            case.dashboard.stumbles[path] = [Answer(200, odd), Answer(404), Answer(500, odd), Answer(418, odd)]
        case.give("a")
        async with start(case.dashboard) as bench:
            finish(await bench.next_run())
            assert await case.ended() == ["finished"]
            assert bench.ends == []

    async def test_a_finished_whose_answer_was_lost_is_told_again_before_the_next_is_asked_for(
        self, case: Case, start: Start
    ) -> None:
        parts = case.give("a", "b")
        async with start(case.dashboard) as bench:
            first = await bench.next_run()
            await case.dashboard.until(lambda: case.dashboard.lines())
            case.dashboard.stumbles["/api/gui-update"] = ["drop"]
            finish(first)
            second = await bench.next_run()
            assert case.dashboard.ends() == ["finished", "finished"]
            if case.shipped:
                assert [part.status for part in parts] == ["COMPLETED", "RUNNING"]
            finish(second)
            assert await case.ended(3) == ["finished"] * 3

    # ---- its own end

    async def test_an_assignment_that_was_under_way_is_told_as_failed_by_the_next_life(
        self, case: Case, start: Start
    ) -> None:
        case.give("a", "b")
        async with start(case.dashboard) as bench:
            await bench.next_run()
        async with start(case.dashboard) as bench:
            assert await case.ended() == ["fatal_error"]
            finish(await bench.next_run())
            assert (await case.ended(2))[:2] == ["fatal_error", "finished"]
            await bench.empty()

    async def test_a_result_that_was_kept_is_delivered_by_the_next_life(self, case: Case, start: Start) -> None:
        parts = case.give("a")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            case.dashboard.away = True
            finish(run, {"a.txt": b"a"})
            await bench.until(lambda: any(claim.end for claim in bench.attempts.ledger))
        case.dashboard.away = False
        async with start(case.dashboard) as bench:
            assert await case.ended() == ["finished"]
            if case.shipped:
                assert parts[0].files == {"a.txt": b"a"}
                assert parts[0].status == "COMPLETED"
            await bench.empty()

    async def test_draining_it_finishes_what_it_has_and_asks_for_nothing(self, case: Case, start: Start) -> None:
        case.give("a", "b")
        async with start(case.dashboard) as bench:
            run = await bench.next_run()
            bench.worker.drain("it is stopped")
            finish(run)
            await bench.empty()
            assert case.dashboard.ends() == ["finished"]
            await case.beats(3)
            assert len(bench.attempts.ledger) == 0
