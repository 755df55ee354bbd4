"""Each misdeed is real: what the host sees is what a broken engine would show it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from protocol.engine_session import RemoteProtocolError
from protocol.engine_wire import Cancel, Chunk, Model, Ping, Pong, Progress, Ready, WireError
from protocol.faults import Fault
from protocol.framing import FramingError

MODULE = "engines.synthetic.misbehave"


def _start(spawn, load=""):
    child = spawn(MODULE)
    ready = child.load(Model(name="synthetic-bad", device="cpu", options={"load": load}))
    assert isinstance(ready, Ready), ready
    return child


@pytest.fixture
def child(spawn):
    child = _start(spawn)
    yield child
    child.process.kill()


def _ended(child, seen=None):
    """Receive until the child is gone; its exception. What came before goes into `seen`."""
    seen = [] if seen is None else seen
    while True:
        try:
            seen.append(child.receive())
        except Exception as error:
            if hasattr(error, "returncode"):
                return error
            raise


def test_left_alone_it_answers(child):
    answer = child.run("llm", {"prompt": "good morning"})
    assert answer.body.content == "good morning"


def test_it_serves_only_models_named_synthetic(spawn):
    assert isinstance(spawn(MODULE).load(Model(name="real")), Fault)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGFPE", "SIGBUS"])
def test_crash(child, name):
    child.begin("llm", {"prompt": f"crash:{name}"})
    assert _ended(child).returncode == -signal.Signals[name]


def test_a_crash_leaves_its_stack_on_stderr(child):
    child.begin("llm", {"prompt": "crash:SIGSEGV"})
    assert "Fatal Python error: Segmentation fault" in _ended(child).stderr


def test_crash_after_chunks(child):
    child.begin("llm", {"prompt": "crash-after:2"}, stream=True)
    seen = []
    assert _ended(child, seen).returncode == -signal.SIGSEGV
    assert [message.seq for message in seen if isinstance(message, Chunk)] == [0, 1]


def test_exit(child):
    child.begin("llm", {"prompt": "exit:7"})
    assert _ended(child).returncode == 7


def test_raise_is_an_engine_fault_and_the_next_run_works(child):
    answer = child.run("llm", {"prompt": "raise:oh"})
    assert answer.fault.code == "engine_failed"
    assert "RuntimeError: oh" in answer.fault.message
    assert child.run("llm", {"prompt": "fine"}).body.content == "fine"


def test_hang_leaves_the_pings_alive_and_is_deaf_to_cancel(child):
    child.begin("llm", {"prompt": "hang"})
    child.receive()  # started
    child.send(Cancel(run=1))
    child.send(Ping(n=5))
    assert child.receive() == Pong(n=5)
    with pytest.raises(TimeoutError):
        child.receive(0.3)


def test_hang_with_the_gil_silences_the_pings(child):
    child.begin("llm", {"prompt": "hang-gil"})
    child.receive()  # started
    child.send(Ping(n=5))
    with pytest.raises(TimeoutError):
        child.receive(0.5)
    child.process.send_signal(signal.SIGTERM)  # default disposition: dies all the same
    assert child.process.wait(60) == -signal.SIGTERM


def test_endless_progress_obeys_cancel(child):
    answer = child.begin("llm", {"prompt": "progress"})
    while not isinstance(child.receive(), Progress):
        pass
    child.send(Cancel(run=1))
    assert child.finish(answer).fault.code == "cancelled"


def test_deaf_goes_on_after_cancel(child):
    answer = child.begin("llm", {"prompt": "deaf:2"}, stream=True)
    child.receive()  # started
    child.send(Cancel(run=1))
    child.finish(answer)
    assert answer.body.content == "done"
    assert len(answer.chunks) > 3


def test_ignore_term(child):
    child.begin("llm", {"prompt": "ignore-term"})
    child.receive()  # started
    child.send(Ping(n=1))
    child.receive()
    _wait_ignored(child.process.pid)
    child.process.send_signal(signal.SIGTERM)
    child.send(Ping(n=2))
    assert child.receive() == Pong(n=2)
    child.process.kill()
    assert child.process.wait(60) == -signal.SIGKILL


def _wait_ignored(pid):
    """Until the kernel says that SIGTERM is ignored by the child."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with open(f"/proc/{pid}/status") as file:
            mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
        if mask & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.005)
    raise AssertionError("SIGTERM is not ignored")


def test_stop_and_continue(child):
    answer = child.begin("llm", {"prompt": "stop"})
    _, status = os.waitpid(child.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    child.process.send_signal(signal.SIGCONT)
    assert child.finish(answer).body.content == "continued"


def test_a_flood_on_stderr_is_just_a_flood(child):
    assert child.run("llm", {"prompt": "stderr:1"}).body.content == "wrote 1 MiB"
    assert len(child.stderr()) > 2**20


def test_noise_on_stdout_does_not_reach_the_wire(child):
    assert child.run("llm", {"prompt": "stdout"}).body.content == "quiet"
    for words in ("from print", "from puts", "noise", "from a shell"):
        assert words in child.stderr()


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        ("garbage", FramingError),
        ("huge", FramingError),
        ("blobs", FramingError),
        ("tag", WireError),
        ("body", WireError),
        ("run", RemoteProtocolError),
        ("seq", RemoteProtocolError),
        ("hello", RemoteProtocolError),
    ],
)
def test_wrong_frames_break_the_wire_where_they_should(child, frame, error):
    child.begin("llm", {"prompt": f"frame:{frame}"})
    with pytest.raises(error):
        _ended(child)


def test_half_a_frame_is_silence(child):
    child.begin("llm", {"prompt": "frame:half"})
    child.receive()  # started
    with pytest.raises(TimeoutError):
        child.receive(0.3)


def test_memory_grows_and_stays(child):
    before = _rss(child.process.pid)
    assert child.run("llm", {"prompt": "memory:32"}).body.content == "holds 32 MiB"
    assert _rss(child.process.pid) - before > 30 * 2**20


def _rss(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_grandchild_holds_the_pipe_after_the_engine_ended(child):
    child.begin("llm", {"prompt": "fork:exit"})
    assert child.process.wait(60) == 9
    pid = int(child.stderr().split("grandchild ")[1].split()[0])
    try:
        child.receive()  # started
        with pytest.raises(TimeoutError):  # no end of file
            child.receive(0.3)
        assert os.getsid(pid) == pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_descriptors(child):
    assert child.run("llm", {"prompt": "descriptors:50"}).body.content == "holds 50 descriptors"
    assert len(os.listdir(f"/proc/{child.process.pid}/fd")) > 50


@pytest.mark.parametrize(("load", "code"), [("fault", "model_corrupt"), ("raise", "load_failed")])
def test_load_faults_leave_the_process_well(spawn, load, code):
    child = spawn(MODULE)
    fault = child.load(Model(name="synthetic-bad", options={"load": load}))
    assert isinstance(fault, Fault)
    assert fault.code == code
    child.send(Ping(n=1))
    assert child.receive() == Pong(n=1)


@pytest.mark.parametrize(("load", "returncode"), [("crash:SIGSEGV", -11), ("exit:3", 3)])
def test_load_deaths(spawn, load, returncode):
    child = spawn(MODULE)
    with pytest.raises(Exception, match=f"ended with {returncode}"):
        child.load(Model(name="synthetic-bad", options={"load": load}))


def test_slow_and_heavy_loads(spawn):
    _start(spawn, load="slow:0.1")
    child = _start(spawn, load="memory:20")
    assert _rss(child.process.pid) > 30 * 2**20


def test_the_switch_decides_about_the_load(spawn, tmp_path):
    switch = tmp_path / "switch"
    options = {"load": "fault", "switch": str(switch)}
    for said, ready in (("on", False), ("off", True)):
        switch.write_text(said)
        answer = spawn(MODULE).load(Model(name="synthetic-bad", device="cpu", options=options))
        assert isinstance(answer, Ready) is ready


def test_a_misdeed_at_the_load_that_nobody_knows_is_refused(spawn):
    fault = spawn(MODULE).load(Model(name="synthetic-bad", options={"load": "sing"}))
    assert isinstance(fault, Fault)
    assert fault.field == "options.load"
