"""Our worker fetches models as every studio worker that does has to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest

from protocol import link_wire as wire
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects.studio_claims import Claims
from supervisor.link.dialects.studio_models import Models, Source
from supervisor.link.dialects.studio_offers import Facts
from supervisor.testing_studio import StudioServer
from tests.supervisor.link.dialects.studio_download_conformance import StudioDownloadCases
from tests.supervisor.link.dialects.studio_rig import TASKS, Bench, admitted, open_bench
from tests.supervisor.link.dialects.studio_worker_conformance import Start
from tests.supervisor.link.dialects.test_studio_claims import FakeSide


class TestOurWorker(StudioDownloadCases):
    @pytest.fixture
    def start(self, tmp_path: Path) -> Start:
        @contextlib.asynccontextmanager
        async def start(server: StudioServer) -> AsyncIterator[Bench]:
            admitted(tmp_path, server)
            async with open_bench(tmp_path, server.url, play=False, downloads=True) as bench:
                yield bench

        return start


class Fetching:
    """Stands for `Models`: what is fetched is told when the test says so."""

    kinds = ("video",)

    def __init__(self) -> None:
        self.here = False
        self.done: list[Callable[[str | None], None]] = []

    def missing(self, claim: frames.Claim, kind: str) -> Source | None:
        return None if self.here else Source(name=claim.model, kind=kind, slug="synthetic", files=())

    def begin(self, _source: Source, _job: str, done: Callable[[str | None], None]) -> None:
        self.done.append(done)


class Desk:
    """Claims between a side and a server that are both played."""

    def __init__(self) -> None:
        self.fetching = Fetching()
        self.side = FakeSide()
        self.sent: list[frames.Up] = []
        self.claims = Claims(
            Facts(machine="b", user=""),
            clock=lambda: 0.0,
            utc=lambda: "now",
            models=cast("Models", self.fetching),
        )
        self.session()

    def session(self) -> None:
        self.sent.clear()
        self.claims.begin(self.side, self.sent.append, self.side.hello())

    def offer(self, job: str) -> None:
        claim = {"jobId": job, "model": "new", "task": TASKS["llm"], "modelSource": {"engine": "synthetic"}}
        self.claims.hear(frames.read(json.dumps({"type": "offer", "claim": claim})))

    def told(self) -> list[str]:
        return [type(frame).__name__ for frame in self.sent]


def test_one_accept_for_a_claim_whose_model_was_fetched_and_others_are_told_to_wait():
    desk = Desk()
    assert "video" in desk.claims.capabilities.task_kinds
    desk.offer("j")
    assert (desk.told(), desk.claims.current_job, desk.side.held) == (["Accept"], "j", {})
    desk.offer("other")
    assert isinstance(desk.sent[-1], frames.Reject)
    assert desk.sent[-1].code == "busy"
    desk.fetching.done[0](None)
    assert list(desk.side.held) == [("j", 1)]
    desk.side.post(wire.Accept(), "j", 1)
    assert desk.told() == ["Accept", "Reject"]


def test_what_the_side_declines_after_the_fetch_has_failed_since_it_was_accepted():
    desk = Desk()
    desk.offer("j")
    desk.fetching.done[0](None)
    desk.side.post(wire.Decline(code="busy", reason="its pause lasts"), "j", 1)
    assert desk.sent[-1] == frames.Fail(job_id="j", error="its pause lasts", retryable=True)
    desk.claims.hear(frames.FailAck(job_id="j"))
    assert desk.claims.current_job == ""
    desk.offer("j")
    assert desk.told()[-1] == "Accept"


@pytest.mark.parametrize("problem", [None, "404"])
def test_a_fetch_that_ends_after_its_session_says_nothing_in_the_next(problem):
    desk = Desk()
    desk.offer("j")
    desk.claims.finish(violated=False)
    desk.session()
    desk.fetching.done[0](problem)
    assert (desk.told(), desk.side.held) == ([], {})
    desk.fetching.here = problem is None
    desk.offer("j")
    assert desk.told() == ([] if problem is None else ["Accept"])
    assert list(desk.side.held) == ([("j", 2)] if problem is None else [])


def test_a_drain_gives_the_claim_back_and_begins_no_other_fetch():
    desk = Desk()
    desk.offer("j")
    desk.side.post(wire.Draining(reason="SIGTERM"), "", 0)
    assert desk.sent[-1] == frames.Fail(job_id="j", error="The worker is stopping.", retryable=True)
    desk.claims.hear(frames.FailAck(job_id="j"))
    desk.fetching.done[0](None)
    assert desk.side.held == {}
    desk.offer("k")
    assert len(desk.fetching.done) == 1
    assert list(desk.side.held) == [("k", 1)], "the side declines it"
