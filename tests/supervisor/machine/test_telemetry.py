"""The watch over the GPU reader, under a virtual clock with fake readers: silence, death, nonsense, and no GPU."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from supervisor.host.child import Exit
from supervisor.machine import telemetry
from supervisor.machine.telemetry import MAX_GARBAGE, MAX_LINE_BYTES, GpuWatch, reader_argv, simulated_argv

GIB = 2**30
UUID = "GPU-1"


def a_reading(asked: int = 0, **gpu: object) -> bytes:
    fields = {"uuid": UUID, "memory_total_bytes": 8 * GIB, "memory_used_bytes": 3 * GIB, "memory_free_bytes": 5 * GIB}
    fields["processes"] = [{"pid": 7, "bytes": 2 * GIB}]
    return json.dumps({"t": "reading", "asked": asked, "driver": "580", "gpus": [fields | gpu]}).encode() + b"\n"


NONE = b'{"t": "none", "error": "NVML Shared Library Not Found"}\n'


class FakeReader:
    """What the watch needs of a child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit: Exit | None = None
        self.written: list[bytes] = []
        self._ended = trio.Event()
        self._send, self._receive = trio.open_memory_channel[bytes](1000)

    def say(self, data: bytes) -> None:
        self._send.send_nowait(data)

    def die(self, how: Exit) -> None:
        if self.exit is None:
            self.exit = how
            self._send.close()
            self._ended.set()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.exit is not None:
            raise BrokenPipeError
        self.written.append(data)

    async def read(self) -> bytes:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return b""

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    def stderr_tail(self, _lines: int) -> list[str]:
        return ["last words"]


class Readers:
    """A drop-in for `open_child`: each start plays the next script, the last one for ever."""

    def __init__(self, *scripts: Any, unkillable: tuple[int, ...] = ()) -> None:
        self._scripts, self._unkillable = scripts, unkillable
        self.started: list[float] = []
        self.children: list[FakeReader] = []

    @contextlib.asynccontextmanager
    async def __call__(self, _spec: object, *, term_grace_s: float):
        number = len(self.started)
        self.started.append(trio.current_time())
        script = self._scripts[min(number, len(self._scripts) - 1)]
        if isinstance(script, OSError):
            raise script
        child = FakeReader(1000 + number)
        self.children.append(child)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script, child)
            try:
                yield child
            finally:
                if number in self._unkillable:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(10)
                    child.die(Exit())
                child.die(Exit(signal=15))
                nursery.cancel_scope.cancel()


async def well(child: FakeReader) -> None:
    """A reading a second."""
    while True:
        child.say(a_reading())
        await trio.sleep(1)


def then(*moves: Any) -> Any:
    """Say bytes, sleep seconds, die."""

    async def script(child: FakeReader) -> None:
        for move in moves:
            if isinstance(move, bytes):
                child.say(move)
            elif isinstance(move, Exit):
                child.die(move)
            else:
                await trio.sleep(move)
        await trio.sleep_forever()

    return script


@contextlib.asynccontextmanager
async def watching(*scripts: Any, **more: Any):
    readers = Readers(*scripts, **more)
    watch = GpuWatch(("reader",), spawn=readers, jitter=lambda: 0.5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        yield watch, readers
        nursery.cancel_scope.cancel()


async def test_readings_are_there_by_uuid(autojump_clock):
    async with watching(well) as (watch, _readers):
        assert not watch.available
        assert watch.age_s() == float("inf")
        assert watch.reason == "The GPUs have not been read yet."
        assert await watch.wait_known(5)
        assert watch.available
        assert watch.reason == ""
        assert watch.driver == "580"
        assert watch.free_bytes(UUID) == 5 * GIB
        assert watch.used_by([7, 8]) == {UUID: 2 * GIB}
        assert watch.foreign_bytes(UUID, [7]) == GIB
        assert watch.foreign_bytes(UUID, [], own_bytes=3 * GIB) == 0
        assert watch.utilisation(UUID) is None
        assert watch.free_bytes("GPU-other") is None
        await trio.sleep(3.5)
        assert watch.age_s() == pytest.approx(0.5)


async def test_a_silent_reader_makes_the_gpus_unknown_after_five_seconds_and_is_replaced(autojump_clock):
    async with watching(then(a_reading()), well) as (watch, readers):
        await watch.wait_known(5)
        seen: list[int] = []
        watch.subscribe(lambda readings: seen.append(len(readings)))
        await trio.sleep(4.9)
        assert watch.free_bytes(UUID) == 5 * GIB
        await trio.sleep(0.2)
        assert watch.readings() == {}
        assert watch.free_bytes(UUID) is None
        assert "silent" in watch.reason
        assert seen == [0]
        assert await watch.wait_known(5)
        assert readers.started == [0, pytest.approx(6)]
        assert watch.restarts == 1


async def test_events_do_not_stand_in_for_readings(autojump_clock):
    async def only_events(child: FakeReader) -> None:
        child.say(a_reading())
        while True:
            await trio.sleep(1)
            child.say(b'{"t": "event", "kind": "xid", "xid": 13}\n')

    async with watching(only_events, well) as (watch, readers):
        await watch.wait_known(5)
        await trio.sleep(5.5)
        assert not watch.available
        assert readers.children[0].exit is not None


async def test_a_dead_reader_is_replaced_with_growing_pauses(autojump_clock):
    async with watching(then(Exit(code=3))) as (watch, readers):
        await trio.sleep(200)
        pauses = [round(b - a, 1) for a, b in zip(readers.started, readers.started[1:], strict=False)]
        assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
        assert watch.reason == "The GPU reader ended with exit code 3 (last words)."
        assert not watch.no_gpu


async def test_a_reader_that_worked_starts_the_pauses_anew(autojump_clock):
    async with watching(then(Exit(code=3)), then(Exit(code=3)), then(a_reading(), 2, Exit(signal=9)), well) as (
        watch,
        readers,
    ):
        await trio.sleep(30)
        pauses = [round(b - a, 1) for a, b in zip(readers.started, readers.started[1:], strict=False)]
        assert pauses == [1.0, 2.0, 3.0]
        assert watch.available


async def test_what_a_dead_reader_said_counts_until_it_is_stale(autojump_clock):
    async with watching(then(a_reading(), Exit(code=1)), then(100)) as (watch, _readers):
        await watch.wait_known(5)
        await trio.sleep(3)
        assert watch.available
        await trio.sleep(3)
        assert not watch.available
        assert watch.used_by([7]) == {}


async def test_no_gpu_is_a_value_and_is_looked_at_again_now_and_then(autojump_clock):
    async with watching(then(NONE, Exit(code=0)), then(NONE, Exit(code=0)), well) as (watch, readers):
        assert await watch.wait_known(5)
        assert watch.no_gpu
        assert watch.reason == "There is no GPU: NVML Shared Library Not Found."
        assert not await watch.wait_for(lambda _readings: True, 1000)
        assert trio.current_time() < 1
        await trio.sleep(119)
        assert readers.started == [0, 60]
        assert watch.no_gpu
        await trio.sleep(2)
        assert watch.available
        assert not watch.no_gpu
        assert watch.restarts == 0


async def test_somebody_who_wants_to_know_need_not_wait_a_minute(autojump_clock):
    async with watching(then(NONE, Exit(code=0)), well) as (watch, readers):
        await watch.wait_known(5)
        await trio.sleep(1)
        watch.look_again()
        await trio.sleep(0.1)
        assert watch.available
        assert readers.started == [0, 1]


async def test_a_wish_to_know_is_not_lost_while_a_reader_still_ends(autojump_clock):
    async with watching(then(NONE, Exit(code=0)), well) as (watch, readers):
        watch.subscribe(lambda _readings: watch.look_again())
        await trio.sleep(1)
        assert len(readers.started) == 2
        assert watch.available


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\n", b"[]\n", b"{\n", b'{"t": "weather"}\n', b'{"t": "reading", "gpus": [{"uuid": 1}]}\n', b"\n\n"],
)
async def test_garbage_between_readings_harms_nothing(autojump_clock, line):
    async with watching(then(line, a_reading(), line, 1, line + a_reading())) as (watch, readers):
        await trio.sleep(4)
        assert watch.available
        assert len(readers.started) == 1


async def test_a_reader_that_talks_only_nonsense_is_ended(autojump_clock):
    async with watching(then(b"x\n" * (MAX_GARBAGE + 1)), well) as (watch, readers):
        await trio.testing.wait_all_tasks_blocked()
        assert watch.reason == "The GPU reader talks nonsense."
        assert readers.children[0].exit == Exit(signal=15)
        assert watch.garbage == MAX_GARBAGE + 1
        await trio.sleep(2)
        assert watch.available


async def test_a_line_without_end_is_ended_and_not_kept(autojump_clock):
    async with watching(then(*[b"x" * 2**18] * (MAX_LINE_BYTES // 2**18 + 2)), well) as (watch, readers):
        await trio.sleep(2)
        assert readers.children[0].exit is not None
        await trio.sleep(3)
        assert watch.available


async def test_lines_may_come_in_any_pieces(autojump_clock):
    whole = a_reading(busy=0.25) + b'{"t": "event", "kind": "xid", "xid": 31, "uuid": "GPU-1"}\n'
    events: list[object] = []
    async with watching(then(*[bytes([byte]) for byte in whole])) as (watch, _readers):
        watch.subscribe(on_event=events.append)
        await trio.sleep(1)
        assert watch.utilisation(UUID) == 0.25
        assert [event.xid for event in events] == [31]


async def test_recent_events_are_kept_for_whoever_asks_why_an_engine_died(autojump_clock):
    one, two = (b'{"t": "event", "kind": "xid", "xid": %d, "uuid": "GPU-%d"}\n' % pair for pair in ((13, 1), (79, 2)))
    async with watching(then(a_reading(), one, 2, a_reading() + two + a_reading(), 2, a_reading())) as (
        watch,
        _readers,
    ):
        await trio.sleep(3)
        assert [event.xid for event in watch.recent_events(10)] == [13, 79]
        assert [event.xid for event in watch.recent_events(10, "GPU-1")] == [13]
        assert [event.xid for event in watch.recent_events(1.5)] == [79]


async def test_a_reader_that_cannot_be_started_is_told(autojump_clock):
    async with watching(OSError(2, "No such file or directory")) as (watch, readers):
        await trio.sleep(10)
        assert "cannot be started" in watch.reason
        assert len(readers.started) > 1


async def test_a_reader_that_cannot_be_killed_stops_nothing_and_gets_no_second_beside_it(autojump_clock, monkeypatch):
    there = {1000}
    monkeypatch.setattr(telemetry, "_is_there", lambda pid: pid in there)
    async with watching(then(a_reading()), well, unkillable=(0,)) as (watch, readers):
        await watch.wait_known(5)
        await trio.sleep(5.1)
        assert not watch.available  # unknown at once, not when the escalation is over
        assert not await watch.wait_for(lambda _readings: True, 3)
        await trio.sleep(60)
        assert "hangs in the driver and cannot be killed" in watch.reason
        assert len(readers.started) == 1
        there.clear()
        await trio.sleep(10)
        assert watch.available
        assert len(readers.started) == 2


# ---- asking


async def answering(child: FakeReader) -> None:
    """A reading when asked for, begun 0.05 s after the question; memory comes back at 2 s."""
    told = 0
    child.say(a_reading(0))
    while True:
        await trio.sleep(0.05)
        if len(child.written) > told:
            told = len(child.written)
            used = 3 if trio.current_time() < 2 else 0
            child.say(a_reading(int(child.written[-1].split()[1]), memory_used_bytes=used * GIB))


async def test_waiting_for_memory_sees_it_soon_after_it_came_back(autojump_clock):
    async with watching(answering) as (watch, _readers):
        await watch.wait_known(5)
        assert await watch.wait_for(lambda readings: readings[UUID].memory_used_bytes == 0, 10)
        assert trio.current_time() == pytest.approx(2, abs=0.3)


async def test_waiting_does_not_believe_a_reading_from_before(autojump_clock):
    async with watching(then(a_reading(0, memory_used_bytes=0), 3, a_reading(0, memory_used_bytes=0))) as (watch, _r):
        await watch.wait_known(5)
        assert not await watch.wait_for(lambda readings: True, 4)


async def test_waiting_ends_with_its_deadline(autojump_clock):
    async with watching(answering) as (watch, _readers):
        await watch.wait_known(5)
        began = trio.current_time()
        assert not await watch.wait_for(lambda _readings: False, 1.5)
        assert trio.current_time() - began == pytest.approx(1.5)


async def test_nobody_waits_for_a_reading_when_there_will_be_none(autojump_clock):
    async with watching(answering) as (watch, _readers):
        await watch.wait_known(5)
    began = trio.current_time()
    assert not await watch.wait_for(lambda _readings: False, 10)
    assert trio.current_time() == began


async def test_waiting_goes_on_over_a_reader_that_dies(autojump_clock):
    async with watching(then(a_reading(), 0.3, Exit(signal=9)), answering) as (watch, _readers):
        await watch.wait_known(5)
        assert await watch.wait_for(lambda readings: readings[UUID].memory_used_bytes == 0, 10)


async def test_a_subscriber_may_leave(autojump_clock):
    async with watching(well) as (watch, _readers):
        seen: list[object] = []
        leave = watch.subscribe(seen.append)
        await trio.sleep(2.5)
        leave()
        leave()
        await trio.sleep(2)
        assert len(seen) == 3


def test_the_readers_of_this_installation_are_programs():
    for argv in (reader_argv(), simulated_argv(Path("script"), Path("folder"))):
        assert Path(argv[2]).is_file()


async def test_a_process_that_is_gone_is_gone():
    assert telemetry._is_there(1)
    assert not telemetry._is_there(2**22 + 1)
