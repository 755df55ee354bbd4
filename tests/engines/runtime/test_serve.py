"""The engine's main loop as the host sees it: greeting, order, endings, noise, big bodies, JSON lines."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import venv
from pathlib import Path

import msgspec
import pytest

from engines.runtime.serve import EXIT_PROTOCOL, fault_of
from protocol import engine_wire as wire
from protocol.engine_session import EngineSession, RemoteProtocolError, Role
from protocol.faults import Fault, FaultError
from protocol.framing import INLINE_BYTES, FrameDecoder

ROOT = Path(__file__).parents[3]
BOOT = ROOT / "engines" / "runtime" / "boot.py"
MISBEHAVE = "engines.synthetic.misbehave"


@pytest.fixture
def child(spawn):
    child = spawn("synthetic")
    assert isinstance(child.load(wire.Model(name="synthetic-x", options={"tokens": 0})), wire.Ready)
    return child


@pytest.fixture
def bad(spawn):
    child = spawn(MISBEHAVE)
    assert isinstance(child.load(wire.Model(name="synthetic-x")), wire.Ready)
    yield child
    child.process.kill()


def _write(child, data):
    child.process.stdin.write(data)
    child.process.stdin.flush()


def _packed(message):
    return b"".join(bytes(part) for part in wire.encode(message))


# ---- endings


def test_the_end_of_input_ends_it_with_0(child):
    child.process.stdin.close()
    assert child.process.wait(60) == 0


def test_the_end_of_input_ends_it_in_the_middle_of_a_run(bad):
    bad.begin("llm", {"prompt": "hang"})
    bad.receive()
    bad.process.stdin.close()
    assert bad.process.wait(60) == 0


def test_shutdown_ends_it_with_0_and_silence(child):
    child.send(wire.Shutdown())
    assert child.process.wait(60) == 0
    assert child.process.stdout.read() == b""


def test_sigterm_has_its_default_disposition_even_when_the_gil_is_held(bad):
    bad.begin("llm", {"prompt": "hang-gil"})
    bad.receive()
    bad.process.terminate()
    assert bad.process.wait(60) == -signal.SIGTERM


def test_a_host_that_stops_reading_and_is_gone_ends_it(spawn):
    child = spawn("synthetic")
    child.load(wire.Model(name="synthetic-x", options={"tokens": 1_000_000}))
    child.begin("llm", {"prompt": "x"}, stream=True)
    child.process.stdout.close()
    assert child.process.wait(60) == 0


# ---- a host that breaks the protocol


@pytest.mark.parametrize(
    "data",
    [
        b"\xffgarbage",
        b"\x00\x00\x00\x01\xc1",
        _packed(wire.Run(run=1, kind="llm", params=wire.pack({}))),  # before load
        _packed(wire.Cancel(run=5)),
        b'{"t": "nope"}\n',
        b'{"t": "load"}\n',
        b"{not json\n",
        b"\x01\x00\x00\x00",
    ],
)
def test_a_protocol_violation_ends_it_with_70_and_a_sentence(spawn, data):
    child = spawn("synthetic")
    _write(child, data)
    assert child.process.wait(60) == EXIT_PROTOCOL
    assert "the host broke the protocol" in child.stderr()


def test_a_second_load_is_a_violation(child):
    _write(child, _packed(wire.Load(model=wire.Model(name="synthetic-x"), scratch="/tmp")))
    assert child.process.wait(60) == EXIT_PROTOCOL


# ---- signals and noise


def test_sigusr2_dumps_every_stack_and_the_run_goes_on(bad):
    bad.begin("llm", {"prompt": "hang-gil"})
    bad.receive()
    for _ in range(1200):  # the first dumps may come before the run has reached its sleep
        bad.process.send_signal(signal.SIGUSR2)
        select.select([bad.process.stdout], [], [], 0.05)
        if "_hang_gil" in bad.stderr():
            break
    assert "Thread 0x" in bad.stderr()
    assert "_hang_gil" in bad.stderr()
    assert bad.process.poll() is None


def test_noise_on_every_road_to_stdout_does_not_reach_the_wire(bad):
    for _ in range(5):
        assert bad.run("llm", {"prompt": "stdout"}).body.content == "quiet"


def test_a_program_of_the_engine_does_not_inherit_the_wire(bad):
    """The private duplicates are closed on exec; fd 0 is /dev/null, fd 1 is stderr."""
    links = [os.readlink(f"/proc/{bad.process.pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert links[0] == os.devnull
    assert links[1] == links[2]
    for fd in os.listdir(f"/proc/{bad.process.pid}/fdinfo"):
        text = Path(f"/proc/{bad.process.pid}/fdinfo/{fd}").read_text()
        flags = int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags")), 8)
        if int(fd) > 2:
            assert flags & os.O_CLOEXEC, os.readlink(f"/proc/{bad.process.pid}/fd/{fd}")


# ---- messages


def test_big_bodies_travel_as_blobs_both_ways(child):
    text = "x" * (3 * INLINE_BYTES) + " y"
    answer = child.run("llm", {"prompt": text}, stream=True)
    assert answer.body.content == text
    parts = wire.encode(wire.Run(run=1, kind="llm", params=wire.pack({"prompt": text})))
    assert len(parts) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_result_that_no_frame_can_hold_is_a_fault_and_the_next_run_works(bad, stream):
    answer = bad.run("llm", {"prompt": "result:65"}, stream=stream)
    assert answer.fault.code == "engine_failed"
    assert "exceed" in answer.fault.message
    assert bad.run("llm", {"prompt": "fine"}).body.content == "fine"


def test_validate_alone(child):
    child.send(wire.Validate(run=1, kind="llm", params=wire.pack({"prompt": "x"})))
    assert child.receive() == wire.Valid(run=1)
    child.send(wire.Validate(run=2, kind="llm", params=wire.pack({"prompt": "x", "grammar": "g"})))
    fault = child.receive()
    assert (fault.run, fault.fault.field) == (2, "grammar")


@pytest.mark.parametrize(
    ("kind", "params", "code", "field"),
    [
        ("nope", {}, "unsupported", "kind"),
        ("llm", {"prompt": "x", "temperature": 3}, "invalid_parameter", "temperature"),
        ("llm", {"prompt": "x", "colour": 3}, "invalid_parameter", "colour"),
        ("llm", [1], "invalid_parameter", None),
        ("embedding", {"input": []}, "invalid_parameter", "input"),
    ],
)
def test_parameters_are_judged_again_in_the_child(child, kind, params, code, field):
    child.send(wire.Run(run=1, kind=kind, params=wire.pack(params), folder=str(child.folder)))
    fault = child.receive().fault
    assert (fault.code, fault.field) == (code, field)


def test_params_that_are_not_msgpack_are_a_fault_of_the_run_alone(child):
    header = msgspec.msgpack.encode({"t": "run", "run": 1, "kind": "llm", "params": None, "blobs": [70_000]})
    child.session.sending(wire.Run(run=1, kind="llm", params=wire.pack({})))
    _write(child, len(header).to_bytes(4, "big") + header + b"\xc1" * 70_000)
    assert child.receive().fault.code == "invalid_parameter"
    child.send(wire.Ping(n=3))
    assert child.receive() == wire.Pong(n=3)


def test_a_cancel_that_crosses_the_end_is_nothing(child):
    child.run("llm", {"prompt": "x"})
    child.send(wire.Cancel(run=1))
    child.send(wire.Ping(n=1))
    assert child.receive() == wire.Pong(n=1)


def test_a_cancel_right_behind_the_run_is_seen(spawn):
    child = spawn("synthetic")
    child.load(wire.Model(name="synthetic-x", options={"tokens": 1_000_000}))
    for _ in range(10):
        answer = child.begin("llm", {"prompt": "x"})
        child.send(wire.Cancel(run=child.session.open_runs[-1]))
        assert child.finish(answer).fault.code == "cancelled"


def test_an_engine_whose_cancel_raises_still_ends_the_run_and_lives(bad):
    answer = bad.begin("llm", {"prompt": "cancel-raises"})
    assert isinstance(bad.receive(), wire.Started)
    bad.send(wire.Cancel(run=1))
    assert bad.finish(answer).fault.code == "cancelled"
    assert bad.run("llm", {"prompt": "next"}).body.content == "next"
    # The I/O thread writes its traceback while the run's own thread already answers, and reads the next run after it.
    assert "cancel raised" in bad.stderr()


def test_many_runs_at_once_keep_their_order(child):
    answers = {number: child.begin("llm", {"prompt": f"a b c d {number}"}, stream=True) for number in range(1, 9)}
    pending, texts = set(answers), dict.fromkeys(answers, "")
    while pending:
        message = child.receive()
        if isinstance(message, wire.Chunk):
            data = msgspec.msgpack.decode(message.data)
            texts[message.run] += data.get("delta", {}).get("content", "")
        elif isinstance(message, wire.Result):
            pending.remove(message.run)
    assert texts == {number: f"a b c d {number}" for number in answers}


# ---- JSON lines


def _lines(*messages, module="engines.synthetic.engine"):  # noqa: ANN002
    """What a person at a shell sees: lines in, lines out."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(BOOT), str(ROOT), module, "serve", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        yield json.loads(process.stdout.readline())
        for message in messages:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            while True:
                answer = json.loads(process.stdout.readline())
                yield answer
                if answer["t"] in ("ready", "result", "fault", "pong"):
                    break
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(60) == 0


def test_a_person_can_drive_it_with_json_lines(tmp_path):
    load = {"t": "load", "model": {"name": "synthetic-x"}, "scratch": str(tmp_path)}
    run = {
        "t": "run",
        "run": 1,
        "kind": "llm",
        "params": {"prompt": "one two"},
        "folder": str(tmp_path),
        "stream": True,
    }
    odd = {"t": "run", "run": 2, "kind": "llm", "params": {"prompt": "x", "top_p": 7}, "folder": str(tmp_path)}
    answers = list(_lines(load, {"t": "ping", "n": 4}, run, odd))
    assert [answer["t"] for answer in answers if answer["t"] != "progress"] == [
        *("hello", "ready", "pong", "started", "chunk", "chunk", "chunk", "result", "fault"),
    ]
    assert next(answer for answer in answers if answer["t"] == "result")["body"] == {"content": "one two"}
    assert answers[-1]["fault"]["field"] == "top_p"


def test_binary_and_json_may_be_mixed_and_each_is_answered_in_kind(child):
    _write(child, b'{"t": "ping", "n": 1}\n')
    child.session.sending(wire.Ping(n=1))
    assert json.loads(child.process.stdout.readline()) == {"t": "pong", "n": 1}
    child.session.received(wire.Pong(n=1))
    child.send(wire.Ping(n=2))
    assert child.receive() == wire.Pong(n=2)


# ---- another interpreter


def _drive(python, tmp_path):
    """Greeting, load and one run in an engine child of another interpreter."""
    spec = {"root": str(ROOT), "module": "engines.synthetic.engine", "python": str(python), "scratch": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(ROOT / "engines" / "launch.py"), json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    session, decoder, seen = EngineSession(Role.HOST), FrameDecoder(), []
    messages = [
        wire.Load(model=wire.Model(name="synthetic-x"), scratch=str(tmp_path)),
        wire.Run(run=1, kind="llm", params=wire.pack({"prompt": "a b"}), folder=str(tmp_path)),
    ]
    with process:
        while data := os.read(process.stdout.fileno(), 65_536):
            decoder.feed(data)
            for frame in decoder:
                seen.append(wire.decode_up(frame))
                session.received(seen[-1])
                if isinstance(seen[-1], wire.Hello | wire.Ready):
                    session.sending(messages[0])
                    process.stdin.write(_packed(messages.pop(0)))
                    process.stdin.flush()
                elif isinstance(seen[-1], wire.Result | wire.RunFault):
                    process.stdin.close()
        error = process.stderr.read()
        assert process.wait(60) == 0, error
    return seen


def test_an_interpreter_that_has_only_msgspec(tmp_path):
    """Linked from ours, so that it needs no index; the test below installs it for real."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import trio"], capture_output=True, timeout=60).returncode == 1
    seen = _drive(python, tmp_path)
    assert msgspec.msgpack.decode(seen[-1].body)["content"] == "a b"


@pytest.mark.slow
def test_an_interpreter_made_by_venv_and_pip(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120, capture_output=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"msgspec=={msgspec.__version__}"]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    if installed.returncode:
        pytest.skip(f"no package index can be reached: {installed.stderr.strip()[-200:]}")
    seen = _drive(python, tmp_path)
    assert msgspec.msgpack.decode(seen[-1].body)["content"] == "a b"


# ---- translation of what engine code raises


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FaultError(Fault("not_found", "as it is")), "not_found", "as it is"),
        (MemoryError(), "out_of_memory", "ran out of memory"),
        (ModuleNotFoundError("No module named 'x'"), "not_installed", "No module named 'x'"),
        (ValueError("a\n  b"), "engine_failed", "ValueError: a b"),
        (KeyError(), "engine_failed", "KeyError"),
        (SystemExit(3), "engine_failed", "SystemExit: 3"),
        (RecursionError("deep"), "engine_failed", "RecursionError: deep"),
    ],
)
def test_foreign_errors_become_faults(error, code, words):
    fault = fault_of(error)
    assert fault.code == code
    assert words in fault.message


def test_the_hosts_table_agrees_with_the_child(bad):
    """A child that lies is caught by the host's session, not by luck."""
    bad.begin("llm", {"prompt": "frame:seq"})
    with pytest.raises(RemoteProtocolError, match="chunk 77"):
        _drain(bad)


def _drain(child):
    while True:
        child.receive()
