"""The dashboard for tests does what its contract says of the real one, bad habits included."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard


@pytest.fixture
async def dashboard() -> AsyncIterator[Dashboard]:
    async with open_dashboard() as dashboard:
        yield dashboard


@pytest.fixture
async def client(dashboard: Dashboard) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=dashboard.url, trust_env=False) as client:
        yield client


async def beat(client: httpx.AsyncClient, machine: str) -> None:
    reply = await client.post("/api/heartbeat", json={"machineId": machine})
    assert reply.json()["success"] is True


async def tell(client: httpx.AsyncClient, machine: str, **message: Any) -> httpx.Response:
    return await client.post("/api/gui-update", json={"machineId": machine, "message": message, "timestamp": 1.0})


async def test_heartbeats_need_a_machine_and_make_a_row(client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/heartbeat", json={})).status_code == 400
    assert (await client.get("/api/heartbeat", params={"ipAddress": "box"})).status_code == 404
    await beat(client, "box")
    row = (await client.get("/api/heartbeat", params={"ipAddress": "box"})).json()
    assert (row["id"], row["isOffline"]) == ("w-1", False)


@pytest.mark.parametrize("body", [{}, {"machineId": "box"}, {"machineId": "box", "message": {}}, [], "x"])
async def test_an_update_needs_a_machine_and_a_type(client: httpx.AsyncClient, body: object) -> None:
    assert (await client.post("/api/gui-update", json=body)).status_code == 400


async def test_planned_assignments_come_once_in_both_shapes(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    dashboard.give("a", b"1")
    dashboard.give("b", b"2", flat=True)
    assert (await client.get("/api/assignment")).status_code == 400
    replies = [(await client.get("/api/assignment", params={"machineId": "box"})).json() for _ in range(3)]
    assert replies[0]["assignment"]["id"] == "a"
    assert "assigned" not in replies[1]
    assert replies[2] == {"assigned": False}
    assert (await client.get(replies[1]["config_url"])).content == b"2"


async def test_anybody_can_claim_what_is_running(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    (part,) = dashboard.study("x", {"n": 1})
    listed = (await client.get("/api/super-studies", params={"name": "x"})).json()
    assert [(each["name"], each["assignments"][0]["status"]) for each in listed] == [("x", "PENDING")]
    for machine, worker in (("one", "w-1"), ("two", "w-2")):
        reply = await client.post(f"/api/assignments/{part.id}/claim", json={"machineId": machine})
        assert (reply.status_code, reply.json()["workerId"], reply.json()["status"]) == (200, worker, "RUNNING")
    assert (await client.post(f"/api/assignments/{part.id}/claim", json={})).status_code == 400
    assert (await client.post("/api/assignments/none/claim", json={"machineId": "one"})).status_code == 500


async def test_each_upload_deletes_what_an_earlier_one_brought(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    (part,) = dashboard.study("x", {})
    path = f"/api/assignments/{part.id}/results"
    for name in ("a", "b"):
        reply = await client.post(path, data={"relativePath": "r"}, files=[("files", (name, name.encode()))])
        assert reply.json() == {"success": True, "filesUploaded": 1, "files": [name]}
    assert part.files == {"b": b"b"}
    assert (await client.post(path, files=[("other", ("c", b"c"))])).status_code == 400
    assert (await client.post("/api/assignments/none/results", files=[("files", ("c", b"c"))])).status_code == 404


async def test_finished_completes_the_first_that_runs_and_an_error_leaves_it(
    dashboard: Dashboard, client: httpx.AsyncClient
) -> None:
    first, second = dashboard.study("x", {}, {})
    for part in (first, second):
        await client.post(f"/api/assignments/{part.id}/claim", json={"machineId": "box"})
    await tell(client, "box", type="fatal_error", message="no")
    assert (dashboard.workers["box"]["status"], first.status) == ("ERROR", "RUNNING")
    await tell(client, "box", type="overall_progress", current=1, total=2)
    assert dashboard.workers["box"]["status"] == "RUNNING"
    await tell(client, "box", type="finished", exit_code=1)
    assert dashboard.workers["box"]["status"] == "IDLE"
    assert [first.status, second.status] == ["COMPLETED", "RUNNING"]
    assert dashboard.ends() == ["fatal_error", "finished"]


async def test_it_can_be_away_and_stumble(dashboard: Dashboard) -> None:
    async with Http(dashboard.url) as http:

        async def trouble() -> Trouble:
            with pytest.raises(Trouble) as caught:
                await http.json("POST", "/api/heartbeat", body={"machineId": "box"})
            return caught.value

        dashboard.stumbles["/api/heartbeat"] = [Answer(503), "drop"]
        assert (await trouble()).status == 503
        assert dashboard.workers == {}
        assert (await trouble()).status == 0
        assert dashboard.workers["box"]["beats"] == 1, "it acted, and its answer was lost"
        dashboard.away = True
        assert (await trouble()).status == 0
        assert dashboard.workers["box"]["beats"] == 1
        dashboard.away = False
        assert (await http.json("POST", "/api/heartbeat", body={"machineId": "box"}))["success"] is True


async def test_what_it_does_not_know_is_an_error_with_a_code(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nothing")).json() == {"error": "not found", "code": "NOT_FOUND"}
