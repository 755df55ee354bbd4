"""The table of diagnoses, row by row, and each row on a real child that really does it."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from protocol import work
from protocol.framing import FrameDecoder
from supervisor.host import procfs
from supervisor.host.child import Child, ChildSpec, open_child
from supervisor.host.launching import engine_child
from supervisor.host.watchdog import STRIKES, Bounds, Diagnosis, Facts, Watchdog, classify
from supervisor.host.work import EngineSpec

D = Diagnosis
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# What has just been heard, and what has not been heard for long.
FRESH, OLD = 0.1, 60.0

TABLE = [
    # beat, progress, cpu, state, then what is special, then the diagnosis
    (FRESH, None, 0.0, "S", {}, D.WORKING),  # nothing to do
    (FRESH, FRESH, 0.0, "S", {}, D.WORKING),  # waits for something, and it moves
    (None, FRESH, 0.0, "S", {}, D.WORKING),  # starts
    (FRESH, OLD, 2.0, "R", {}, D.WORKING),  # numpy: long steps without a word
    (FRESH, OLD, 0.0, "S", {}, D.DEADLOCKED),
    (None, OLD, 0.0, "S", {}, D.DEADLOCKED),  # never said hello
    (FRESH, OLD, None, "S", {}, D.UNKNOWN),  # first look
    (FRESH, OLD, 0.1, "S", {}, D.UNKNOWN),  # neither works nor sleeps
    (FRESH, OLD, 0.0, "S", {"gpu_share": 0.9}, D.WORKING),  # sleeps until its kernel is done
    (FRESH, OLD, 0.0, "S", {"gpu_share": 0.0, "on_gpu": True}, D.DEADLOCKED),
    (FRESH, OLD, 0.0, "S", {"on_gpu": True}, D.UNKNOWN),
    (FRESH, OLD, 0.0, "D", {"state_s": 1.0}, D.WORKING),  # a disk that answers
    (FRESH, OLD, 0.0, "D", {"state_s": 5.1}, D.UNINTERRUPTIBLE),
    (FRESH, FRESH, 0.5, "D", {"state_s": 60.0}, D.WORKING),  # one thread hangs, and the work goes on
    (OLD, OLD, 1.0, "R", {}, D.BUSY_IN_C),
    (OLD, None, 1.0, "S", {}, D.BUSY_IN_C),
    (OLD, OLD, 0.01, "R", {"state_s": 2.0}, D.BUSY_IN_C),  # would run if the box let it
    (OLD, OLD, 0.01, "R", {}, D.WEDGED),  # a thread that looked for the interpreter lock just then
    (OLD, OLD, 0.0, "S", {"gpu_share": 0.5}, D.BUSY_IN_C),
    (OLD, OLD, 0.0, "S", {}, D.WEDGED),
    (OLD, FRESH, 0.0, "S", {}, D.WEDGED),
    (OLD, OLD, 0.0, "S", {"gpu_share": 0.0, "on_gpu": True}, D.WEDGED),
    (OLD, OLD, 0.0, "S", {"on_gpu": True}, D.UNKNOWN),
    (OLD, OLD, None, "S", {}, D.UNKNOWN),
    (OLD, OLD, 0.0, "D", {"state_s": 60.0}, D.UNINTERRUPTIBLE),
    (FRESH, FRESH, 0.0, "T", {}, D.STOPPED),
    (OLD, OLD, 0.0, "t", {}, D.STOPPED),
    (OLD, OLD, 0.0, "Z", {}, D.UNKNOWN),
    (OLD, OLD, None, "", {}, D.UNKNOWN),
]


@pytest.mark.parametrize(("beat", "progress", "cpu", "state", "special", "expected"), TABLE)
def test_the_table(beat, progress, cpu, state, special, expected):
    assert classify(Facts(beat_s=beat, progress_s=progress, cpu_share=cpu, state=state, **special)) is expected


def test_every_diagnosis_has_its_row_and_its_sentence():
    assert {row[-1] for row in TABLE} == set(Diagnosis)
    assert all(diagnosis.describe().endswith(".") for diagnosis in Diagnosis)


# ---- strikes and ages, on a recorded /proc and a clock of our own


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(
    root: Path, pid: int, *, state: str = "S", ticks: int = 5, threads: tuple[tuple[int, str, int], ...] = ()
) -> None:
    """Lay down /proc/<pid>; threads are (number, state, nanoseconds run), the first of them the leader."""

    def line(number: int, letter: str) -> str:
        numbers = f"1 {pid} {pid} 0 -1 4194304 7 0 0 0 {ticks} 0 0 0 20 0 1 0 9000 1 1"
        return f"{number} (a (nasty) name) {letter} {numbers}\n"

    folder = root / str(pid)
    for number, letter, ran in threads or ((pid, state, 1),):
        task = folder / "task" / str(number)
        task.mkdir(parents=True, exist_ok=True)
        (task / "stat").write_text(line(number, letter))
        (task / "schedstat").write_text(f"{ran} 2 3\n")
        (task / "wchan").write_text("0" if letter == "R" else f"waits_in_{letter}")
        (task / "children").write_text("")
    (folder / "stat").write_text(line(pid, state))
    (folder / "wchan").write_text("ep_poll")
    (folder / "status").write_text(f"Name:\tx\nUid:\t7\t7\t7\t7\nNSpid:\t{pid}\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(procfs, "ROOT", str(tmp_path))
    return tmp_path


async def sampled(dog: Watchdog, clock: Clock, seconds: float) -> Diagnosis:
    """Let time pass and look once a second, as the owner does."""
    for _ in range(round(seconds)):
        clock.now += 1
        await dog.sample()
    return dog.diagnosis


async def test_two_strikes_make_it_hopeless_and_an_answer_clears_them(proc: Path):
    clock = Clock()
    record(proc, 77)
    dog = Watchdog(77, clock=clock)
    dog.beat()
    dog.progress()
    await dog.sample()
    assert await sampled(dog, clock, 3) is D.WORKING
    assert await sampled(dog, clock, 1) is D.WEDGED
    await sampled(dog, clock, 5)
    assert dog.strikes == 1
    await sampled(dog, clock, 5)
    assert dog.strikes == 2
    dog.beat()
    await dog.sample()
    assert (dog.diagnosis, dog.strikes) == (D.DEADLOCKED, 0)
    assert dog.facts().beat_s == 0
    assert dog.facts().progress_s == 14


async def test_a_supervisor_that_was_away_blames_nobody(proc: Path):
    clock = Clock()
    record(proc, 77)
    dog = Watchdog(77, clock=clock)
    dog.beat()
    dog.progress()
    await dog.sample()
    clock.now += 3600
    assert await dog.sample() is D.WORKING
    assert dog.strikes == 0
    assert await sampled(dog, clock, 4) is D.WEDGED  # and after that the usual patience holds


async def test_the_machines_sleep_counts_for_nobody(proc: Path):
    clock = Clock()
    record(proc, 77)
    dog = Watchdog(77, clock=clock)
    dog.beat()
    clock.now += 2
    dog.slept(1.5)
    assert dog.facts().beat_s == 0.5
    dog.slept(100)
    assert dog.facts().beat_s == 0


async def test_a_thread_that_hangs_in_the_kernel_is_found_behind_a_leader_that_sleeps(proc: Path):
    clock = Clock()
    threads = ((77, "S", 10), (78, "R", 1), (79, "D", 500))
    record(proc, 77, threads=threads)
    dog = Watchdog(77, clock=clock)
    dog.beat()
    dog.progress()
    await sampled(dog, clock, 6)
    assert dog.diagnosis is D.BUSY_IN_C  # five seconds are not over
    await sampled(dog, clock, 3)
    assert dog.diagnosis is D.UNINTERRUPTIBLE
    assert dog.facts().wchan == "waits_in_D"
    record(proc, 77, threads=(*threads[:2], (79, "D", 501)))  # it ran in between: a slow disk, no hang
    await sampled(dog, clock, 1)
    assert dog.diagnosis is D.BUSY_IN_C
    assert dog.facts().state_s == 0


async def test_cpu_is_a_share_of_the_last_seconds(proc: Path):
    clock = Clock()
    dog = Watchdog(77, clock=clock)
    shares = []
    for ticks in (100, 150, 150, 150, 150, 150, 450):
        record(proc, 77, ticks=ticks)
        await dog.sample()
        shares.append(dog.facts().cpu_share)
        clock.now += 1
    hz = procfs.TICKS_PER_S
    assert shares == [None, 50 / hz, 25 / hz, pytest.approx(50 / 3 / hz), 0, 0, 100 / hz]


async def test_what_is_gone_is_unknown(proc: Path):
    dog = Watchdog(77)
    assert await dog.sample() is D.UNKNOWN
    assert dog.facts() == Facts()


@pytest.mark.parametrize("text", ["", "1", "1 (x", "1 (x) S", "1 (x) S " + "y " * 30, ") 1 (", "\0" * 50])
async def test_what_is_no_stat_line_is_no_process(proc: Path, text: str):
    (proc / "77").mkdir()
    (proc / "77" / "stat").write_text(text)
    assert procfs.parse_stat(text) is None
    assert await Watchdog(77).sample() is D.UNKNOWN


async def test_whatever_stat_says_the_watchdog_survives(proc: Path):
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    record(proc, 77)
    good = (proc / "77" / "stat").read_bytes()
    dog = Watchdog(77)
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(dice.randrange(1, 8)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        (proc / "77" / "stat").write_bytes(bad)
        assert await dog.sample() in Diagnosis, f"seed {seed}"


# ---- real children: each says b from a thread of its own, as an engine answers pings

QUICK = Bounds(late_s=0.6, strike_s=0.3, uninterruptible_s=0.6)
PREAMBLE = """
import ctypes, os, signal, sys, threading, time
def beats():
    while True:
        os.write(1, b"b")
        time.sleep(0.05)
threading.Thread(target=beats, daemon=True).start()
libc, held = ctypes.CDLL(None), ctypes.PyDLL(None)  # the second one keeps the interpreter lock
os.write(1, b"go")
"""
CHILDREN = {
    "idle, nothing to do": ("rest", "time.sleep(60)", D.WORKING),
    "native call, lock free": ("", "libc.usleep(60_000_000)", D.DEADLOCKED),
    "pure Python": ("", "while True: pass", D.WORKING),
    "numpy": ("", "import numpy as np\na = np.ones((400, 400))\nwhile True: a @ a", D.WORKING),
    "regex, lock held": ("", "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", D.BUSY_IN_C),
    "sleep, lock held": ("", "held.usleep(60_000_000)", D.WEDGED),
    "native mutex, lock held": (
        "",
        "m = ctypes.create_string_buffer(64)\nheld.pthread_mutex_lock(m)\nheld.pthread_mutex_lock(m)",
        D.WEDGED,
    ),
    "Python lock": ("", "lock = threading.Lock()\nlock.acquire()\nlock.acquire()", D.DEADLOCKED),
    "stopped": ("", "os.kill(os.getpid(), signal.SIGSTOP)", D.STOPPED),
    # glibc waits for the child of a posix_spawn in state D until that has called exec, which it never does here.
    "uninterruptible": (
        "",
        "os.mkfifo(sys.argv[1])\n"
        "opens = [(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]\n"
        "os.posix_spawn('/bin/true', ['true'], {}, file_actions=opens)",
        D.UNINTERRUPTIBLE,
    ),
}
SOFT = {D.WEDGED, D.STOPPED, D.UNINTERRUPTIBLE}


def python(tmp_path: Path, code: str) -> ChildSpec:
    return ChildSpec(name="row", argv=(sys.executable, "-c", PREAMBLE + code, str(tmp_path / "fifo")), lifeline=False)


async def hear(child: Child, dog: Watchdog, started: trio.Event) -> None:
    heard = b""
    while data := await child.read():
        dog.beat()
        heard = (heard + data)[-64:]
        if b"go" in heard:
            started.set()


async def settled(dog: Watchdog, expected: Diagnosis) -> list[Diagnosis]:
    """Look until the diagnosis has been the expected one for five looks in a row; all that was said on the way."""
    said: list[Diagnosis] = []
    with trio.move_on_after(45):
        while not said or set(said[-5:]) != {expected} or len(said) < 5:
            await trio.sleep(0.15)
            said.append(await dog.sample())
    return said


@linux
@pytest.mark.parametrize("row", CHILDREN)
async def test_a_real_child_in_each_row(row: str, tmp_path: Path):
    at_work, code, expected = CHILDREN[row]
    if row == "numpy" and importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed")
    started = trio.Event()
    async with open_child(python(tmp_path, code), term_grace_s=0.2) as child, trio.open_nursery() as nursery:
        dog = Watchdog(child.pid, told=child.pid, bounds=QUICK)
        nursery.start_soon(hear, child, dog, started)
        with trio.fail_after(60):
            await started.wait()
        dog.progress()
        if at_work == "rest":
            dog.rest()
        said = await settled(dog, expected)
        assert set(said[-5:]) == {expected}, (said, dog.facts())
        if expected not in SOFT:  # never, not even for a moment, a reason to end it early
            assert not set(said) & (SOFT - {D.STOPPED})
        assert (dog.strikes >= STRIKES or dog.diagnosis is D.UNINTERRUPTIBLE) is (expected in SOFT)
        child.signal(signal.SIGCONT)
        nursery.cancel_scope.cancel()
        await child.end(0.2)


# ---- the real engine, below its warden, with its real answers to pings


async def say(child: Child, message: wire.Down) -> None:
    await child.write(*wire.encode(message))


async def listen(child: Child, dog: Watchdog, seen: dict[type, trio.Event]) -> None:
    decoder = FrameDecoder()
    while data := await child.read():
        decoder.feed(data)
        for frame in decoder:
            message = wire.decode_up(frame)
            dog.beat()
            if isinstance(message, wire.Hello):
                dog.told = message.pid
            seen.setdefault(type(message), trio.Event()).set()


async def ping(child: Child) -> None:
    n = 0
    while True:
        n += 1
        await say(child, wire.Ping(n=n))
        await trio.sleep(0.1)


@linux
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hang-gil", D.WEDGED), ("hang", D.DEADLOCKED), ("stop", D.STOPPED), ("spin", D.WORKING)],
)
async def test_an_engine_in_its_sandbox(prompt: str, expected: Diagnosis, tmp_path: Path):
    spec = EngineSpec(name="misbehave", module="engines.synthetic.misbehave", python=sys.executable)
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    seen = {kind: trio.Event() for kind in (wire.Hello, wire.Ready, wire.Started)}
    async with open_child(engine_child(spec, scratch), term_grace_s=0.2) as child, trio.open_nursery() as nursery:
        dog = Watchdog(child.pid, bounds=QUICK)
        nursery.start_soon(listen, child, dog, seen)
        with trio.fail_after(60):
            await seen[wire.Hello].wait()
            await say(child, wire.Load(model=wire.Model(name="synthetic-m", device="cpu"), scratch=str(scratch)))
            await seen[wire.Ready].wait()
            nursery.start_soon(ping, child)
            params = wire.pack(work.LlmParams(prompt=prompt))
            await say(
                child,
                wire.Run(run=1, kind="llm", params=msgspec.Raw(params), inputs={}, folder=str(tmp_path), stream=True),
            )
            await seen[wire.Started].wait()
        dog.progress()
        said = await settled(dog, expected)
        assert set(said[-5:]) == {expected}, (said, dog.facts())
        assert os.readlink(f"/proc/{dog._pid}/cwd") == str(scratch)  # the engine, not its warden
        nursery.cancel_scope.cancel()
        await child.end(0.2)
