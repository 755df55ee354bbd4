"""Our worker obeys what every studio worker obeys; and what is ours alone: nothing is lost over sessions and lives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from supervisor.testing_studio import StudioServer
from tests.supervisor.link.dialects.studio_rig import FAST, Bench, open_bench
from tests.supervisor.link.dialects.studio_worker_conformance import Start, StudioWorkerCases

SHORT = msgspec.structs.replace(FAST, pace=msgspec.structs.replace(FAST.pace, silent_s=0.4, connect_s=0.4))


class TestOurWorker(StudioWorkerCases):
    @pytest.fixture
    def start(self, tmp_path: Path, request: pytest.FixtureRequest) -> Start:
        # Short deadlines only where they are the point: elsewhere a busy machine would meet them.
        timing = SHORT if "stalled" in request.node.name or "silent_after" in request.node.name else FAST

        @contextlib.asynccontextmanager
        async def start(server: StudioServer) -> AsyncIterator[Bench]:
            async with open_bench(tmp_path, server.url, timing=timing, play=False) as bench:
                yield bench

        return start
