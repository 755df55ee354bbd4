"""What those who judge a cluster excuse: a worker that is lost in an outage, by what happened to its replica."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, cast

import pytest

from tests.chaos import replicas_clients
from tests.chaos.replicas_clients import OUTAGE_S, STANDING_S, SimClient
from tests.chaos.replicas_crowd import Ledger
from tests.chaos.replicas_rig import Cluster

HERE, THERE, GONE = "http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"
SHORT_S, LONG_S = OUTAGE_S + 1.0, OUTAGE_S + STANDING_S + 1.0


@pytest.mark.parametrize(
    ("outage", "seats", "silence_s", "excused"),
    [
        (False, {THERE}, 0.0, True),
        (True, {THERE}, 0.0, False),
        (True, {THERE}, SHORT_S, False),
        (True, {THERE}, LONG_S, True),
        (True, {THERE, GONE}, SHORT_S, True),
    ],
)
def test_a_worker_is_lost_in_an_outage_only_with_its_replica_or_on_a_machine_that_is_too_busy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outage: bool,
    seats: set[str],
    silence_s: float,
    excused: bool,
) -> None:
    monkeypatch.setattr(replicas_clients, "STEP_S", 0.0)
    ledger = Ledger()
    cluster = Cluster(tmp_path, "", cast("Any", [_Door(), _Door()]))
    for replica, url in zip(cluster.replicas, (HERE, THERE), strict=True):
        replica.url = url
        (tmp_path / f"replica{replica.number}.log").write_text("No beat reached the database for 99.0 s; before\n")

    async def lost(*_what: Any) -> tuple[str, str]:
        ledger.seats["job_1"] |= seats
        if silence_s:
            with (tmp_path / "replica1.log").open("a") as log:
                log.write(f"No beat reached the database for {silence_s:.1f} s; and so on\n")
        return "job_1", "worker_lost"

    client = SimClient("c", cluster, ledger, random.Random(1), 9)
    monkeypatch.setattr(client, "_answered", lost)
    begun = asyncio.Event() if outage else None
    assert asyncio.run(client._stay_at(cluster.replicas[0], "x", 9, streamed=True, begun=begun))
    assert (ledger.wrong == []) is excused


class _Door:
    port = 1
