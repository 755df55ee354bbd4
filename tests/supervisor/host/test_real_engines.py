"""The host against real processes that really do it: crashes, hangs, broken frames. Real clock, short limits."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from protocol import engine_wire as wire
from protocol import work
from supervisor.host.host import Host, open_host
from supervisor.host.work import Chunk, Done, EngineSpec, Failed, ModelSpec, RunEnd, RunRequest, Sandbox
from supervisor.settings import LimitsTable

# Nothing that is well comes near these, however busy the machine is.
LIMITS = LimitsTable(
    start_s=60, load_s=30, first_output_s=30, stall_s=30, cancel_grace_s=30, term_grace_s=0.3, job_s=120
)
# For the misdeeds that a limit ends.
SHORT = msgspec.structs.replace(LIMITS, load_s=1.0, first_output_s=1.0, stall_s=1.0, cancel_grace_s=0.3)
PATIENCE_S = 60.0


def model(name: str = "synthetic-m", env: dict[str, str] | None = None, **options: object) -> ModelSpec:
    engine = EngineSpec(name="misbehave", module="engines.synthetic.misbehave", python=sys.executable, env=env or {})
    return ModelSpec(name=name, engine=engine, model=wire.Model(name=name, device="cpu", options=options))


class Bench:
    """A host with one misbehaving model, and a way to ask it."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder, self._count = host, folder, 0
        self.events: list[object] = []

    async def ask(self, prompt: str, **more: object) -> RunEnd:
        self._count += 1
        folder = self.folder / f"a{self._count}"
        folder.mkdir()
        params = msgspec.msgpack.encode({"prompt": prompt})
        request = RunRequest(model="synthetic-m", kind="llm", params=params, folder=folder, stream=True, **more)
        with trio.fail_after(PATIENCE_S):
            return await self.host.run(request, self.events.append)

    async def says(self, prompt: str) -> str | None:
        end = await self.ask(prompt)
        assert isinstance(end, Done), end
        return msgspec.msgpack.decode(end.body, type=work.LlmResult).content

    async def fault(self, prompt: str, limits: LimitsTable = LIMITS, **more: object):
        """The fault of a run under other limits than those before and after it have."""
        self.host.apply(limits, [model()])
        end = await self.ask(prompt, **more)
        self.host.apply(LIMITS, [model()])
        assert isinstance(end, Failed), end
        return end.fault

    @property
    def pid(self) -> int:
        return self.host.snapshot()[0].pid


@pytest.fixture
async def bench(tmp_path: Path):
    async with open_host([model()], LIMITS, tmp_path / "scratch") as host:
        yield Bench(host, tmp_path)
    assert not [pid for pid in _children() if "misbehave" in _words(pid)]
    assert not list((tmp_path / "scratch" / "m0").glob("i[0-9]*"))


def _children() -> list[psutil.Process]:
    return psutil.Process().children()


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended meanwhile


@pytest.mark.parametrize(
    ("prompt", "signal_or_code"),
    [
        ("crash:SIGSEGV", {"signal": 11}),
        ("crash:SIGABRT", {"signal": 6}),
        ("crash:SIGKILL", {"signal": 9}),
        ("exit:1", {"exit_code": 1}),
        ("exit:0", {"exit_code": 0}),
    ],
)
async def test_death_is_told_by_its_cause_and_the_next_job_works(bench, prompt, signal_or_code):
    assert await bench.says("hello") == "hello"
    first = bench.pid
    fault = await bench.fault(prompt)
    assert fault.code == "engine_crashed"
    assert fault.may_retry
    assert signal_or_code.items() <= fault.detail.items()
    assert await bench.says("again") == "again"
    assert bench.pid != first


async def test_the_time_that_the_engine_had_the_run_is_told_for_every_engine(bench):
    await bench.says("warm")
    began = trio.current_time()
    end = await bench.ask("hello")
    assert isinstance(end, Done)
    assert 0 < end.usage["compute_ms"] <= (trio.current_time() - began) * 1000 + 0.1


async def test_a_native_crash_leaves_its_stack_as_evidence(bench):
    fault = await bench.fault("crash:SIGSEGV")
    assert any("Segmentation fault" in line for line in fault.detail["stderr_tail"])


async def test_chunks_before_the_crash_were_streamed(bench):
    end = await bench.ask("crash-after:3")
    assert isinstance(end, Failed)
    assert end.streamed
    assert [event.seq for event in bench.events if isinstance(event, Chunk)] == [0, 1, 2]


@pytest.mark.parametrize("prompt", ["hang", "hang-gil", "spin", "stop", "ignore-term"])
async def test_every_kind_of_hang_ends_in_bounded_time_and_the_next_job_works(bench, prompt):
    await bench.says("warm")
    began = trio.current_time()
    fault = await bench.fault(prompt, SHORT)
    assert fault.code == "engine_hung"
    assert trio.current_time() - began < LIMITS.first_output_s  # by the short limit; alone in 1.5 s
    assert await bench.says("next") == "next"


async def test_a_hang_leaves_the_stacks_of_all_threads(bench):
    await bench.says("warm")
    fault = await bench.fault("hang", msgspec.structs.replace(SHORT, first_output_s=4.0))  # it has to come so far
    assert any(line.endswith(" in hang") for line in fault.detail["stderr_tail"])


async def test_work_past_its_deadline_is_cancelled_though_it_makes_progress(bench):
    await bench.says("warm")
    fault = await bench.fault("progress", deadline_s=0.5)
    assert fault.code == "deadline_exceeded"
    pid = bench.pid
    assert await bench.says("next") == "next"
    assert bench.pid == pid  # it obeyed the cancel: nothing was killed


async def test_deaf_to_cancel_is_replaced(bench):
    await bench.says("warm")
    pid = bench.pid
    fault = await bench.fault("deaf", SHORT, deadline_s=0.5)
    assert fault.code == "deadline_exceeded"
    assert await bench.says("next") == "next"
    assert bench.pid != pid


@pytest.mark.parametrize("kind", ["garbage", "huge", "blobs", "tag", "body", "run", "seq", "hello"])
async def test_broken_frames_end_the_instance_not_us(bench, kind):
    fault = await bench.fault(f"frame:{kind}")
    assert fault.code == "engine_protocol"
    assert await bench.says("next") == "next"


async def test_noise_on_stdout_and_floods_on_stderr_are_harmless(bench):
    assert await bench.says("stdout") == "quiet"
    assert await bench.says("stderr:4") == "wrote 4 MiB"
    assert await bench.says("next") == "next"


async def test_a_python_error_keeps_the_process(bench):
    await bench.says("warm")
    pid = bench.pid
    fault = await bench.fault("raise:the words")
    assert fault.code == "engine_failed"
    assert "the words" in fault.message
    assert bench.pid == pid


async def test_a_grandchild_that_holds_the_pipe_neither_holds_the_job_nor_outlives_the_engine(bench):
    fault = await bench.fault("fork:exit")
    assert fault.detail["exit_code"] == 9
    assert any("grandchild" in line for line in fault.detail["stderr_tail"])  # its pid is that of another namespace
    # It left our process group and its parent died: only where it works still tells whose it is.
    assert not _living_in(bench.folder)


def _living_in(folder: Path) -> list[int]:
    """Processes whose working folder lies below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            where = process.cwd()
        except psutil.Error:
            continue
        if where.startswith(f"{folder}/"):
            found.append(process.pid)
    return found


async def test_neighbours_of_a_crash_are_told_at_once(bench):
    await bench.says("warm")
    ends: list[RunEnd] = []
    async with trio.open_nursery() as nursery:

        async def neighbour() -> None:
            ends.append(await bench.ask("progress"))

        nursery.start_soon(neighbour)
        with trio.fail_after(PATIENCE_S):
            while not any(type(event).__name__ == "Progress" for event in bench.events):  # noqa: ASYNC110
                await trio.sleep(0.01)
        await bench.fault("crash:SIGSEGV")
    assert isinstance(ends[0], Failed)
    assert ends[0].fault.code == "engine_crashed"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"load": "fault"}, "model_corrupt"),
        ({"load": "raise"}, "load_failed"),
        ({"load": "crash:SIGSEGV"}, "engine_crashed"),
        ({"load": "exit:3"}, "engine_crashed"),
        ({"load": "stall"}, "engine_hung"),
        ({"loda": "x"}, "load_failed"),
    ],
)
async def test_every_bad_load_is_typed(tmp_path, options, code):
    limits = SHORT if options == {"load": "stall"} else LIMITS
    async with open_host([model(**options)], limits, tmp_path / "scratch") as host:
        end = await Bench(host, tmp_path).ask("hello")
        assert isinstance(end, Failed), end
        assert end.fault.code == code
        assert host.snapshot()[0].state in ("stopping", "backoff")
        assert host.snapshot()[0].blocked
        assert host.snapshot()[0].reason


async def test_a_slow_load_with_progress_is_waited_for(tmp_path):
    limits = msgspec.structs.replace(LIMITS, load_s=4.0)
    async with open_host([model(load="slow:5")], limits, tmp_path / "scratch") as host:
        bench = Bench(host, tmp_path)
        assert await bench.says("hello") == "hello"
        assert any(getattr(event, "phase", "") == "load" for event in bench.events)


@pytest.mark.parametrize(("start", "code"), [("exit:4", "engine_crashed"), ("noise", None)])
async def test_misdeeds_before_the_greeting(tmp_path, start, code):
    spec = model(env={"MISBEHAVE_START": start})
    async with open_host([spec], LIMITS, tmp_path / "scratch") as host:
        end = await Bench(host, tmp_path).ask("hello")
        assert (end.fault.code if isinstance(end, Failed) else None) == code


async def test_an_interpreter_that_is_not_there_is_a_load_fault(tmp_path):
    engine = EngineSpec(name="misbehave", module="engines.synthetic.misbehave", python="/no/such/python")
    spec = ModelSpec(name="synthetic-m", engine=engine, model=wire.Model(name="synthetic-m"))
    async with open_host([spec], LIMITS, tmp_path / "scratch") as host:
        fault = await Bench(host, tmp_path).fault("hello")
        assert fault.code == "engine_crashed"
        assert any("No such file" in line for line in fault.detail["stderr_tail"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")
async def test_a_required_sandbox_is_verified_or_the_engine_is_not_started(tmp_path):
    for network, expected in (("none", None), ("loopback", "seccomp is off")):
        without = () if expected is None else ("seccomp",)
        sandbox = Sandbox(mode="require", network=network, without=without)
        spec = model()
        spec = msgspec.structs.replace(spec, engine=msgspec.structs.replace(spec.engine, sandbox=sandbox))
        async with open_host([spec], LIMITS, tmp_path / f"scratch-{network}") as host:
            bench = Bench(host, tmp_path / f"scratch-{network}")
            if expected is None:
                assert await bench.says("hello") == "hello"
            else:
                fault = await bench.fault("hello")
                assert fault.code == "load_failed"
                assert expected in fault.message
