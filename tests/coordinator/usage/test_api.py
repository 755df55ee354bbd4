"""GET /v1/usage against a running coordinator."""

from __future__ import annotations

import csv
import io
import itertools
from typing import Any

import httpx
import pytest

from coordinator.testing import Running
from protocol.work import FreeResult

_names = itertools.count()


@pytest.fixture
def admin(served: Running) -> dict[str, str]:
    return {"authorization": f"Bearer {served.coordinator.keys.create('admin')}"}


@pytest.fixture
def model(http: httpx.Client, serve: Any) -> str:
    """A model that two jobs have used."""

    def script(job: Any) -> None:
        job.started()
        job.complete(FreeResult(), {"completion_tokens": 4, "audio_seconds": 0.5, "compute_ms": 250})

    name = f"=used-{next(_names)}"
    serve(script, name, "x-used")
    for _ in range(2):
        assert http.post("/v1/jobs", json={"kind": "x-used", "model": name, "wait": 50}).status_code == 200
    return name


def mine(rows: list[dict[str, Any]], model: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["model"] == model]
    return row


def test_a_client_sees_what_its_tenant_used(http: httpx.Client, model: str) -> None:
    found = http.get("/v1/usage", params={"group_by": "model,kind"}).json()
    assert found["object"] == "list"
    assert found["group_by"] == ["model", "kind"]
    row = mine(found["data"], model)
    assert (row["kind"], row["jobs"], row["succeeded"], row["failed"]) == ("x-used", 2, 2, 0)
    assert (row["tokens_out"], row["audio_s"], row["gpu_s"]) == (8, 1.0, 0.5)


def test_another_tenant_sees_nothing_of_it(served: Running, http: httpx.Client, model: str) -> None:
    other = {"authorization": f"Bearer {served.coordinator.keys.create('client', tenant='elsewhere')}"}
    assert http.get("/v1/usage", params={"group_by": "model"}, headers=other).json()["data"] == []
    refused = http.get("/v1/usage", params={"tenant": "default"}, headers=other)
    assert refused.status_code == 403
    assert "elsewhere" in refused.json()["error"]["message"]


def test_an_admin_sees_all_tenants(served: Running, http: httpx.Client, admin: dict[str, str], model: str) -> None:
    rows = http.get("/v1/usage", params={"group_by": "tenant,worker,model"}, headers=admin).json()["data"]
    row = mine(rows, model)
    assert row["tenant"] == "default"
    assert row["worker"].startswith("fake-")
    of_nobody = http.get("/v1/usage", params={"tenant": "nobody"}, headers=admin).json()
    assert of_nobody["data"] == []


@pytest.mark.parametrize(
    ("parameters", "headers"), [({"format": "csv"}, {}), ({}, {"accept": "text/csv;q=1, text/plain"})]
)
def test_csv_is_a_download_without_formulas(
    http: httpx.Client, model: str, parameters: dict[str, str], headers: dict[str, str]
) -> None:
    answer = http.get("/v1/usage", params={"group_by": "model", **parameters}, headers=headers)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"].startswith('attachment; filename="usage-')
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(answer.text, newline=""))}
    assert rows[f"'{model}"]["jobs"] == "2"


@pytest.mark.parametrize(
    "parameters",
    [{"from": "yesterday"}, {"to": "2020-01-00"}, {"group_by": "id"}, {"format": "xml"}, {"by": "day"}],
)
def test_what_is_asked_wrongly_is_named(http: httpx.Client, parameters: dict[str, str]) -> None:
    answer = http.get("/v1/usage", params=parameters)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(parameters))
