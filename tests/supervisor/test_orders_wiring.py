"""What the control API asks of a supervisor, put together and asked over its real socket."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.config import load
from supervisor.control.client import RequestFailed, ask
from supervisor.control.server import open_control
from supervisor.control.snapshot import Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.link.ledger import Ledger
from supervisor.observe.ring import Ring
from supervisor.orders_wiring import Around, complete, orders
from supervisor.pausing import Pausing
from supervisor.pulls import Pulls
from supervisor.reload import Reloader


class Attempts:
    """No job runs."""

    ledger = Ledger()

    def give_back(self, job: str, attempt: int, reason: str) -> None:
        raise AssertionError("nothing runs")


class Served:
    """A supervisor's control API, without the engines."""

    def __init__(self, folder: Path, nursery: trio.Nursery, file: bool = True) -> None:
        self.config, self.path = folder / "worker.toml", folder / "s"
        self.config.write_text('[worker]\nstate_dir = "state"\n[log]\nlevel = "info"\n')
        state = folder / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        self.pausing = Pausing(state / "holds.json")
        self.done: list[object] = []
        settings = load(self.config, {})
        reloader = Reloader(self.config, settings, {}, environ={}) if file else None
        around = Around(
            pausing=self.pausing,
            drain=lambda *asked: self.done.append(asked),
            ending=lambda: None,
            hurry=lambda: self.done.append("now"),
            gpus=lambda: ["GPU-1"],
            engines=None,
            attempts=Attempts(),
            pulls=Pulls(self.config, nursery) if file else None,
            config=self.config if file else None,
            reloader=reloader,
            state=state,
            name="box",
            connected=lambda: "",
        )
        shown = Snapshot(version="1", worker="box", pid=os.getpid())
        self.surface = complete(
            Surface(lambda: explained(shown), orders(around), lambda: ["x 1"], lines=Ring()),
            around,
            lambda: settings,
            lambda _count: (),
            lambda: {("presence", ""): "input 3 s ago"},
        )

    async def ask(self, method: str, route: str, body: object = None) -> Any:
        return await trio.to_thread.run_sync(lambda: ask(self.path, method, route, body))


@pytest.fixture
async def served(tmp_path, nursery) -> Any:
    made = Served(tmp_path, nursery)
    async with open_control(made.path, made.surface):
        yield made


async def test_orders_over_the_socket_act_and_name_who_gave_them(served, caplog):
    with caplog.at_level(logging.INFO, "supervisor.control.routes_act"):
        hold = (await served.ask("POST", "/v1/gpus/0/cordon", {"for_s": 60, "reason": "loud"}))["hold"]
        assert (hold["gpu"], hold["reason"]) == ("GPU-1", "loud")
        assert [each.gpu for each in served.pausing.holds().items] == ["GPU-1"]
        assert (await served.ask("POST", "/v1/gpus/GPU-1/uncordon", {}))["lifted"]
        with pytest.raises(RequestFailed, match="there are GPU-1"):
            await served.ask("POST", "/v1/gpus/GPU-9/cordon", {})
        with pytest.raises(RequestFailed, match="No job 'j-1' runs here"):
            await served.ask("POST", "/v1/jobs/j-1/cancel", {})
        await served.ask("POST", "/v1/shutdown", {"reason": "now"})
    assert served.done == [("now", False), "now"]
    who = f"order of uid {os.geteuid()}, pid {os.getpid()}"
    said = [record.getMessage() for record in caplog.records if record.name.endswith("routes_act")]
    assert [message.startswith(who) for message in said] == [True] * 5
    assert sum("refused: " in message for message in said) == 2


async def test_a_reload_answers_with_what_it_did(served):
    assert (await served.ask("POST", "/v1/reload", {}))["ok"] is True
    served.config.write_text('[worker]\nnmae = "x"\n[limtis]\n')
    told = await served.ask("POST", "/v1/reload", {})
    assert (told["ok"], len(told["problems"])) == (False, 2)
    served.config.write_text('[worker]\nstate_dir = "state"\n[log]\nlevel = "debug"\n')
    told = await served.ask("POST", "/v1/reload", {})
    assert [change["key"] for change in told["restart"]] == ["log.level"], "nobody here takes it up"


async def test_the_bundle_comes_over_the_socket(served):
    reader = await trio.open_unix_socket(str(served.path))
    async with reader:
        await reader.send_all(b"GET /v1/diagnostics HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.fail_after(60):
            data = b"".join([part async for part in reader])
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    assert json.loads(files["bulkhead-diagnostics/about.json"])["running"] is True
    assert json.loads(files["bulkhead-diagnostics/hold_findings.json"]) == {"presence": "input 3 s ago"}
    assert files["bulkhead-diagnostics/metrics.txt"] == b"x 1"


async def test_it_is_examined_over_the_socket(served, monkeypatch):
    from supervisor import doctor_run

    monkeypatch.setattr(
        doctor_run, "CHECKS", [check for check in doctor_run.CHECKS if check.name in ("config", "state")]
    )
    told = await served.ask("GET", "/v1/doctor")
    assert (told["ok"], told["running"]) == (True, True)


async def test_without_a_file_what_needs_one_is_refused(tmp_path, nursery):
    made = Served(tmp_path, nursery, file=False)
    async with open_control(made.path, made.surface):
        for route, body in (
            ("/v1/reload", {}),
            ("/v1/models/remove", {"name": "x"}),
            ("/v1/register", {"url": "ws://127.0.0.1:9"}),
        ):
            with pytest.raises(RequestFailed, match="without a file"):
                await made.ask("POST", route, body)


async def test_a_pull_over_the_socket_is_a_stream_that_ends(served):
    stream = await trio.open_unix_socket(str(served.path))
    body = b'{"source": "nothing-of-that-name"}'
    async with stream:
        head = (
            b"POST /v1/models/pull HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        await stream.send_all(head % len(body) + body)
        with trio.fail_after(60):
            data = b"".join([part async for part in stream])
    assert b"text/event-stream" in data
    assert b"event: failed\ndata: " in data
