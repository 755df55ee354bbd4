"""The dashboard for tests does what its contract says of the real one, bad habits included."""

from __future__ import annotations

import io
import zipfile
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
    assert replies[1].keys() == {"config", "config_url", "split_index"}
    assert replies[2] == {"assigned": False}
    assert (await client.get(replies[1]["config_url"])).content == b"2"


async def test_anybody_can_claim_what_is_running(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    (part,) = dashboard.study("x", {"n": 1})
    for machine in ("one", "two"):
        await beat(client, machine)
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
    assert (dashboard.workers["box"].status, first.status) == ("ERROR", "RUNNING")
    await tell(client, "box", type="overall_progress", current=1, total=2)
    assert dashboard.workers["box"].status == "RUNNING"
    await tell(client, "box", type="finished", exit_code=1)
    assert dashboard.workers["box"].status == "IDLE"
    assert [first.status, second.status] == ["COMPLETED", "RUNNING"]
    assert dashboard.ends() == ["fatal_error", "finished"]


async def test_a_study_is_put_up_and_listed_newest_first(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    dashboard.study("old", {})
    pending = [{"splitConfig": {"n": n}, "status": "PENDING"} for n in range(2)]
    body = {"name": "new", "description": "d", "baseConfig": {}, "assignments": pending}
    reply = await client.post("/api/super-studies", json=body)
    assert reply.status_code == 200
    study = reply.json()
    assert (study["name"], study["totalAssignments"], study["status"]) == ("new", 2, "PENDING")
    rows = (await client.get(f"/api/super-studies/{study['id']}/assignments")).json()
    assert [(row["index"], row["splitConfig"], row["status"]) for row in rows] == [
        (0, {"n": 0}, "PENDING"),
        (1, {"n": 1}, "PENDING"),
    ]
    await client.post(f"/api/assignments/{rows[0]['id']}/claim", json={"machineId": "box"})
    await tell(client, "box", type="finished")
    listed = (await client.get("/api/super-studies")).json()
    assert [each["name"] for each in listed] == ["new", "old"]
    assert (listed[0]["completedAssignments"], listed[0]["masterProgress"], listed[0]["status"]) == (1, 50, "RUNNING")
    assert (await client.get("/api/super-studies/none/assignments")).json() == []


@pytest.mark.parametrize("body", [[], {}, {"name": "x"}, {"assignments": []}, {"name": "x", "assignments": [1]}])
async def test_a_study_needs_a_name_and_assignments(client: httpx.AsyncClient, body: object) -> None:
    assert (await client.post("/api/super-studies", json=body)).status_code == 400


async def test_results_are_listed_read_and_downloaded(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    first, _second = dashboard.study("x", {}, {})
    results = "/api/super-studies/s1/results"
    for path in (f"{results}/list", f"{results}/download", "/api/super-studies/none/results/list"):
        assert (await client.get(path)).status_code == 404
    files = [("files", ("b.csv", b"1,2")), ("files", ("a.bin", b"\x00\xff"))]
    await client.post(f"/api/assignments/{first.id}/results", data={"relativePath": "near/700"}, files=files)
    (folder,) = (await client.get(f"{results}/list")).json()["tree"]
    assert (folder["name"], folder["type"], folder["children"][0]["path"]) == ("near", "directory", "near/700")
    assert [(each["path"], each["size"]) for each in folder["children"][0]["children"]] == [
        ("near/700/a.bin", 2),
        ("near/700/b.csv", 3),
    ]
    assert (await client.get(f"{results}/file", params={"path": "near/700/a.bin"})).content == b"\x00\xff"
    assert (await client.get(f"{results}/file", params={"path": "a.bin"})).status_code == 404
    assert (await client.get(f"{results}/file")).status_code == 400
    reply = await client.get(f"{results}/download")
    assert reply.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(reply.content)) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == {
            "near/700/a.bin": b"\x00\xff",
            "near/700/b.csv": b"1,2",
        }


async def test_pictures_of_tabs_are_taken(dashboard: Dashboard, client: httpx.AsyncClient) -> None:
    picture = {"Near_Field": ("t.jpg", b"\xff\xd8", "image/jpeg")}
    assert (await client.post("/api/gui-screenshots", files=picture)).status_code == 400
    assert (await client.post("/api/gui-screenshots", data={"machineId": "box"}, files=picture)).status_code == 200
    assert dashboard.screenshots == {"box": {"Near_Field": b"\xff\xd8"}}


async def test_a_worker_that_is_deleted_leaves_all_its_assignments_to_others(
    dashboard: Dashboard, client: httpx.AsyncClient
) -> None:
    done, failed, other = dashboard.study("x", {}, {}, {})
    for machine in ("box", "den"):
        await beat(client, machine)
    await client.post(f"/api/assignments/{done.id}/claim", json={"machineId": "box"})
    await tell(client, "box", type="finished")
    await client.post(f"/api/assignments/{failed.id}/claim", json={"machineId": "box"})
    await client.post(f"/api/assignments/{other.id}/claim", json={"machineId": "den"})
    id_ = dashboard.workers["box"].id
    assert (await client.get(f"/api/workers/{id_}")).json()["worker"]["ipAddress"] == "box"
    assert (await client.delete(f"/api/workers/{id_}")).status_code == 200
    assert [(each.status, each.worker) for each in (done, failed)] == [("PENDING", None)] * 2
    assert (other.status, other.worker) == ("RUNNING", dashboard.workers["den"].id)
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"/api/workers/{id_}")).status_code == 404
    assert [each["ipAddress"] for each in (await client.get("/api/workers")).json()] == ["den"]


async def test_a_machine_that_was_silent_for_long_is_a_new_worker(
    dashboard: Dashboard, client: httpx.AsyncClient
) -> None:
    (part,) = dashboard.study("x", {})
    await client.post(f"/api/assignments/{part.id}/claim", json={"machineId": "box"})
    dashboard.later_s = 3600
    assert (await client.get("/api/workers")).json() == []
    await tell(client, "box", type="finished")
    assert (part.status, part.worker) == ("RUNNING", "w-1"), "it was said by another worker"
    listed = (await client.get("/api/workers", params={"includeStale": "true"})).json()
    assert [(each["id"], each["isStale"]) for each in listed] == [("w-2", False), ("w-1", True)]
    assert (await client.get("/api/heartbeat", params={"ipAddress": "box"})).json()["id"] == "w-2"


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
        assert dashboard.workers["box"].beats == 1, "it acted, and its answer was lost"
        dashboard.away = True
        assert (await trouble()).status == 0
        assert dashboard.workers["box"].beats == 1
        dashboard.away = False
        assert (await http.json("POST", "/api/heartbeat", body={"machineId": "box"}))["success"] is True


async def test_what_it_does_not_know_is_an_error_with_a_code(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nothing")).json() == {"error": "not found", "code": "NOT_FOUND"}
