"""A lane's life under a virtual clock: quarantine, suspects, runs alone, room, recycling, the outside watch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio
import trio.testing

from protocol import engine_wire as wire
from protocol.faults import Fault
from protocol.revision import ENGINE_WIRE
from supervisor.host.child import Exit
from supervisor.host.fake import (
    FAKE_SENSES,
    Died,
    FakeChild,
    FakeEngines,
    FakeScratch,
    FakeWatchdog,
    echo,
    fake_means,
    greet_and_load,
)
from supervisor.host.host import Host, open_host
from supervisor.host.incidents import Incidents
from supervisor.host.means import EverybodyFits, Occupant
from supervisor.host.quarantine import Quarantines
from supervisor.host.runs import ANSWER_S
from supervisor.host.watchdog import Diagnosis
from supervisor.host.work import Done, EngineSpec, Failed, InstanceStatus, ModelSpec, RunEnd, RunRequest
from supervisor.intake import effects as fx
from supervisor.settings import LimitsTable, RecycleTable, RestartTable

LIMITS = LimitsTable(
    start_s=10,
    load_s=30,
    first_output_s=20,
    stall_s=10,
    cancel_grace_s=2,
    term_grace_s=1,
    job_s=1000,
    restart=RestartTable(quarantine_after=3, reprobe_s=60),
)
GIB = 2**30


def spec(name: str = "m", **more: object) -> ModelSpec:
    engine = EngineSpec(name="fake", module="none", python="none")
    return ModelSpec(name=name, engine=engine, model=wire.Model(name=name, device="cpu"), **more)


def ask(words: str = "hi", model: str = "m", **more: object) -> RunRequest:
    params = msgspec.msgpack.encode({"prompt": words})
    return RunRequest(model=model, kind="llm", params=params, folder=Path("/nowhere"), **more)


def words_of(run: wire.Run) -> str:
    return str(msgspec.msgpack.decode(run.params)["prompt"])


async def worker(child: FakeChild) -> None:
    """Four slots. "boom" kills the process, "silent" does nothing, "N" works for N seconds and shows it."""
    await greet_and_load(child, slots=4)

    async def one(run: wire.Run) -> None:
        words = words_of(run)
        child.send(wire.Started(run=run.run))
        if words == "silent":
            await trio.sleep_forever()
        for n in range(int(words)):
            child.send(wire.Progress(run=run.run, n=n))
            await trio.sleep(1)
        child.send(wire.Result(run=run.run, body=run.params))

    async with trio.open_nursery() as nursery:
        async for message in child.inbox:
            if isinstance(message, wire.Run) and words_of(message) == "boom":
                nursery.cancel_scope.cancel()
                break
            if isinstance(message, wire.Run):
                nursery.start_soon(one, message)
        else:
            return
    raise Died(signal=11)


async def crasher(child: FakeChild) -> None:
    """Loads, then dies of the first run."""
    await greet_and_load(child)
    async for message in child.inbox:
        if isinstance(message, wire.Run):
            raise Died(code=1)


class Yard:
    """A host with fakes, and runs in the background by name."""

    def __init__(self, host: Host, fakes: FakeEngines, nursery: trio.Nursery) -> None:
        self.host, self.fakes, self._nursery = host, fakes, nursery
        self.ends: dict[str, RunEnd] = {}
        self.ended_at: dict[str, float] = {}

    async def begin(self, words: str, name: str = "", **more: object) -> None:
        async def one() -> None:
            self.ends[name or words] = await self.host.run(ask(words, label=name or words, **more), lambda _event: None)
            self.ended_at[name or words] = trio.current_time()

        self._nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()

    async def fault(self, words: str = "1", **more: object) -> Fault:
        end = await self.host.run(ask(words, **more), lambda _event: None)
        assert isinstance(end, Failed)
        return end.fault

    def fault_of(self, name: str) -> Fault:
        end = self.ends[name]
        assert isinstance(end, Failed), end
        return end.fault

    @property
    def status(self) -> InstanceStatus:
        return self.host.snapshot()[0]


@contextlib.asynccontextmanager
async def yard(script, tmp_path: Path, *, models=None, limits=LIMITS, **more: object) -> AsyncIterator[Yard]:
    fakes = FakeEngines(script)
    means = fake_means(fakes, **more)
    async with (
        open_host(models or [spec()], limits, tmp_path / "s", means=means) as host,
        trio.open_nursery() as nursery,
    ):
        yield Yard(host, fakes, nursery)
        nursery.cancel_scope.cancel()


# ---- restart and quarantine


async def test_what_a_suspect_does_alone_is_its_own_doing_and_not_the_models(tmp_path, autojump_clock):
    async with yard(crasher, tmp_path) as it:
        for _ in range(5):
            assert (await it.fault(alone=True)).detail["alone"] is True
        await trio.testing.wait_all_tasks_blocked()
        assert it.status.state == "cold"
        for _ in range(3):
            assert (await it.fault()).code == "engine_crashed"
        await trio.testing.wait_all_tasks_blocked()
        assert it.status.state == "quarantined"


async def test_a_crash_loop_ends_in_quarantine_and_a_probe_brings_it_back(tmp_path, autojump_clock):
    probed: list[float] = []
    good = False

    async def script(child: FakeChild) -> None:
        await (echo(child) if good else crasher(child))

    async def reprobe(_spec: ModelSpec) -> str:
        await trio.lowlevel.checkpoint()
        probed.append(trio.current_time())
        return "" if len(probed) == 2 else "It still crashes."

    async with yard(script, tmp_path, reprobe=reprobe) as it:
        for _ in range(3):
            assert (await it.fault()).code == "engine_crashed"
        began = trio.current_time()
        await trio.testing.wait_all_tasks_blocked()
        assert it.status.state == "quarantined"
        fault = await it.fault()
        assert trio.current_time() == began
        assert (fault.code, fault.may_retry, fault.detail["cause"]) == ("quarantined", True, "engine_crashed")
        assert "exit code 1" in fault.message
        assert it.status.blocked
        assert "exit code 1" in it.status.reason
        await trio.sleep(61)
        assert "still crashes" in (await it.fault()).message
        good = True
        await trio.sleep(130)
        assert [round(at - began) for at in probed] == [60, 180]
        assert (it.status.state, it.status.blocked, it.status.reason) == ("cold", False, "")
        assert isinstance(await it.host.run(ask(), lambda _event: None), Done)


async def test_those_who_wait_are_answered_when_the_quarantine_begins(tmp_path, autojump_clock):
    async with yard(crasher, tmp_path) as it:
        for name in "abcd":
            await it.begin("1", name)
        await trio.sleep(5)
        assert [it.fault_of(name).code for name in "abcd"] == ["engine_crashed"] * 3 + ["quarantined"]


async def test_quarantine_survives_the_supervisor(tmp_path, autojump_clock):
    memory = Quarantines(tmp_path / "quarantine.json")
    async with yard(crasher, tmp_path, memory=memory) as it:
        for _ in range(3):
            await it.fault()
        await trio.testing.wait_all_tasks_blocked()
    async with yard(echo, tmp_path, memory=memory) as it:
        assert it.status.state == "quarantined"  # before anything else had a turn
        assert (await it.fault()).code == "quarantined"
        await trio.sleep(61)
        assert isinstance(await it.host.run(ask(), lambda _event: None), Done)
    async with yard(echo, tmp_path, memory=memory) as it:
        assert it.status.state == "cold"


# ---- suspects, and runs alone


async def test_a_crash_with_several_in_flight_makes_them_suspects_and_one_alone_is_told_so(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        await it.begin("50")
        await it.begin("40")
        await it.begin("boom")
        for name in ("50", "40", "boom"):
            fault = it.fault_of(name)
            assert (fault.code, fault.detail.get("suspects"), fault.detail.get("alone")) == ("engine_crashed", 3, None)
        fault = await it.fault("boom")
        assert (fault.detail.get("suspects"), fault.detail.get("alone")) == (None, True)
        assert fault.detail["end"] == "signalled"


async def test_a_run_that_was_given_up_is_still_a_suspect(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        await it.begin("silent")
        await it.begin("50")
        it.host.cancel("silent")
        await trio.sleep(3)
        assert it.fault_of("silent").code == "cancelled"
        it.fakes.children[0].die(Exit(signal=11))
        await trio.testing.wait_all_tasks_blocked()
        assert it.fault_of("50").detail["suspects"] == 2


async def test_a_run_that_wants_to_be_alone_waits_for_it_and_is_not_disturbed(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        await it.begin("5", "before")
        await it.begin("7", "alone", alone=True)
        await it.begin("1", "after")
        await it.begin("2", "after too")
        await trio.sleep(20)
        assert [round(it.ended_at[name]) for name in ("before", "alone", "after", "after too")] == [5, 12, 13, 14]


async def test_a_cancelled_run_that_wanted_to_be_alone_lets_the_others_in(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        await it.begin("50", "before")
        await it.begin("1", "alone", alone=True)
        await it.begin("1", "after")
        await trio.sleep(3)
        it.host.cancel("alone")
        await trio.sleep(2)
        assert isinstance(it.ends["after"], Done)


# ---- starts and ends that go wrong


async def test_a_folder_that_cannot_be_made_is_a_failed_load_and_not_our_end(tmp_path, autojump_clock):
    async with yard(echo, tmp_path) as it:
        (tmp_path / "s" / "m0").write_text("in the way")
        fault = await it.fault()
        assert fault.code == "load_failed"
        assert it.status.blocked
        (tmp_path / "s" / "m0").unlink()
        await trio.sleep(5)
        assert isinstance(await it.host.run(ask(), lambda _event: None), Done)


async def test_an_engine_that_closes_its_output_is_ended(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        await child.inbox.receive()
        child.close_stdout()
        await trio.sleep_forever()

    async with yard(script, tmp_path) as it:
        fault = await it.fault()
        assert (fault.code, fault.detail["end"]) == ("engine_crashed", "closed-output")
        assert "closed its output" in fault.message
        await trio.sleep(1)
        assert it.fakes.children[0].exit is not None
        assert it.status.last_end == "ended because it closed its output while it ran a job"


async def test_one_that_says_no_hello_names_it(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await trio.sleep_forever()

    async with yard(script, tmp_path) as it:
        fault = await it.fault()
        assert (fault.code, fault.detail["end"], fault.detail["diagnosis"]) == ("engine_hung", "no-hello", "working")
        await trio.sleep(1.5)
        assert it.status.last_end == "ended because it did not say hello within 10 s"


# ---- ends that we wanted


async def test_an_idle_instance_is_ended_for_want_of_work_and_that_counts_for_nothing(tmp_path, autojump_clock):
    async with yard(echo, tmp_path, models=[spec(keep_alive_s=30.0)]) as it:
        for _ in range(4):  # more often than a quarantine takes
            assert isinstance(await it.host.run(ask(), lambda _event: None), Done)
            await trio.sleep(29)
            assert it.status.state == "ready"
            assert it.status.idle_s == 29
            await trio.sleep(5)
            assert (it.status.state, it.status.idle_s, it.status.pid) == ("cold", None, 0)
        assert it.status.last_end == "ended for want of work (idle for 30 s)"
    assert len(it.fakes.children) == 4


async def test_work_within_the_time_keeps_it(tmp_path, autojump_clock):
    async with yard(echo, tmp_path, models=[spec(keep_alive_s=30.0)]) as it:
        for _ in range(5):
            await it.host.run(ask(), lambda _event: None)
            await trio.sleep(25)
        assert len(it.fakes.children) == 1


def on_gpu(name: str = "m", **more: object) -> ModelSpec:
    return msgspec.structs.replace(spec(name, **more), model=wire.Model(name=name, device="cuda"))


FREE = fx.HoldPut("", "the owner wants the memory", unload=True, finish=True)


async def test_eviction_ends_an_idle_instance_at_once_and_a_busy_one_when_it_is_done(tmp_path, autojump_clock):
    async with yard(worker, tmp_path, models=[on_gpu()]) as it:
        (lane,) = it.host.occupants
        await it.begin("0")
        assert lane.idle_since == 0.0
        it.host.deciding.tell(FREE)
        await trio.sleep(5)
        assert (it.status.state, it.status.last_end) == ("cold", "unloaded (the owner wants the memory)")
        assert "the owner wants the memory" in it.status.reason
        it.host.deciding.tell(fx.HoldLifted(""))
        await it.begin("5")
        assert lane.idle_since is None
        it.host.deciding.tell(FREE)
        await it.begin("2", "next")  # it came while there was an instance with a slot
        await trio.sleep(4)
        assert it.status.state == "busy"
        await trio.sleep(20)
        assert isinstance(it.ends["5"], Done)
        assert isinstance(it.ends["next"], Done)
        assert (it.status.state, len(it.fakes.children)) == ("cold", 2)


async def slow(child: FakeChild) -> None:
    """Takes ten seconds to load, and says how far it is."""
    low, high = ENGINE_WIRE.low, ENGINE_WIRE.high
    child.send(wire.Hello(engine="fake", kinds=("llm",), low=low, high=high, pid=child.pid))
    assert isinstance(await child.inbox.receive(), wire.Load)
    for tenth in range(100):
        child.send(wire.Progress(run=wire.NO_RUN, n=tenth, total=100))
        await trio.sleep(0.1)
    child.send(wire.Ready(device="cpu", slots=1))
    async for message in child.inbox:
        if isinstance(message, wire.Run):
            child.send(wire.Started(run=message.run))
            child.send(wire.Result(run=message.run, body=message.params))


async def test_a_load_that_somebody_waits_for_goes_on(tmp_path, autojump_clock):
    async with yard(slow, tmp_path, models=[on_gpu()]) as it:
        await it.begin("1")
        it.host.deciding.tell(FREE)
        await trio.sleep(11)
        assert isinstance(it.ends["1"], Done)
        assert len(it.fakes.children) == 1


async def test_a_load_that_nobody_waits_for_any_more_is_cancelled(tmp_path, autojump_clock):
    async with yard(slow, tmp_path) as it:
        await it.begin("1")
        await trio.sleep(5)
        assert it.status.state == "loading"
        it.host.cancel("1")
        await trio.sleep(LIMITS.term_grace_s + 3)
        assert it.fault_of("1").code == "cancelled"
        assert it.fakes.children[0].exit is not None
        assert (it.status.state, it.status.last_end) == ("cold", "unloaded (nobody waits for it any more)")
        assert isinstance(await it.host.run(ask(), lambda _event: None), Done)
        assert len(it.fakes.children) == 2


async def test_a_load_that_is_nearly_done_and_one_that_was_wished_for_are_finished(tmp_path, autojump_clock):
    async with yard(slow, tmp_path, models=[spec(), spec("wished")]) as it:
        await it.begin("1")
        it.host.preload("wished")
        await trio.testing.wait_all_tasks_blocked()
        await it.begin("2", model="wished")
        await trio.sleep(9.5)
        it.host.cancel("1")
        it.host.cancel("2")
        await trio.sleep(1)
        assert [one.state for one in it.host.snapshot()] == ["ready", "ready"]


async def test_a_model_with_two_copies_works_on_two_instances(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
                await trio.sleep(60)
                child.send(wire.Result(run=message.run, body=message.params))

    limits = msgspec.structs.replace(LIMITS, first_output_s=100.0, stall_s=100.0)
    async with yard(script, tmp_path, limits=limits, models=[spec(copies=2)]) as it:
        for name in "abcdef":
            await it.begin(name)
        assert [(one.copy, one.queued) for one in it.host.snapshot()] == [(0, 5), (1, 0)]
        await trio.sleep(70)  # what a run takes is known: another copy pays
        assert [one.state for one in it.host.snapshot()] == ["busy", "busy"]
        assert len(it.fakes.children) == 2
        it.fakes.children[1].die(Exit(signal=9))
        await trio.sleep(400)
        assert sorted(isinstance(end, Done) for end in it.ends.values()) == [False] + [True] * 5


async def test_worn_instances_are_replaced_between_two_jobs(tmp_path, autojump_clock):
    rss = {"now": GIB}
    limits = msgspec.structs.replace(LIMITS, recycle=RecycleTable(rss_growth_gb=2))
    senses = FAKE_SENSES._replace(rss_bytes=lambda _pid: rss["now"])
    async with yard(worker, tmp_path, limits=limits, models=[spec(memory_bytes=99 * GIB)], senses=senses) as it:
        for _ in range(4):
            await it.begin("1")
            await trio.sleep(3)
        await it.begin("8", "long")
        rss["now"] = 5 * GIB
        await trio.sleep(4)
        assert it.status.rss_bytes == 5 * GIB
        assert it.status.state == "busy"  # what a run holds is no leak: nothing is judged before it is done
        await it.begin("1", "next")
        rss["now"] = 4 * GIB
        await trio.sleep(20)
        assert isinstance(it.ends["long"], Done)
        assert isinstance(it.ends["next"], Done)
        assert "grew by 3.0 GiB" in it.status.last_end
        assert it.status.state == "ready"  # replaced, though nobody waits
        assert len(it.fakes.children) == 2


async def test_age_and_jobs_recycle_a_busy_instance_after_a_drain(tmp_path, autojump_clock):
    limits = msgspec.structs.replace(LIMITS, recycle=RecycleTable(after_jobs=2))
    async with yard(worker, tmp_path, limits=limits) as it:
        await it.begin("9", "a")
        await it.begin("1", "b")
        await it.begin("2", "c")
        await trio.sleep(4)
        await it.begin("1", "d")
        assert it.status.state == "draining"
        assert it.status.queued == 1
        await trio.sleep(20)
        assert all(isinstance(end, Done) for end in it.ends.values())
        assert len(it.fakes.children) == 2


# ---- the room


class Walls(EverybodyFits):
    """A room that lets in when told; keeps what it saw."""

    def __init__(self) -> None:
        self.open_now = trio.Event()
        self.story: list[str] = []

    @contextlib.asynccontextmanager
    async def place(self, who: Occupant, number: int, shares: Mapping[str, int]) -> AsyncIterator[None]:
        await self.open_now.wait()
        self.story.append(f"in {number} {dict(shares)}")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)  # until the memory is back
            self.story.append(f"out, pid {who.pid}")


async def test_an_instance_lives_inside_its_place_in_the_room(tmp_path, autojump_clock):
    room = Walls()
    async with yard(echo, tmp_path, room=room, models=[spec(keep_alive_s=1.0)]) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.host.run, ask(), lambda _event: None)
            await trio.sleep(3)
            assert it.status.state == "starting"
            assert it.fakes.children == []
            room.open_now.set()
        await trio.sleep(2)
        assert it.fakes.children[0].exit is not None
        assert (it.status.state, it.status.pid, room.story) == ("stopping", 0, ["in 1 {}"])
        await trio.sleep(2)
        assert (it.status.state, room.story) == ("cold", ["in 1 {}", "out, pid 0"])
        assert it.status.last_end == "ended for want of work (idle for 1 s)"


# ---- from outside


async def test_an_engine_that_will_never_answer_is_ended_before_its_limit(tmp_path, autojump_clock):
    dogs: list[FakeWatchdog] = []

    def watchdog(_pid: int) -> FakeWatchdog:
        dogs.append(FakeWatchdog())
        return dogs[-1]

    limits = msgspec.structs.replace(LIMITS, first_output_s=500.0)
    incidents = Incidents(tmp_path / "incidents")
    senses = FAKE_SENSES._replace(watchdog=watchdog)
    async with yard(worker, tmp_path, limits=limits, senses=senses, incidents=incidents) as it:
        await it.begin("silent")
        dogs[0].diagnosis = Diagnosis.BUSY_IN_C
        await trio.sleep(100)
        assert "silent" not in it.ends  # what only classifies ends nothing
        dogs[0].diagnosis = Diagnosis.WEDGED
        began = trio.current_time()
        await trio.sleep(15)
        fault = it.fault_of("silent")
        assert 9 < it.ended_at["silent"] - began < 13
        assert (fault.code, fault.detail["diagnosis"], fault.detail["end"]) == ("engine_hung", "wedged", "wedged")
        assert fault.detail["alone"] is True
        assert any("most recent call first" in line for line in fault.detail["stderr_tail"])
        await trio.sleep(5)
        (incident,) = incidents.recent()
        assert (incident.diagnosis, incident.code, incident.runs) == ("wedged", "engine_hung", ("silent",))
        assert incident.stacks
        assert "wedged" in incident.how
        assert "beat" in dogs[0].calls
        assert "progress" in dogs[0].calls


async def test_a_stall_carries_its_diagnosis_though_the_engine_obeys_the_cancel(tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.send(wire.Started(run=message.run))
            elif isinstance(message, wire.Cancel):
                child.send(wire.RunFault(run=message.run, fault=Fault("cancelled", "Done.")))

    async with yard(script, tmp_path) as it:
        fault = await it.fault()
        assert (fault.code, fault.detail["diagnosis"], fault.detail["alone"]) == ("engine_hung", "working", True)
        assert fault.detail["stderr_tail"]
        assert len(it.fakes.children) == 1


async def test_memory_over_the_ceiling_ends_the_instance(tmp_path, autojump_clock):
    rss = {"now": GIB}
    senses = FAKE_SENSES._replace(rss_bytes=lambda _pid: rss["now"])
    async with yard(worker, tmp_path, models=[spec(memory_bytes=4 * GIB)], senses=senses) as it:
        await it.begin("50")
        rss["now"] = 5 * GIB
        await trio.sleep(5)
        fault = it.fault_of("50")
        assert (fault.code, fault.detail["end"], fault.detail["alone"]) == ("out_of_memory", "memory", True)
        assert "5.00 GiB" in fault.message
        assert "4.00 GiB" in fault.message


async def test_a_scratch_folder_over_its_limit_ends_the_instance(tmp_path, autojump_clock):
    folders: list[FakeScratch] = []

    def scratch(*args: Any) -> FakeScratch:
        folders.append(FakeScratch(*args))
        return folders[-1]

    senses = FAKE_SENSES._replace(scratch=scratch)
    async with yard(worker, tmp_path, senses=senses) as it:
        await it.begin("50")
        folders[0].size_bytes = int(LIMITS.scratch_gb * GIB) + 1
        await trio.sleep(10)
        assert (it.fault_of("50").code, it.fault_of("50").detail["end"]) == ("engine_crashed", "scratch")


async def test_a_kill_by_the_kernel_for_want_of_memory_is_told_apart(tmp_path, autojump_clock):
    kills = {"now": 3}
    senses = FAKE_SENSES._replace(oom_kills=lambda: kills["now"])
    async with yard(worker, tmp_path, senses=senses) as it:
        await it.begin("50")
        await trio.sleep(3)
        it.fakes.children[0].die(Exit(signal=9))  # by somebody
        await trio.testing.wait_all_tasks_blocked()
        assert it.fault_of("50").code == "engine_crashed"
        await it.begin("40")
        await trio.sleep(3)
        kills["now"] = 4
        it.fakes.children[1].die(Exit(signal=9))
        await trio.testing.wait_all_tasks_blocked()
        fault = it.fault_of("40")
        assert (fault.code, fault.detail["end"]) == ("out_of_memory", "oom-killed")
        assert "for want of memory" in fault.message


async def test_beside_a_stuck_run_neighbours_that_do_not_move_are_not_waited_for(tmp_path, autojump_clock):
    limits = msgspec.structs.replace(LIMITS, first_output_s=200.0)
    async with yard(worker, tmp_path, limits=limits) as it:
        await it.begin("silent", "stuck")
        await it.begin("silent", "neighbour")
        it.host.cancel("stuck")
        await trio.sleep(50)
        assert it.fault_of("stuck").code == "cancelled"
        assert "neighbour" not in it.ends
        await trio.sleep(60)
        fault = it.fault_of("neighbour")
        assert (fault.code, fault.detail["suspects"], fault.detail["end"]) == ("engine_hung", 2, "hung")
        assert 100 <= it.ended_at["neighbour"] < 105


# ---- escalation


async def test_a_process_that_cannot_be_killed_costs_its_lane_and_nobody_else(tmp_path, autojump_clock):
    told: list[tuple[str, str, tuple[str, ...]]] = []

    async def script(child: FakeChild) -> None:
        first = len(fakes.children) == 1
        child.deaf_to_term = child.deaf_to_kill = first
        await worker(child)

    model = wire.Model(name="m", device="cuda", devices=("GPU-1",))
    models = [msgspec.structs.replace(spec(), model=model), spec("other")]
    async with yard(script, tmp_path, models=models) as it:
        fakes = it.fakes
        it.host.on_unkillable = lambda which, devices, _pid: told.append(("stuck", which.name, devices))
        it.host.on_late_death = lambda which, devices, _pid: told.append(("dead", which.name, devices))
        await it.begin("silent")
        await trio.sleep(23)
        assert it.fault_of("silent").code == "engine_hung"  # nobody waits for the escalation
        other = await it.host.run(ask("1", model="other"), lambda _event: None)
        assert isinstance(other, Done)
        await trio.sleep(20)
        assert it.status.state == "quarantined"
        assert told == [("stuck", "m", ("GPU-1",))]
        assert "cannot be killed" in it.status.reason
        assert "GPU-1" in it.status.reason
        assert (await it.fault()).code == "quarantined"
        await trio.sleep(200)
        assert it.status.state == "quarantined"  # no probe passes while it is there
        it.fakes.children[0].die(Exit(signal=9))
        await trio.testing.wait_all_tasks_blocked()
        assert told[1:] == [("dead", "m", ("GPU-1",))]
        assert it.status.state == "cold"
        assert isinstance(await it.host.run(ask("1"), lambda _event: None), Done)


async def test_callers_who_hang_up_on_an_engine_deaf_to_cancels_put_no_model_out_of_service(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        for number in range(5):
            await it.begin("silent", f"r{number}")
            it.host.cancel(f"r{number}")
            await trio.sleep(5)
        assert it.status.state == "cold"
        assert "ignored a cancel" in it.status.last_end
        assert len(it.fakes.children) == 5


# ---- the machine sleeps, or we stand still


async def test_a_sleep_of_the_machine_counts_for_deadlines_and_not_for_silence(tmp_path, autojump_clock):
    async with yard(worker, tmp_path) as it:
        await it.begin("90", "long", deadline_s=600.0)
        await it.begin("90", "short", deadline_s=100.0)
        await trio.sleep(5)
        it.host.slept(550)
        await trio.sleep(LIMITS.cancel_grace_s + LIMITS.cancel_grace_s + 0.5)
        assert it.fault_of("short").code == "deadline_exceeded"
        assert it.ended_at["short"] == 5 + 2 + ANSWER_S  # the least that it is left, then a cancel
        assert "long" not in it.ends
        await trio.sleep(45)
        assert it.fault_of("long").code == "deadline_exceeded"


async def test_a_run_is_not_blamed_for_the_time_that_we_stood_still(tmp_path, mock_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        run = await child.inbox.receive()
        child.send(wire.Started(run=run.run))
        # It worked all the while; what it says is read only when we go on.
        await trio.sleep(500.5)
        child.send(wire.Result(run=run.run, body=run.params))
        await trio.sleep_forever()

    async with yard(script, tmp_path) as it:
        await it.begin("1")
        mock_clock.jump(500)
        mock_clock.autojump_threshold = 0
        await trio.sleep(5)
        assert isinstance(it.ends["1"], Done)


async def test_trouble_in_a_callback_costs_no_lane(tmp_path, autojump_clock, caplog):
    def trouble() -> None:
        raise RuntimeError("trouble")

    async with yard(worker, tmp_path) as it:
        it.host.on_change = trouble
        assert isinstance(await it.host.run(ask("1"), lambda _event: None), Done)
        await it.begin("boom")
        await trio.sleep(1)
        assert it.fault_of("boom").code == "engine_crashed"
        assert isinstance(await it.host.run(ask("1"), lambda _event: None), Done)
    assert "trouble" in caplog.text
