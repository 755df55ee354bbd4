"""What a worker that speaks `studio-worker-v1` does with a claim whose model it does not have: it fetches the model.

Use: as `StudioWorkerCases`; `start` opens a worker that fetches models from 127.0.0.1, too, and keeps at most 10 MiB.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor.testing_studio import Job, Rules, StudioServer, open_studio_server
from tests.supervisor.link.dialects.studio_worker_conformance import TASKS, Start, cut
from tests.supervisor.stand_in_hub import Site, serving

DATA = b"what the model has learned" * 1000


def source(url: str, sha256: str | None = None, **more: Any) -> dict[str, Any]:
    """The `modelSource` of one file."""
    digest = hashlib.sha256(DATA).hexdigest() if sha256 is None else sha256
    file = {"role": "model", "url": url, "filename": "m.bin", "sha256": digest, "approxBytes": len(DATA), **more}
    return {"engine": "synthetic", "files": [file], "cliDefaults": {}}


def enqueue(server: StudioServer, where: dict[str, Any], model: str = "synthetic-new") -> Job:
    """A job that brings its model."""
    return server.enqueue(TASKS["llm"], model, modelSource=where)


class StudioDownloadCases:
    """Every case is one way that a fetch can go."""

    @pytest.fixture
    async def server(self):
        async with open_studio_server(Rules(again_s=0.05, attempts=1)) as server:
            yield server

    @pytest.fixture
    def site(self) -> Iterator[Site]:
        with serving(Site()) as site:
            site.files["/m"] = DATA
            yield site

    async def test_the_claim_is_accepted_held_while_the_model_comes_and_run(
        self, server: StudioServer, site: Site, start: Start
    ) -> None:
        site.cut_after["/m"] = [1000]
        site.hold = threading.Event()
        async with start(server) as worker:
            session = await server.session()
            job = enqueue(server, source(f"{site.url}/m"))
            await server.until(lambda: session.accepted and site.holding.is_set(), "accept, and a fetch")
            await server.until(
                lambda: any(beat.get("currentJobId") == job.id for beat in session.said("heartbeat")), "a heartbeat"
            )
            site.hold.set()
            (await worker.next_run()).finish()
            await server.ended(job)
            assert (job.state, job.ends, len(session.said("accept"))) == ("done", 1, 1)
            assert site.ranges_asked() == ["", "bytes=1000-"], "what was cut is resumed"
            again = enqueue(server, source(f"{site.url}/m"))
            (await worker.next_run()).finish()
            await server.ended(again)
            assert len(site.asked) == 2, "and kept"
            await server.until(
                lambda: "synthetic-new" in session.capabilities["supportedModels"], "the model is announced"
            )

    @pytest.mark.parametrize(
        ("path", "digest", "words"),
        [("/m", "0" * 64, "sha256"), ("/none", None, "404"), ("/away", None, "no public address")],
    )
    async def test_a_fetch_that_fails_fails_the_job_and_costs_no_session(
        self, server: StudioServer, site: Site, start: Start, path: str, digest: str | None, words: str
    ) -> None:
        site.redirects["/away"] = "https://169.254.169.254/latest/meta-data"
        async with start(server) as worker:
            session = await server.session()
            job = await server.ended(enqueue(server, source(f"{site.url}{path}", digest)))
            assert (job.state, words in job.error) == ("failed", True), job.error
            assert session.said("fail")[0]["retryable"] is True
            other = server.enqueue(TASKS["llm"], "llm-model")
            (await worker.next_run()).finish()
            await server.ended(other)
            assert len(server.past) == 1
            await worker.empty()

    @pytest.mark.parametrize(
        ("where", "words"),
        [
            (source("http://10.0.0.1/m"), "http needs a sha256 and a host"),
            (source("https://models.example/m", filename="../m"), "no plain file name"),
            (source("https://models.example/m", approxBytes=2**40), "more than this worker keeps"),
            ({**source("https://models.example/m"), "engine": "sd-cpp"}, "sd-cpp"),
            ({**source("https://models.example/m"), "files": [{"role": "model"}]}, "modelSource"),
        ],
    )
    async def test_what_can_never_be_fetched_is_rejected_before_it_is_accepted(
        self, server: StudioServer, start: Start, where: dict[str, Any], words: str
    ) -> None:
        async with start(server):
            session = await server.session()
            job = enqueue(server, where)
            await server.until(lambda: job.reasons, "a rejection")
            assert words in job.reasons[0]
            assert session.said("accept") == []

    async def test_a_session_that_breaks_during_a_fetch_costs_the_fetch_nothing(
        self, server: StudioServer, site: Site, start: Start
    ) -> None:
        server.rules = Rules(again_s=0.05, attempts=3)
        site.cut_after["/m"] = [1000]
        site.hold = threading.Event()
        async with start(server) as worker:
            session = await server.session()
            job = enqueue(server, source(f"{site.url}/m"))
            await server.until(lambda: session.accepted and site.holding.is_set(), "accept, and a fetch")
            await cut(server, session)
            second = await server.session(1)
            await server.until(lambda: second.accepted, "accepted again")
            site.hold.set()
            (await worker.next_run()).finish()
            await server.ended(job)
            assert (job.state, job.ends) == ("done", 1)
            assert site.ranges_asked() == ["", "bytes=1000-"]

    async def test_a_model_whose_owner_drains_its_worker_is_waited_for_elsewhere(
        self, server: StudioServer, site: Site, start: Start
    ) -> None:
        site.cut_after["/m"] = [1000]
        site.hold = threading.Event()
        async with start(server) as worker:
            session = await server.session()
            job = enqueue(server, source(f"{site.url}/m"))
            await server.until(lambda: session.accepted and site.holding.is_set(), "accept, and a fetch")
            worker.drain("its owner says so")
            await server.until(lambda: job.ends, "the job is given back")
            assert (job.error, session.said("fail")[0]["retryable"]) == ("The worker is stopping.", True)
            site.hold.set()
