"""Lanes, instances and the host under a virtual clock, with fake children on the real wire."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import msgspec
import trio
import trio.testing

from protocol import engine_wire as wire
from protocol.faults import Fault, FaultError
from supervisor.host.fake import Died, FakeChild, FakeEngines, echo, fake_means, greet_and_load
from supervisor.host.host import open_host
from supervisor.host.runs import ANSWER_S
from supervisor.host.work import Chunk, Done, EngineSpec, Failed, ModelSpec, Progress, RunRequest, Started
from supervisor.settings import LimitsTable

LIMITS = LimitsTable(start_s=10, load_s=30, first_output_s=20, stall_s=10, cancel_grace_s=2, term_grace_s=1, job_s=100)
ENGINE = EngineSpec(name="fake", module="none", python="none")


def spec(name: str = "m") -> ModelSpec:
    return ModelSpec(name=name, engine=ENGINE, model=wire.Model(name=name))


def ask(words: str = "hi", model: str = "m", **more: object) -> RunRequest:
    params = msgspec.msgpack.encode({"prompt": words})
    return RunRequest(model=model, kind="llm", params=params, folder=Path("/nowhere"), **more)


def open_fakes(script, tmp_path: Path, *names: str, **more: object):
    fakes = FakeEngines(script)
    models = [spec(name) for name in names or ("m",)]
    means = fake_means(fakes, **more)
    return fakes, open_host(models, LIMITS, tmp_path / "s", means=means)


class Story(list):
    def __call__(self, event: object) -> None:
        self.append(event)


async def test_first_use_loads_and_the_next_runs_share_the_instance(tmp_path, autojump_clock):
    fakes, opened = open_fakes(echo, tmp_path)
    async with opened as host:
        assert host.snapshot()[0].state == "cold"
        for words in ("a", "b"):
            story = Story()
            end = await host.run(ask(words), story)
            assert isinstance(end, Done)
            assert msgspec.msgpack.decode(end.body) == {"prompt": words}
            assert Started() in story
        await trio.testing.wait_all_tasks_blocked()
        assert host.snapshot()[0].state == "ready"
    assert len(fakes.children) == 1
    assert not list((tmp_path / "s" / "m0").glob("i[0-9]*"))


async def test_unknown_model_is_refused_by_name(tmp_path, autojump_clock):
    _fakes, opened = open_fakes(echo, tmp_path)
    async with opened as host:
        end = await host.run(ask(model="other"), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "model_not_found"


async def test_slots_bound_what_runs_at_once_and_the_rest_waits_in_order(tmp_path, autojump_clock):
    began: list[str] = []

    async def script(child: FakeChild) -> None:
        await greet_and_load(child, slots=2)

        async def one(run: wire.Run) -> None:
            child.send(wire.Started(run=run.run))
            began.append(msgspec.msgpack.decode(run.params)["prompt"])
            await trio.sleep(5)
            child.send(wire.Result(run=run.run, body=run.params))

        async with trio.open_nursery() as nursery:
            async for message in child.inbox:
                if isinstance(message, wire.Run):
                    nursery.start_soon(one, message)

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host, trio.open_nursery() as nursery:
        for words in "abcd":
            nursery.start_soon(host.run, ask(words), Story())
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        assert sorted(began) == ["a", "b"]
        status = host.snapshot()[0]
        assert (status.running, status.queued, status.slots, status.state) == (2, 2, 2, "busy")
        await trio.sleep(5)
        assert sorted(began) == ["a", "b", "c", "d"]


async def test_a_crash_gives_every_run_in_flight_its_fault_and_the_engine_comes_back(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
                if msgspec.msgpack.decode(message.params)["prompt"] == "boom":
                    child.send(wire.Chunk(run=message.run, seq=0, data=msgspec.Raw(b"\xa1x")))
                    child.lines.append("Fatal Python error: Segmentation fault")
                    raise Died(signal=11)
                child.send(wire.Result(run=message.run, body=message.params))

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        story = Story()
        end = await host.run(ask("boom"), story)
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_crashed"
        assert end.fault.may_retry
        assert end.streamed
        assert Chunk(0, b"\xa1x") in story
        assert "SIGSEGV" in end.fault.message
        assert end.fault.detail["signal"] == 11
        assert "Segmentation fault" in end.fault.detail["stderr_tail"][-1]
        assert isinstance(await host.run(ask("fine"), Story()), Done)
        assert host.snapshot()[0].restarts == 1
    assert len(fakes.children) == 2


async def test_out_of_memory_on_the_gpu_is_told_apart(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        await child.inbox.receive()
        child.lines.append("CUDA error: out of memory")
        raise Died(signal=6)

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "out_of_memory"


async def test_load_fault_answers_all_that_wait_then_is_paced_then_tried_again(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        child.send(wire.Hello(engine="fake", kinds=("llm",), low=1, high=1, pid=1))
        await child.inbox.receive()
        child.send(wire.RunFault(run=0, fault=Fault("load_failed", "No such file.")))
        async for _message in child.inbox:
            pass

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert (end.fault.code, end.fault.message) == ("load_failed", "No such file.")
        assert host.snapshot()[0].state == "stopping"  # nobody waits for its end
        assert host.snapshot()[0].blocked
        assert await host.run(ask(), Story()) == end
        await trio.sleep(0.5)
        assert host.snapshot()[0].state == "backoff"
        assert await host.run(ask(), Story()) == end
        assert len(fakes.children) == 1
        await trio.sleep(5)
        assert host.snapshot()[0].state == "cold"
        await host.run(ask(), Story())
        assert len(fakes.children) == 2


async def test_corrupt_file_is_refused_before_anything_starts(tmp_path, autojump_clock):
    async def verify(_spec: ModelSpec) -> str:
        raise FaultError(Fault("model_corrupt", "The file was changed."))

    fakes, opened = open_fakes(echo, tmp_path, verify=verify)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "model_corrupt"
    assert fakes.children == []


async def test_death_while_loading_fails_the_run_with_evidence(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        child.lines.append("error while loading shared libraries: libcublas.so.12")
        raise Died(code=127)

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_crashed"
        assert end.fault.detail["exit_code"] == 127
        assert "libcublas" in end.fault.detail["stderr_tail"][0]


async def test_an_engine_that_never_greets_is_ended_after_start_s(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await trio.sleep_forever()

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        began = trio.current_time()
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_hung"
        assert LIMITS.start_s <= trio.current_time() - began <= LIMITS.start_s + 5


async def test_a_slow_load_lives_as_long_as_it_shows_progress(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        child.send(wire.Hello(engine="fake", kinds=("llm",), low=1, high=1, pid=1))
        await child.inbox.receive()
        for n in range(5):
            await trio.sleep(25)
            if n < 3:
                child.send(wire.Progress(run=0, n=n, total=9))
        child.send(wire.Ready(device="cpu"))
        await trio.sleep_forever()

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        story = Story()
        began = trio.current_time()
        end = await host.run(ask(deadline_s=1000.0), story)
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_hung"
        assert 75 + 30 <= trio.current_time() - began < 75 + 40
        assert [event.n for event in story if isinstance(event, Progress)] == [0, 1, 2]


async def silent(child: FakeChild) -> None:
    """Starts a run and then neither works nor obeys."""
    await greet_and_load(child, slots=2)
    async for message in child.inbox:
        if isinstance(message, wire.Run):
            child.send(wire.Started(run=message.run))


async def test_a_stall_is_ended_and_the_next_run_gets_a_new_instance(tmp_path, autojump_clock):
    fakes, opened = open_fakes(silent, tmp_path)
    async with opened as host:
        began = trio.current_time()
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_hung"
        spent = trio.current_time() - began
        assert spent == LIMITS.first_output_s + ANSWER_S  # the engine's grace is no concern of the caller's
        assert signal.SIGUSR2 in fakes.children[0].signals
        end = await host.run(ask(deadline_s=3.0), Story())
        assert len(fakes.children) == 2
        assert isinstance(end, Failed)
        assert end.fault.code == "deadline_exceeded"


async def test_a_model_whose_runs_may_be_silent_is_ended_by_the_deadline_alone(tmp_path, autojump_clock):
    fakes = FakeEngines(silent)
    patient = ModelSpec(name="m", engine=ENGINE, model=wire.Model(name="m"), stall_s=math.inf)
    means = fake_means(fakes)
    async with open_host([patient], LIMITS, tmp_path / "s", means=means) as host:
        began = trio.current_time()
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "deadline_exceeded"
        assert trio.current_time() - began >= LIMITS.job_s


async def test_one_stuck_run_never_kills_its_neighbour(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child, slots=2)

        async def works(run: wire.Run) -> None:
            child.send(wire.Started(run=run.run))
            for n in range(20):
                child.send(wire.Progress(run=run.run, n=n))
                await trio.sleep(1)
            child.send(wire.Result(run=run.run, body=run.params))

        async with trio.open_nursery() as nursery:
            async for message in child.inbox:
                if isinstance(message, wire.Run):
                    if msgspec.msgpack.decode(message.params)["prompt"] == "works":
                        nursery.start_soon(works, message)
                    else:
                        child.send(wire.Started(run=message.run))

    fakes, opened = open_fakes(script, tmp_path)
    ends: dict[str, object] = {}
    async with opened as host:

        async def run(words: str, **more: object) -> None:
            ends[words] = await host.run(ask(words, **more), Story())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "works")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(lambda: run("stuck", label="stuck"))
            await trio.sleep(1)
            host.cancel("stuck")
            await trio.sleep(3)
            assert ends["stuck"].fault.code == "cancelled"
            assert "works" not in ends
            assert fakes.children[0].exit is None
            nursery.start_soon(lambda: run("later", deadline_s=60.0))
        assert isinstance(ends["works"], Done)
        assert fakes.children[0].exit is not None  # ended when it was empty
        assert len(fakes.children) == 2


async def test_cancel_of_a_queued_run_never_reaches_an_engine(tmp_path, autojump_clock):
    seen: list[str] = []

    async def script(child: FakeChild) -> None:
        await greet_and_load(child, load_s=10)
        seen.extend([type(message).__name__ async for message in child.inbox])

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        with trio.move_on_after(1):
            await host.run(ask(), Story())
        await trio.sleep(20)
        assert seen == []
        assert host.snapshot()[0].queued == 0


async def test_cancelled_run_ends_by_the_engines_own_word(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
            elif isinstance(message, wire.Cancel):
                child.send(wire.RunFault(run=message.run, fault=Fault("cancelled", "Done.")))

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        began = trio.current_time()
        with trio.move_on_after(1):
            await host.run(ask(), Story())
        assert trio.current_time() - began < 1.5
        await trio.testing.wait_all_tasks_blocked()
        assert host.snapshot()[0].state == "ready"
        assert fakes.children[0].exit is None


async def test_a_broken_frame_kills_the_instance_and_names_the_break(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        await child.inbox.receive()
        child.send_bytes(b"printf in a C library")
        await trio.sleep_forever()

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_protocol"
        assert signal.SIGKILL in fakes.children[0].signals


async def test_an_illegal_message_is_a_break_too(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        run = await child.inbox.receive()
        child.send(wire.Result(run=run.run, body=msgspec.Raw(b"\xc0")))  # before started
        await trio.sleep_forever()

    _fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        end = await host.run(ask(), Story())
        assert isinstance(end, Failed)
        assert end.fault.code == "engine_protocol"


async def test_crash_loop_is_paced(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        await child.inbox.receive()
        raise Died(code=1)

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        began = trio.current_time()
        for _ in range(LIMITS.restart.quarantine_after):
            await host.run(ask(), Story())
        # pauses after crash 1..4: 0, 1, 2, 4 seconds; after the fifth there is none, but a quarantine
        assert 7 <= trio.current_time() - began < 8
    assert len(fakes.children) == 5


async def test_a_bad_job_between_good_ones_costs_nobody_a_pause(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                if msgspec.msgpack.decode(message.params)["prompt"] == "boom":
                    raise Died(signal=11)
                child.send(wire.Started(run=message.run))
                child.send(wire.Result(run=message.run, body=message.params))

    fakes, opened = open_fakes(script, tmp_path)
    async with opened as host:
        began = trio.current_time()
        for _ in range(5):
            assert isinstance(await host.run(ask("good"), Story()), Done)
            assert isinstance(await host.run(ask("boom"), Story()), Failed)
        assert trio.current_time() - began < 1
    assert len(fakes.children) == 5


async def test_models_do_not_wait_for_each_other(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child, load_s=25 if child.pid == 10_000 else 0)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
                child.send(wire.Result(run=message.run, body=message.params))

    _fakes, opened = open_fakes(script, tmp_path, "slow", "quick")
    async with opened as host, trio.open_nursery() as nursery:
        nursery.start_soon(host.run, ask(model="slow"), Story())
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await host.run(ask(model="quick"), Story())
        assert trio.current_time() - began < 1


async def test_preload_loads_without_a_run(tmp_path, autojump_clock):
    _fakes, opened = open_fakes(echo, tmp_path)
    async with opened as host:
        host.preload("m")
        await trio.sleep(1)
        assert host.snapshot()[0].state == "ready"
