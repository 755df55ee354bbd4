"""Our worker fetches models as every studio worker that does has to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisor.testing_studio import StudioServer
from tests.supervisor.link.dialects.studio_download_conformance import StudioDownloadCases
from tests.supervisor.link.dialects.studio_rig import Bench, admitted, open_bench
from tests.supervisor.link.dialects.studio_worker_conformance import Start


class TestOurWorker(StudioDownloadCases):
    @pytest.fixture
    def start(self, tmp_path: Path) -> Start:
        @contextlib.asynccontextmanager
        async def start(server: StudioServer) -> AsyncIterator[Bench]:
            admitted(tmp_path, server)
            async with open_bench(tmp_path, server.url, play=False, downloads=True) as bench:
                yield bench

        return start
