"""The owner's orders over the real socket of a running supervisor."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest

from supervisor.control.client import RequestFailed

ROOT = Path(__file__).resolve().parents[2]
MODELS = """
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = { slots = 4, tokens = 20000, delay_ms = 25 }
"""
NAMES = frozenset({"synthetic", "synthetic-slow"})


@pytest.fixture
def rig(new_rig) -> Any:
    return new_rig(models=MODELS, want=NAMES, limits="drain_s = 600")


def raw(rig: Any, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """A request as no client of ours would make it; status and body."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(120)
        wire.connect(str(rig.state / "control.sock"))
        kind = b"Content-Type: application/json\r\n" if body else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode("latin-1")
        wire.sendall(head + kind + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        data = b""
        while part := wire.recv(65536):
            data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), rest


def running(rig: Any, rigs: Any, client: Any, count: int = 2) -> list[str]:
    ids = [rigs.submit(client, rigs.job(f"number {n}", 20000)) for n in range(count)]
    rigs.until(lambda: all(rigs.state_of(client, id_) == "running" for id_ in ids), "all jobs run")
    return ids


def test_a_job_is_cancelled_by_its_id_and_nothing_else_is(rig, rigs):
    client = rig.ready()
    first, second = running(rig, rigs, client)
    with pytest.raises(RequestFailed, match=first):
        rig.ask("POST", "/v1/jobs/no-such-job/cancel", {})
    assert rig.ask("POST", f"/v1/jobs/{first}/cancel", {"reason": "mine"})["cancelled"] == 1
    assert rigs.ended(client, first)["state"] in ("cancelled", "failed")
    assert rigs.state_of(client, second) == "running"
    with pytest.raises(RequestFailed):
        rig.ask("POST", f"/v1/jobs/{first}/cancel", {})
    rig.ask("POST", f"/v1/jobs/{second}/cancel", {})


def test_tricks_with_names_reach_nothing(rig, rigs):
    rig.ready()
    for name in ("..", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%00", "a%2fb", "%ff%fe", "x" * 3000, "%0d%0aX:%20y"):
        for path in (f"/v1/gpus/{name}/cordon", f"/v1/gpus/{name}/uncordon", f"/v1/jobs/{name}/cancel"):
            status, answer = raw(rig, "POST", path)
            assert status == 404, (path, status, answer[:200])
            assert json.loads(answer)["error"]["message"]
            assert len(answer) < 2000
    for name in ("../../etc", "--config=/etc/passwd", "\0", "a/b"):
        status, _answer = raw(rig, "POST", "/v1/models/remove", json.dumps({"name": name}).encode())
        assert status == 409
    assert rig.status()["holds"] == []
    assert "Traceback" not in rig.words()


def test_two_drains_agree_or_the_second_is_refused(rig, rigs):
    client = rig.ready()
    ids = running(rig, rigs, client)
    assert rig.ask("POST", "/v1/drain", {"reason": "first"})["draining"] == "first"
    assert rig.ask("POST", "/v1/drain", {"reason": "second"})["draining"] == "first"
    with pytest.raises(RequestFailed, match="after which the supervisor ends"):
        rig.ask("POST", "/v1/drain", {"restart": True})
    rig.ask("POST", "/v1/shutdown", {"reason": "no time"})
    # The drain would take much longer, as its jobs do.
    assert rig.process.wait(rigs.PATIENCE_S) == 0, rig.words()[-2000:]
    assert not rigs.processes_of(rig.folder)
    assert len(ids) == 2


def test_the_end_at_once_is_bounded_and_its_answer_arrives(rig, rigs):
    running(rig, rigs, rig.ready())  # for longer than anybody would wait
    assert rig.ask("POST", "/v1/shutdown", {"reason": "the power goes"})["draining"] == "the power goes"
    assert rig.process.wait(rigs.PATIENCE_S) == 0, rig.words()[-2000:]
    assert "order of uid" in rig.words()


def test_a_model_is_pulled_by_a_running_supervisor_and_taken_away_again(rig, rigs):
    rig.ready()
    chat = ROOT / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
    status, answer = raw(rig, "POST", "/v1/models/pull", json.dumps({"source": str(chat), "name": "mine"}).encode())
    assert status == 200
    assert b"event: plan" in answer
    assert b"event: done" in answer, answer
    assert 'name = "mine"' in rig.config.read_text()
    assert "mine is out of" in rig.ask("POST", "/v1/models/remove", {"name": "mine"})["message"]
    assert 'name = "mine"' not in rig.config.read_text()


def test_the_bundle_and_the_examination_of_a_running_supervisor(rig, rigs):
    client = rig.ready()
    secret = "a-prompt-that-nobody-may-see"
    client.post("/v1/chat/completions", json=rigs.chat(secret))
    told = rig.ask("GET", "/v1/doctor")
    assert told["running"] is True
    by_name = {one["name"]: one for one in told["checks"]}
    assert by_name["supervisor"]["verdict"] == "ok"
    assert by_name["coordinator"]["verdict"] == "ok"
    assert "port" not in by_name, "its port is its own"
    status, data = raw(rig, "GET", "/v1/diagnostics")
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: archive.extractfile(member).read().decode() for member in archive}
    for name, text in files.items():
        assert secret not in text, name
        assert rig.key() not in text, name
    assert json.loads(files["bulkhead-diagnostics/status.json"])["worker"] == "box"
