"""Our worker obeys what every studio worker obeys; and what is ours alone: nothing is lost over sessions and lives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from supervisor.testing_studio import Rules, StudioServer, open_studio_server
from tests.supervisor.link.dialects.studio_results_conformance import StudioResultCases, finished_away
from tests.supervisor.link.dialects.studio_rig import FAST, TASKS, Bench, open_bench
from tests.supervisor.link.dialects.studio_worker_conformance import Start, StudioWorkerCases, enqueue

SHORT = msgspec.structs.replace(FAST, pace=msgspec.structs.replace(FAST.pace, silent_s=0.4, connect_s=0.4))
# No silence of a slow machine ends a session.
PATIENT = msgspec.structs.replace(FAST, pace=msgspec.structs.replace(FAST.pace, silent_s=120.0, connect_s=120.0))
IMPATIENT = msgspec.structs.replace(FAST, ack_s=1.0)


async def test_what_it_waits_for_is_told_until_it_has_come(tmp_path: Path) -> None:
    async with open_studio_server() as server, open_bench(tmp_path, server.url) as bench:
        await server.until(lambda: bench.spoken.waits_for, "a sentence")
        [request] = server.requests
        assert "waiting for approval: ask the studio's admin" in bench.spoken.waits_for
        assert request in bench.spoken.waits_for
        server.approve(request)
        await server.session()
        assert bench.spoken.waits_for == ""


async def test_a_studio_in_trouble_is_no_reason_to_ask_a_person(tmp_path: Path) -> None:
    async with open_studio_server() as server, open_bench(tmp_path, server.url) as bench:
        await server.until(lambda: bench.spoken.waits_for, "a sentence")
        server.create_status = 500
        server.requests.clear()
        await server.until(lambda: not bench.spoken.waits_for, "no sentence")


async def test_a_job_that_its_owner_gives_back_is_done_elsewhere(tmp_path: Path) -> None:
    async with open_studio_server(Rules(again_s=0.05)) as server:
        server.approving = True
        async with open_bench(tmp_path, server.url, play=False) as bench:
            session = await server.session()
            job = server.enqueue(TASKS["llm"], "llm-model")
            await bench.next_run()
            bench.attempts.give_back(job.id, 1, "I need it")
            await server.until(lambda: session.worker in job.refused_by, "a rejection for good")
            assert session.said("fail")[0]["retryable"] is True
            assert "owner of the worker" in session.said("fail")[0]["error"]
            assert (job.state, job.attempts) == ("queued", 1)
            await bench.empty()


@pytest.mark.parametrize("kind", ["llm", "image"])
async def test_a_drain_keeps_a_result_that_waits_for_its_job(tmp_path: Path, kind: str) -> None:
    """It ends at once, as nothing is offered to a worker that drains; the next life needs no other run."""
    async with open_studio_server(Rules(again_s=0.05)) as server:
        server.approving = True
        async with open_bench(tmp_path, server.url, timing=PATIENT, play=False) as bench:
            job = await finished_away(server, bench, kind)
            await server.until(lambda: server.conflicts or len(server.past) > 2, "that it is not wanted now")
            bench.drain("an update")
            await bench.empty()
        number, server.offering = len(server.past), True
        async with open_bench(tmp_path, server.url, timing=PATIENT, play=False) as bench:
            await server.session(number)
            await server.ended(job)
            await bench.empty()
        assert (job.state, job.ends) == ("done", 1)


async def test_an_offer_that_the_answer_to_its_upload_has_overtaken_is_not_run_again(tmp_path: Path) -> None:
    """They come over two connections: the job is done by then, and nobody wants it a second time."""
    async with open_studio_server(Rules(again_s=0.05)) as server:
        server.approving = True
        async with open_bench(tmp_path, server.url, timing=PATIENT, play=False) as bench:
            server.uploads.extend([0] * 10**6)  # it breaks off, and is tried again without end
            job = await finished_away(server, bench, "image")
            session = await server.session(1)
            job.state, job.worker = "claimed", session.worker  # its offer is on the way
            server.uploads.clear()
            await server.ended(job)
            await bench.empty()
            await session.send("offer", claim=job.claim)
            await server.until(lambda: session.said("reject") or session.said("accept"), "an answer")
            assert [frame.get("code") for frame in session.said("reject")] == ["busy"]
            assert len(bench.attempts.ledger) == 0
            other, server.offering = enqueue(server, "image"), True
            (await bench.next_run()).finish()
            await server.ended(other)
            await bench.empty()
        assert [(each.state, each.ends) for each in (job, other)] == [("done", 1)] * 2


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    # Short deadlines only where they are the point: elsewhere a busy machine would meet them.
    name = request.node.name
    short = "stalled" in name or "silent_after" in name
    timing = IMPATIENT if "server_has_lost" in name else SHORT if short else FAST

    @contextlib.asynccontextmanager
    async def start(server: StudioServer) -> AsyncIterator[Bench]:
        async with open_bench(tmp_path, server.url, timing=timing, play=False) as bench:
            yield bench

    return start


class TestOurWorker(StudioWorkerCases):
    pass


class TestOurResults(StudioResultCases):
    pass
