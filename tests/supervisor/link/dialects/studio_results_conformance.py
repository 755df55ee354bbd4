"""What every worker that speaks `studio-worker-v1` has to do with results: none is lost, and none is told twice.

Use: as `StudioWorkerCases`, in a class that inherits `StudioResultCases`. Where a name of a case has `server_has_lost`
in it, the worker has to have little patience for acknowledgements.
"""

from __future__ import annotations

import pytest
import trio

from supervisor.testing_studio import Job, Rules, StudioServer, open_studio_server
from tests.supervisor.link.dialects.studio_worker_conformance import Start, WorkerUnderTest, cut, enqueue, works


async def finished_away(server: StudioServer, worker: WorkerUnderTest, kind: str = "llm") -> Job:
    """A job whose run ends while there is no session; from then on nothing is offered by itself."""
    job = enqueue(server, kind)
    run = await worker.next_run()
    await server.until(lambda: server.past[0].accepted, "accept")
    server.offering, server.stalling = False, 0
    server.welcoming = trio.Event()  # the next session stays closed until the run has ended
    await cut(server, server.past[0])
    run.finish()
    await server.until(lambda: len(server.past) > 1, "the next socket")
    server.welcoming.set()
    return job


class StudioResultCases:
    """Every case is one rule of the contract, or one thing that has gone wrong somewhere."""

    @pytest.fixture
    async def server(self):
        async with open_studio_server(Rules(again_s=0.05)) as server:
            server.goods["speech.wav"] = b"RIFF"
            yield server

    # ---- uploads and acknowledgements

    @pytest.mark.parametrize("troubles", [[500, 500], [503, 401], [0] * 8, [0, 500, 0, 502, 0]])
    async def test_an_upload_that_fails_is_tried_again(
        self, server: StudioServer, start: Start, troubles: list[int]
    ) -> None:
        """Two answers that are no yes are borne; a connection that breaks (0) is no answer."""
        server.approving = True
        server.uploads.extend(troubles)
        async with start(server) as worker:
            job = enqueue(server, "image")
            (await worker.next_run()).finish()
            await server.ended(job)
            await worker.empty()
            assert not (await server.session()).said("fail")
        assert (job.state, job.ends, job.file, job.attempts) == ("done", 1, b"file content", 0)

    @pytest.mark.parametrize("answers", [[500] * 3, [500, 503, 429], [404], [410], [400], [413]])
    async def test_an_upload_that_is_refused_fails_the_job_and_the_worker_gets_the_next_one(
        self, server: StudioServer, start: Start, answers: list[int]
    ) -> None:
        """Said nothing, the server would hold the job for this session, and offer it nothing more."""
        server.approving, server.offering = True, False
        server.uploads.extend(answers)
        async with start(server) as worker:
            session = await server.session()
            job = enqueue(server, "image")
            server.offering = True
            run = await worker.next_run()
            server.offering = False
            run.finish(b"refused")
            await server.until(lambda: job.error, "that it failed")
            assert str(answers[-1]) in job.error
            other = enqueue(server, "llm")
            job.not_before, server.offering = float("inf"), True
            (await worker.next_run()).finish()
            await server.ended(other)
            again = answers != [413]  # too large is too large for everybody
            assert [frame["retryable"] for frame in session.said("fail")] == [again]
            if again:
                job.not_before = 0
                (await worker.next_run()).finish(b"taken")  # what was refused is not what is told now
            await server.ended(job)
            await worker.empty()
            assert (other.state, job.state, job.file) == ("done", *(("done", b"taken") if again else ("failed", None)))
            await works(server, session)
        assert not server.uploads

    async def test_a_refused_result_is_kept_until_the_server_has_heard_that_the_job_failed(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        server.uploads.extend([500] * 3)
        server.swallowed["fail"] = 1
        async with start(server) as worker:
            job = enqueue(server, "image")
            (await worker.next_run()).finish()
            await server.until(lambda: server.past and server.past[0].said("fail"), "fail")
            await cut(server, server.past[0])
            await server.ended(job)  # without another run
            await worker.empty()
        assert (job.state, job.ends, job.file, job.attempts) == ("done", 1, b"file content", 1)
        assert len(server.past) == 2

    @pytest.mark.parametrize("answers", [[-500], [500, -502], [500, 500, -500]])
    async def test_an_upload_that_was_taken_and_answered_with_trouble_is_no_second_end(
        self, server: StudioServer, start: Start, answers: list[int]
    ) -> None:
        """A proxy may lose the answer. The next try is a conflict; after the last one `fail` may cost the session."""
        server.approving = True
        server.uploads.extend(answers)
        async with start(server) as worker:
            job = enqueue(server, "image")
            (await worker.next_run()).finish()
            await server.ended(job)
            other = enqueue(server, "llm")
            (await worker.next_run()).finish()
            await server.ended(other)
        assert [(each.state, each.ends, each.attempts) for each in (job, other)] == [("done", 1, 0)] * 2
        assert job.file == b"file content"
        assert len(server.past) == (2 if len(answers) == 3 else 1)

    async def test_an_upload_without_its_claim_is_forgotten(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        server.uploads.extend([409] * 2)
        async with start(server) as worker:
            job = enqueue(server, "image")
            (await worker.next_run()).finish()
            await worker.empty()
            session = await server.session()
            assert not session.said("fail"), "it would cost the session"
            await works(server, session)
            assert job.ends == 0

    @pytest.mark.parametrize("end", ["completeJson", "fail"])
    async def test_an_end_that_the_server_has_lost_is_no_wedge(
        self, server: StudioServer, start: Start, end: str
    ) -> None:
        """Said again in the same session it might break the rules; the next session is told, or the job comes back."""
        server.approving = True
        server.swallowed[end] = 1
        server.rules = Rules(again_s=0.05, attempts=1000)
        async with start(server) as worker:
            job = enqueue(server, "llm")
            run = await worker.next_run()
            if end == "fail":
                run.fail("out_of_memory")
                run = await worker.next_run()
            run.finish()
            await server.ended(job)
            await worker.empty()
        assert (job.state, job.ends, server.swallowed[end]) == ("done", 1, 0)
        assert len(server.past) > 1

    # ---- nothing is lost, and nothing is done twice

    async def test_a_job_goes_on_over_a_dropped_socket_and_is_taken_up_again(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            for kind in ("llm", "image"):
                job = enqueue(server, kind)
                run = await worker.next_run()
                number = len(server.past)
                await server.until(lambda job=job: server.past[-1].accepted, "accept")
                await cut(server, server.past[-1])
                again = await server.session(number)
                await server.until(lambda again=again: again.said("accept"), "that it is taken up again")
                run.finish()  # the one and only run
                await server.ended(job)
                await worker.empty()
                assert (job.state, job.ends) == ("done", 1)
                assert len(server.past) == number + 1

    async def test_a_result_that_was_not_acknowledged_is_told_again_where_it_is_taken(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = server.lenient = True
        async with start(server) as worker:
            job = await finished_away(server, worker)
            await server.ended(job)
            await worker.empty()
        assert (job.state, job.ends) == ("done", 1)
        assert len(server.past) == 2

    async def test_where_it_is_not_taken_it_costs_one_session_and_waits_for_its_job(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            job = await finished_away(server, worker)
            third = await server.session(2)
            assert len(server.past[1].said("completeJson")) == 1, "tried once"
            await server.until(lambda: len(third.said("heartbeat")) >= 3, "heartbeats")
            assert not third.said("completeJson"), "and not again by itself"
            job.not_before, server.offering = float("inf"), True
            other = enqueue(server, "audio_stt")  # what waits is in nobody's way
            (await worker.next_run()).finish()
            await server.ended(other)
            job.not_before = 0
            await server.ended(job)  # without another run
            await worker.empty()
        assert (job.state, job.ends) == ("done", 1)
        assert len(server.past) == 3

    async def test_after_a_kill_in_the_middle_the_job_is_done_from_the_beginning(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            job = enqueue(server, "image")
            await worker.next_run()
            await server.until(lambda: server.past[0].accepted, "accept")
        async with start(server) as worker:
            (await worker.next_run()).finish()
            await server.ended(job)
            await worker.empty()
        assert (job.state, job.ends) == ("done", 1)
        assert len(server.past) == 2, "and no session was lost for what the first life held"

    async def test_after_a_kill_before_the_result_went_out_it_needs_no_other_run(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        server.uploads.extend([0] * 100_000)
        async with start(server) as worker:
            job = enqueue(server, "image")
            (await worker.next_run()).finish(b"of the first life")
            await server.until(lambda: len(server.uploads) < 100_000 - 3, "uploads that break")
        async with start(server) as worker:
            second = await server.session(1)
            await server.until(lambda: second.said("accept"), "that it is taken up again")
            server.uploads.clear()
            await server.ended(job)
            await worker.empty()
        assert (job.state, job.ends, job.file) == ("done", 1, b"of the first life")

    async def test_a_file_that_was_made_while_the_claim_was_gone_waits_for_its_job(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            job = await finished_away(server, worker, "image")
            await server.until(lambda: server.conflicts, "an upload that is not wanted now")
            job.not_before, server.offering = float("inf"), True
            other = enqueue(server, "image")  # what waits is in nobody's way
            (await worker.next_run()).finish(b"another")
            await server.ended(other)
            job.not_before = 0
            await server.ended(job)  # without another run
            await worker.empty()
        assert (job.state, job.ends, job.file) == ("done", 1, b"file content")
        assert len(server.past) == 2, "and no session was lost for it"
