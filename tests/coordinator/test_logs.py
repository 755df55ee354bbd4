"""Lines for people and programs, the line of a job, and the switches."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from coordinator import logs
from coordinator.records import JobRecord
from coordinator.testing import Running
from protocol.faults import Fault, FaultError, refuse


class Told(io.StringIO):
    """What this thread tells; with `everybody` also what the coordinator of other tests tells behind them."""

    everybody = False

    def write(self, text: str) -> int:
        if self.everybody or threading.current_thread() is threading.main_thread():
            return super().write(text)
        return len(text)


@pytest.fixture
def stream() -> Iterator[Told]:
    """Everything that is told goes here; afterwards all is as before."""
    root, disabled = logging.getLogger(), logs.access_log.disabled
    level = root.level
    out = Told()
    yield out
    for handler in [one for one in root.handlers if one.get_name() == "coordinator"]:
        root.removeHandler(handler)
    root.setLevel(level)
    logs.access_log.disabled = disabled
    for name in logs.CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)


def job(**fields: object) -> JobRecord:
    base = {"id": "job_1", "kind": "llm", "model": "m", "state": "succeeded", "tenant": "t", "attempt": 2}
    base |= {"created_ms": 1000, "started_ms": 1500, "finished_ms": 3000, "worker": "box", "key_id": "bk_ab"}
    return JobRecord(**{**base, "params": b"SECRET PROMPT", **fields})  # type: ignore[arg-type]


def test_a_json_line_has_the_supervisors_names(stream: io.StringIO) -> None:
    logs.set_up("json", stream=stream)
    logging.getLogger("here").warning("It is %d", 3, extra={"job": "j", "attempt": 1})
    line = json.loads(stream.getvalue())
    assert line.pop("ts").endswith("Z")
    assert line == {"level": "warning", "logger": "here", "message": "It is 3", "job": "j", "attempt": 1}


def test_a_text_line_cannot_be_broken(stream: io.StringIO) -> None:
    logs.set_up(stream=stream)
    logging.getLogger("here").info("Said.", extra={"model": 'a b"\n2026 ERROR x'})
    assert stream.getvalue().count("\n") == 1
    assert 'INFO here: Said. model="a b\\"?2026 ERROR x"' in stream.getvalue()


def test_a_traceback_is_one_field(stream: io.StringIO) -> None:
    logs.set_up("json", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("here").exception("Oh")
    assert "ValueError: broken" in json.loads(stream.getvalue())["traceback"]


def test_a_job_has_one_line_with_whose_fault_it_was(stream: io.StringIO) -> None:
    logs.set_up("json", stream=stream)
    lines = logs.JobLines()
    token = logs.REQUEST.set("req_1")
    lines.asked("job_1")
    logs.REQUEST.reset(token)
    fault = Fault("engine_crashed", "It crashed at SECRET PROMPT.")
    lines.ended(job(state="failed", fault=fault, tries=2, usage={"completion_tokens": 5.0}))
    line = json.loads(stream.getvalue())
    assert "SECRET" not in stream.getvalue()
    wanted = {"job": "job_1", "attempt": 2, "outcome": "failed", "fault": "engine_crashed", "owner": "engine"}
    wanted |= {"request": "req_1", "tenant": "t", "key": "bk_ab", "worker": "box", "tries": 2}
    wanted |= {"waited_s": 0.5, "ran_s": 1.5, "completion_tokens": 5, "level": "warning", "kind": "llm", "model": "m"}
    assert wanted.items() <= line.items()


def test_a_callers_fault_is_no_warning(stream: io.StringIO) -> None:
    logs.set_up("json", "warning", stream=stream)
    lines = logs.JobLines()
    lines.ended(job(state="failed", fault=Fault("invalid_parameter", "Wrong.")))
    lines.ended(job())
    assert stream.getvalue() == ""


def test_requests_that_never_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "REMEMBERED", 2)
    lines = logs.JobLines()
    token = logs.REQUEST.set("r")
    for n in range(5):
        lines.asked(f"job_{n}")
    logs.REQUEST.reset(token)
    assert list(lines._asked) == ["job_3", "job_4"]


def test_there_is_one_line_per_request_when_wanted(stream: Told, served: Running) -> None:
    import httpx

    stream.everybody = True
    logs.set_up("json", access=True, stream=stream)
    answer = httpx.get(f"{served.url}/v1/jobs/job_secret?q=SECRET", headers=served.headers)
    until = time.monotonic() + 60
    while not (lines := access_lines(stream, answer.headers["x-request-id"])):  # it is written behind the answer
        assert time.monotonic() < until
        served.call(_nothing)
    (line,) = lines
    assert (line["message"], line["status"]) == ("GET /v1/jobs/{id}", 404)
    assert (line["tenant"], line["key"]) == ("default", served.key.partition(".")[0][: len(line["key"])])
    assert "SECRET" not in stream.getvalue()
    assert served.key not in stream.getvalue()


def access_lines(stream: io.StringIO, request: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [one for one in found if one["logger"] == "coordinator.access" and one.get("request") == request]


async def _nothing() -> None: ...


def test_trouble_that_has_a_sentence_is_told_in_one_line(stream: io.StringIO) -> None:
    """A full disk is told of again and again: by tracebacks it would fill another one."""
    logs.set_up(stream=stream)
    for error in (refuse("storage_full", "The disk is full."), OSError("Input/output error")):
        try:
            raise error
        except (FaultError, OSError) as raised:
            logs.trouble(logging.getLogger("coordinator.test"), raised, "It goes on")
    first, second, *traceback = stream.getvalue().splitlines()
    assert first.endswith("ERROR coordinator.test: It goes on: The disk is full.")
    assert second.endswith("ERROR coordinator.test: It goes on: Input/output error")
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "OSError: Input/output error"
