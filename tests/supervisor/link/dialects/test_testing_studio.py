"""The studio that ships for tests obeys what every studio obeys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from supervisor.testing_studio import Rules, StudioServer, open_studio_server
from tests.supervisor.link.dialects.studio_conformance import JobSeen, StudioServerCases


class Stub:
    """The owner's side of the stub."""

    dead_s = 0.5

    def __init__(self, server: StudioServer) -> None:
        self.server, self.url = server, server.url
        self._numbers = itertools.count(1)

    async def admit(self) -> tuple[str, str]:
        return self.server.admit(f"w-{next(self._numbers)}")

    async def delete(self, worker: str) -> None:
        await self.server.delete(worker)

    async def approve(self, request: str) -> None:
        self.server.approve(request)

    async def reject(self, request: str, reason: str) -> None:
        self.server.reject(request, reason)

    async def enqueue(self, task: dict[str, Any], model: str, vram_gb: float = 0.0) -> str:
        return self.server.enqueue(task, model, vramGbEstimate=vram_gb).id

    async def job(self, job: str) -> JobSeen:
        seen = self.server.jobs[job]
        return JobSeen(state=seen.state, result=seen.result, file=seen.file, error=seen.error)


class TestStudioForTests(StudioServerCases):
    @pytest.fixture
    async def studio(self, request: pytest.FixtureRequest):
        # Impatient only where that is the point: elsewhere a busy machine would be taken for a dead worker.
        impatient = Rules(sweep_s=0.1, dead_s=Stub.dead_s)
        async with open_studio_server(impatient if "silent_worker" in request.node.name else Rules()) as server:
            yield Stub(server)


async def test_requests_for_registration_are_limited():
    async with open_studio_server(Rules(requests=0)) as server:
        status, _ = server.create(_asked(b'{"registrationSecretHash":"","capabilities":{"machineName":"x"}}'))
        assert status == 429


def _asked(body: bytes) -> Any:
    from supervisor.testing_studio_http import Exchange

    return Exchange(method="POST", path="/graphics/api/workers/register-request", headers={}, body=body)
