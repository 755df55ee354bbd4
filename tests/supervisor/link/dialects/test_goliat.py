"""Our worker obeys what every GOLIAT worker obeys, in both protocols; and what only one of them asks for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisor.testing_goliat import Dashboard
from tests.supervisor.link.dialects.goliat_conformance import GoliatWorkerCases, Start
from tests.supervisor.link.dialects.goliat_rig import Bench, open_bench


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
