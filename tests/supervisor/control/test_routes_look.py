"""Looking, by a real client over the owner's socket."""

from __future__ import annotations

import re

import msgspec
import pytest

from protocol import engine_wire as wire
from supervisor.control import routes
from supervisor.control.jobs_seen import JobBook
from supervisor.control.routes import ROUTES
from supervisor.control.server import open_control
from supervisor.control.snapshot import ModelView, Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake.holds import Hold, Source
from tests.supervisor.control.reader import asked

CHAT = ModelSpec(
    name="chat",
    engine=EngineSpec(name="llm", module="engines.llm", python="python"),
    model=wire.Model(name="chat", kinds=("llm",), files={"model": "/m/chat.gguf"}, device="cuda", devices=("GPU-1",)),
    vram_bytes=5,
)
SHOWN = Snapshot(
    version="1.2",
    holds=(Hold(source=Source.OPERATOR, reason="a game", since=1000.0),),
    models=(ModelView(name="chat", engine="llm", state="cold", waits="waits for 3 GiB"),),
)


@pytest.fixture
def book():
    made = JobBook()
    for number in range(5):
        made.began(f"j{number}", 1, "llm", "chat" if number % 2 else "draw")
    made.entered("j1", 1, "run")
    made.ended("j0", 1, "failed", "engine_crashed", {})
    made.began("j0", 2, "llm", "draw")
    made.began("with space/ä", 1, "llm", "chat")
    return made


@pytest.fixture
async def path(tmp_path, box, book):
    surface = Surface(lambda: explained(SHOWN), box.acts, specs=lambda: [CHAT], jobs=book, log_level=lambda: "info")
    path = tmp_path / "looked.sock"
    async with open_control(path, surface):
        yield path


async def test_jobs(path):
    status, _headers, seen = await asked(path, "GET", "/v1/jobs")
    assert status == 200
    assert [(job["job"], job["state"]) for job in seen["jobs"]][:2] == [("j1", "running"), ("j2", "waiting")]
    assert seen["jobs"][-1]["fault"] == "engine_crashed"
    assert seen["counts"] == {"waiting": 5, "running": 1, "succeeded": 0, "failed": 1, "cancelled": 0}
    for query, jobs in (
        ("state=running", ["j1"]),
        ("state=failed&model=draw", ["j0"]),
        ("model=chat&limit=2", ["j1", "j3"]),
        ("kind=image", []),
    ):
        found = (await asked(path, "GET", f"/v1/jobs?{query}"))[2]["jobs"]
        assert [job["job"] for job in found] == jobs, query


@pytest.mark.parametrize("query", ["state=ready", "limit=0", "limit=1001", "limit=x", "sate=running"])
async def test_a_wrong_question_about_jobs(path, query):
    status, _headers, answer = await asked(path, "GET", f"/v1/jobs?{query}")
    assert status == 400
    assert query.partition("=")[0] in answer["error"]["message"]


async def test_one_job(path):
    status, _headers, seen = await asked(path, "GET", "/v1/jobs/j0")
    assert status == 200
    assert [(one["attempt"], one["state"]) for one in seen["attempts"]] == [(2, "waiting"), (1, "ended")]
    assert (await asked(path, "GET", "/v1/jobs/with%20space%2F%C3%A4"))[2]["job"] == "with space/ä"
    status, _headers, answer = await asked(path, "GET", "/v1/jobs/j99")
    assert status == 404
    assert "j99" in answer["error"]["message"]


async def test_models_as_configured_and_as_they_are(path):
    (seen,) = (await asked(path, "GET", "/v1/models"))[2]["models"]
    assert (seen["name"], seen["engine"], seen["kinds"], seen["gpus"]) == ("chat", "llm", ["llm"], ["GPU-1"])
    assert (seen["files"], seen["vram_bytes"]) == ({"model": "/m/chat.gguf"}, 5)
    assert (seen["state"], seen["waits"]) == ("cold", "waits for 3 GiB")


async def test_holds_with_their_reason(path):
    seen = (await asked(path, "GET", "/v1/holds"))[2]
    assert [hold["source"] for hold in seen["holds"]] == ["operator"]
    assert seen["state"] == "paused"
    assert "a game" in seen["why"]
    assert (seen["sights"], seen["coming"]) == ([], [])


async def test_the_log_level(path):
    assert (await asked(path, "GET", "/v1/log-level"))[2] == {"level": "info"}


@pytest.mark.parametrize("target", ["/v1/jobs", "/v1/jobs/j", "/v1/log-level", "/v1/events", "/v1/logs", "/v1/config"])
async def test_what_a_supervisor_does_not_keep_it_says(box, target):
    status, _headers, answer = await asked(box.path, "GET", target)
    assert status == 503
    assert answer["error"]["message"]


def test_the_table_of_routes_is_told():
    """The docstring of routes.py names every route with its methods, and no other."""
    rows = re.findall(r"^(GET|POST|PATCH|DELETE)((?:, (?:GET|POST|PATCH|DELETE))*) +(/v1/\S+)", routes.__doc__, re.M)
    told = {path: {first, *more.removeprefix(", ").split(", ")} - {""} for first, more, path in rows}
    assert told == {path: set(methods) for path, methods in ROUTES.items()}


def test_no_route_hides_another():
    """A part that varies stands only where no other route has a word."""
    shapes = [tuple("*" if part[:1] == "{" else part for part in path.split("/")) for path in ROUTES]
    assert len(set(shapes)) == len(shapes)
    assert msgspec.json.encode(sorted(ROUTES))
