"""llama.cpp's own server behind the server engine: chat, streams, cancel, embeddings, bad input, its death."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import struct
import sys

import msgspec
import psutil
import pytest

from engines.server.engine import EXIT_SERVER_DIED, ServerEngine
from protocol.engine_wire import Cancel, Progress, Ready
from protocol.faults import Fault

pytestmark = pytest.mark.engine
pytest.importorskip("xllamacpp")

COUNT = {"messages": [{"role": "user", "content": "count to 5"}], "temperature": 0.0}
ENDLESS = {"prompt": "hello", "max_tokens": 2_000_000, "grammar": 'root ::= "ab " root'}


def _model(**changes):  # noqa: ANN003
    model = ServerEngine.fixture("").model
    return msgspec.structs.replace(model, options={**model.options, **changes})


@pytest.fixture
def child(spawn):
    child = spawn("server")
    ready = child.load(_model())
    assert isinstance(ready, Ready), ready
    assert ready.slots == 4
    assert ready.device == "cpu"
    return child


def _server_pid(child):
    """The server below the leash below the engine."""
    # By parents, not by threads: the thread that began a child may end, and while it does nobody is seen to have it.
    (leash,) = psutil.Process(child.process.pid).children()
    (server,) = leash.children()
    return server.pid


def test_one_server_serves_everything_that_the_fixture_asks(child):
    fixture = ServerEngine.fixture("")
    for case in fixture.cases:
        answer = child.run(case.kind, case.params, stream=case.stream)
        assert case.check(answer.body, answer.files) == ""
    for kind, params in fixture.refused:
        answer = child.run(kind, params)
        assert not answer.started
        assert answer.fault.code == "unsupported"


def test_chat_streams_and_counts(child):
    answer = child.run("llm", COUNT, stream=True)
    assert (answer.body.content, answer.body.finish_reason) == ("1 2 3 4 5", "stop")
    assert "".join(chunk.get("delta", {}).get("content") or "" for chunk in answer.chunks) == "1 2 3 4 5"
    assert len(answer.chunks) > 5
    assert answer.chunks[-1]["finish_reason"] == "stop"
    assert answer.result.usage["completion_tokens"] == 10
    assert answer.result.usage["prompt_tokens"] == 14
    assert [report.n for report in answer.progress] == list(range(1, len(answer.chunks) + 1))


def test_a_plain_answer_is_the_same(child):
    answer = child.run("llm", COUNT)
    assert answer.body.content == "1 2 3 4 5"
    assert answer.chunks == []


def test_completion_max_tokens_and_stop(child):
    grammar = {"grammar": 'root ::= "x" root', "prompt": "hello"}
    answer = child.run("llm", {**grammar, "max_tokens": 3})
    assert (answer.body.content, answer.body.finish_reason) == ("xxx", "length")
    answer = child.run("llm", {**COUNT, "stop": ["4"]})
    assert answer.body.content.strip() == "1 2 3"


def test_a_json_schema_is_honoured(child):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    answer = child.run("llm", {**COUNT, "json_schema": schema, "max_tokens": 60})
    assert isinstance(msgspec.json.decode(answer.body.content)["a"], bool)


def test_embeddings_have_length_one_and_a_batch_equals_its_singles(child):
    batch = child.run("embedding", {"input": ["hello", "count to 5"]}).body
    vectors = struct.unpack(f"<{2 * batch.dimensions}f", batch.vectors)
    assert math.hypot(*vectors[: batch.dimensions]) == pytest.approx(1, abs=1e-5)
    single = child.run("embedding", {"input": ["count to 5"]}).body
    assert struct.unpack(f"<{batch.dimensions}f", single.vectors) == pytest.approx(
        vectors[batch.dimensions :], abs=1e-4
    )


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"prompt": "x", "grammar": "root ::= ((("}, "invalid_request"),
        ({"prompt": "a " * 2000}, "context_length_exceeded"),
    ],
)
def test_what_the_server_refuses_is_the_callers_fault_and_it_lives_on(child, params, code):
    answer = child.run("llm", params)
    assert answer.fault.code == code
    assert answer.fault.message
    assert child.run("llm", COUNT).body.content == "1 2 3 4 5"


def test_cancel_hangs_up_and_frees_the_slot(child):
    answers = [child.begin("llm", ENDLESS, stream=True) for _ in range(4)]
    seen = set()
    while len(seen) < 4:
        if isinstance(message := child.receive(), Progress):
            seen.add(message.run)
    for run in range(1, 5):
        child.send(Cancel(run=run))
    pending = {1, 2, 3, 4}
    while pending:
        message = child.receive()
        if hasattr(message, "fault"):
            assert message.fault.code == "cancelled"
            pending.remove(message.run)
    assert len(answers) == 4
    # All four slots were taken by endless answers: this one ends only if they were really freed.
    assert child.run("llm", COUNT).body.content == "1 2 3 4 5"


def test_a_neighbour_is_not_disturbed_by_a_cancel(child):
    endless = child.begin("llm", ENDLESS)
    other = child.begin("llm", {**ENDLESS, "max_tokens": 400})
    child.send(Cancel(run=1))
    while endless.fault is None or other.result is None:
        message = child.receive()
        if getattr(message, "run", 0) == 1 and hasattr(message, "fault"):
            endless.fault = message.fault
        elif getattr(message, "run", 0) == 2 and hasattr(message, "body"):
            other.result = message
    assert endless.fault.code == "cancelled"
    assert other.body.finish_reason == "length"


def test_the_death_of_the_server_ends_runs_and_process(child):
    answer = child.begin("llm", ENDLESS)
    while not isinstance(child.receive(), Progress):
        pass
    os.kill(_server_pid(child), signal.SIGSEGV)
    child.finish(answer)
    assert (answer.fault.code, answer.fault.may_retry) == ("engine_crashed", True)
    assert "SIGSEGV" in answer.fault.message
    assert child.process.wait(60) == EXIT_SERVER_DIED
    assert "SIGSEGV" in child.stderr()


def test_an_idle_server_that_dies_takes_the_engine_with_it(child):
    os.kill(_server_pid(child), signal.SIGKILL)
    assert child.process.wait(60) == EXIT_SERVER_DIED


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_the_engine(child, number):
    pidfd = os.pidfd_open(_server_pid(child))
    child.process.send_signal(number)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_its_words_go_to_stderr(child):
    assert "listening on unix://" in child.stderr()


def test_a_loopback_port_works_too_and_a_cache_folder_is_kept(spawn, tmp_path):
    argv = [arg.replace("--socket", "--port").replace("{socket}", "{port}") for arg in _model().options["argv"]]
    child = spawn("server")
    ready = child.load(_model(argv=argv, cache_dir=str(tmp_path / "cache"), vram_gb=1.5, device="cuda:0"))
    assert isinstance(ready, Ready), ready
    assert (ready.limits["vram_gb"], ready.device) == (1.5, "cuda:0")
    assert (tmp_path / "cache").is_dir()
    assert re.search(r"listening on http://127\.0\.0\.1:\d+", child.stderr())
    assert child.run("llm", COUNT).body.content == "1 2 3 4 5"


def test_a_missing_model_file_is_a_failed_load(spawn):
    fault = spawn("server").load(msgspec.structs.replace(_model(), files={"model": "/no/such.gguf"}))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.field) == ("load_failed", "files.model")


def test_a_server_that_ends_while_it_starts_tells_why(spawn, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    child = spawn("server")
    fault = child.load(msgspec.structs.replace(_model(), files={"model": str(broken)}))
    assert isinstance(fault, Fault)
    assert fault.code == "load_failed"
    assert "ended with exit code 1" in fault.message
    assert any("Failed to init server" in line for line in fault.detail["stderr_tail"])


def test_a_wrong_served_model_is_named(spawn):
    argv = [sys.executable, *_model().options["argv"][1:]]
    fault = spawn("server").load(_model(argv=argv, served_model="other"))
    assert isinstance(fault, Fault)
    assert fault.field == "options.served_model"
