"""Families that do not want to die, and one that cannot; real processes, real clock."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio

from supervisor.host import child as child_module
from supervisor.host.child import Child, ChildSpec, Exit, open_child, run_child
from supervisor.host.containment.linux import Linux, LinuxLeash
from supervisor.host.launching import ROOT, engine_child
from supervisor.host.work import EngineSpec, Sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="families are found in /proc")

PATIENCE_S = 60.0
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
# A child, a child in a session of its own, and (with "daemon") a daemon; all deaf to SIGTERM.
FAMILY = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready, tell = os.pipe()
def stay(*leave):
    if os.fork() == 0:
        for step in leave:
            step()
        os.write(tell, b"x")
        while True:
            signal.pause()
def fork_again():
    if os.fork():
        os._exit(0)
stay()
stay(os.setsid)
count = 2
if sys.argv[-1] == "daemon" or "DAEMON" in os.environ:
    stay(os.setsid, fork_again)
    count = 3
while count:
    count -= len(os.read(ready, 1))
print("up", flush=True)
while True:
    signal.pause()
"""


def python(code: str, *args: str, **more: object) -> ChildSpec:
    return ChildSpec(name="test", argv=(sys.executable, "-c", code, *args), **more)


async def up(child: Child) -> None:
    with trio.fail_after(PATIENCE_S):
        assert (await child.read()).startswith(b"up")


def marked(mark: str) -> list[psutil.Process]:
    """Live processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


async def nobody(mark: str) -> None:
    try:
        with trio.fail_after(PATIENCE_S):
            while marked(mark):  # noqa: ASYNC110  nothing tells us of a stranger's end
                await trio.sleep(0.02)
    finally:
        for process in marked(mark):
            process.kill()


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return str(tmp_path)


def environment(mark: str, **more: str) -> dict[str, str]:
    return {**os.environ, "MARK": mark, **more}


# ---- kill


async def test_kill_does_not_wait_for_term(mark: str):
    async with open_child(python(DEAF), term_grace_s=60) as child:
        await up(child)
        before = trio.current_time()
        child.kill("memory")
        assert await child.wait() == Exit(signal=signal.SIGKILL)
        assert trio.current_time() - before < 30  # nothing was waited for: the grace is 60 s
        assert child.killed_because == "memory"


async def test_kill_reaches_a_grandchild_in_a_session_of_its_own_without_a_warden(mark: str):
    async with open_child(python(FAMILY, env=environment(mark))) as child:
        await up(child)
        assert len(marked(mark)) == 3
        child.kill("test")
        await child.wait()
        await nobody(mark)


LAYERS = pytest.mark.parametrize("layers", [(), ("namespaces",)], ids=["namespaces", "no namespaces"])
# A process that is never twice the same: each lives only to make the next one.
HOPPER = """
import os, signal
if os.fork() == 0:
    os.setsid()
    while True:
        if os.fork():
            os._exit(0)
os.wait()
print("up", flush=True)
while True:
    signal.pause()
"""


def confined(code: str, layers: tuple[str, ...], mark: str, folder: Path) -> ChildSpec:
    """Spec of a real launcher and warden whose engine is this code.

    The launcher starts `engines/runtime/boot.py` below the root that it is told: ours is the code.
    """
    boot = folder / "site" / "engines" / "runtime" / "boot.py"
    boot.parent.mkdir(parents=True)
    boot.write_text(code)
    (folder / "scratch").mkdir()
    engine = EngineSpec(
        name="nasty",
        module="engines.synthetic.engine",
        python=sys.executable,
        env={"MARK": mark, "DAEMON": "1"},
        sandbox=Sandbox(without=layers, read=(str(folder / "site"),)),
    )
    spec = engine_child(engine, folder / "scratch")
    told = spec.argv[-1].replace(f'"root":"{ROOT}"', f'"root":"{folder / "site"}"')
    assert told != spec.argv[-1]
    return ChildSpec(name="nasty", argv=(*spec.argv[:-1], told), env={**(spec.env or {}), "MARK": mark}, lifeline=True)


@LAYERS
async def test_kill_of_a_confined_family_with_a_daemon_leaves_nobody(layers, mark: str, tmp_path: Path):
    async with open_child(confined(FAMILY, layers, mark, tmp_path)) as child:
        await up(child)
        assert len(marked(mark)) >= 4
        child.kill("test")
        with trio.fail_after(PATIENCE_S):
            assert await child.wait() == Exit(signal=signal.SIGKILL)
        assert marked(mark) == []  # the warden ends last


@LAYERS
async def test_kill_of_a_family_that_never_stands_still_leaves_nobody(layers, mark: str, tmp_path: Path):
    async with open_child(confined(HOPPER, layers, mark, tmp_path)) as child:
        await up(child)
        child.kill("test")
        with trio.fail_after(PATIENCE_S):
            assert await child.wait() == Exit(signal=signal.SIGKILL)
        await nobody(mark)


@LAYERS
async def test_kill_at_any_moment_of_the_start_leaves_nobody(layers, mark: str, tmp_path: Path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201  to replay a failure
    moments = random.Random(seed)
    spec = confined(FAMILY, layers, mark, tmp_path)
    for _ in range(10):
        async with open_child(spec) as child:
            await trio.sleep(moments.random() * 0.08)  # the moment is the test's subject
            child.kill("test")
            with trio.fail_after(PATIENCE_S):
                assert await child.wait() == Exit(signal=signal.SIGKILL)
        await nobody(mark)


async def test_a_warden_that_does_nothing_is_replaced_by_force(monkeypatch: pytest.MonkeyPatch, mark: str):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.2)
    async with open_child(python(FAMILY, env=environment(mark), lifeline=True)) as child:
        await up(child)
        child.kill("test")  # nobody reads this lifeline
        with trio.fail_after(PATIENCE_S):
            assert await child.wait() == Exit(signal=signal.SIGKILL)
        await nobody(mark)


async def test_end_reaches_the_whole_known_family_after_its_graces(monkeypatch: pytest.MonkeyPatch, mark: str):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.2)
    async with open_child(python(FAMILY, env=environment(mark)), term_grace_s=0.2) as child:
        await up(child)
    assert child.exit == Exit(signal=signal.SIGKILL)
    assert child.killed_because == ""  # it was asked to end, and did not
    await nobody(mark)


async def test_a_stopped_child_is_ended(mark: str):
    async with open_child(python(DEAF), term_grace_s=0.2) as child:
        await up(child)
        child.signal(signal.SIGSTOP)
        before = trio.current_time()
    assert child.exit == Exit(signal=signal.SIGKILL)
    assert trio.current_time() - before < PATIENCE_S


async def test_cgroup_kill_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel's file is played by a plain one; a real cgroup is used below where there is one to write."""
    monkeypatch.setattr(child_module, "WARDEN_S", 0.1)
    async with open_child(python(DEAF, cgroup=tmp_path)) as child:
        await up(child)
        child.kill("test")
        assert (tmp_path / "cgroup.kill").read_text() == "1"


async def test_a_real_cgroup_ends_a_family_with_a_daemon(mark: str):
    folder = next(
        (
            Path(line.split()[1]) / f"bulkhead-test-{os.getpid()}"
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[2] == "cgroup2" and os.access(line.split()[1], os.W_OK)
        ),
        None,
    )
    try:
        if folder is None:
            pytest.skip("no cgroup v2 is writable here")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    enter = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')\n"
    try:
        if not (folder / "cgroup.kill").exists():
            pytest.skip("this kernel has no cgroup.kill")
        spec = python(enter + FAMILY, "daemon", env=environment(mark), cgroup=folder)
        async with open_child(spec) as child:
            await up(child)
            assert len(marked(mark)) == 4
            child.kill("test")
            with trio.fail_after(PATIENCE_S):
                assert await child.wait() == Exit(signal=signal.SIGKILL)
            await nobody(mark)
    finally:
        await _removed(folder)


async def _removed(folder: Path) -> None:
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                folder.rmdir()
            except OSError:  # zombies of the daemon are still in it
                await trio.sleep(0.02)
            else:
                return


# ---- stack dumps


async def test_stacks_are_dumped_on_stderr_and_the_child_lives_on():
    code = (
        "import faulthandler, signal, time\n"
        "faulthandler.register(signal.SIGUSR2, all_threads=True)\n"
        "def stuck_here(): print('up', flush=True); time.sleep(1000)\n"
        "stuck_here()\n"
    )
    seen = trio.Event()
    lines: list[str] = []

    def line(text: str) -> None:
        lines.append(text)
        if "stuck_here" in text:
            seen.set()

    async with open_child(python(code, on_stderr_line=line)) as child:
        await up(child)
        assert child.dump_stacks() is True
        with trio.fail_after(PATIENCE_S):
            await seen.wait()
        assert child.exit is None


async def test_a_child_that_would_die_of_the_signal_is_not_asked():
    async with open_child(python("print('up', flush=True); import time; time.sleep(1000)")) as child:
        await up(child)
        assert child.dump_stacks() is False
        assert child.exit is None


# ---- unkillable


class Stuck(LinuxLeash):
    """A process in the kernel's hands: nothing ends it, and nothing tells of its end, until `thawed` is set."""

    thawed: trio.Event

    async def wait_dead(self) -> None:
        await self.thawed.wait()
        await super().wait_dead()

    def kill_family(self) -> bool:
        return False

    def kill_members(self) -> None:
        pass

    def terminate(self) -> bool:
        return True


class StuckLinux(Linux):
    def spawn(self, spec: ChildSpec, is_over: Callable[[], bool]) -> LinuxLeash:
        leash = Stuck(spec, is_over)
        leash.thawed = trio.Event()
        self.leash = leash
        return leash


@pytest.mark.parametrize("by", ["end", "kill"])
async def test_an_unkillable_child_is_abandoned_and_its_late_death_is_told(by: str, monkeypatch, caplog):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.05)
    monkeypatch.setattr(child_module, "UNKILLABLE_AFTER_S", 0.1)
    backend = StuckLinux()
    told: list[Exit] = []
    with trio.fail_after(PATIENCE_S):
        async with open_child(python(DEAF), term_grace_s=0.05, backend=backend) as child:
            child.on_late_death = told.append
            await up(child)
            if by == "kill":
                child.kill("test")
                how = await child.wait()  # bounded, though nobody calls `end`
            else:
                how = await child.end(0.05)
            assert how.unkillable
            assert "still there" in how.describe()
    assert not child.gone.is_set()
    assert "cannot be killed" in caplog.text
    assert psutil.pid_exists(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert told == []
    backend.leash.thawed.set()
    with trio.fail_after(PATIENCE_S):
        await child.gone.wait()
        await trio.testing.wait_all_tasks_blocked()
    assert told == [Exit(signal=signal.SIGKILL)]
    assert child.exit is not None
    assert child.exit.unkillable  # what was told is not changed afterwards
    assert not psutil.pid_exists(child.pid)


async def test_a_late_death_that_makes_trouble_does_not_end_the_supervisor(monkeypatch, caplog):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.05)
    monkeypatch.setattr(child_module, "UNKILLABLE_AFTER_S", 0.05)
    backend = StuckLinux()

    def trouble(_how: Exit) -> None:
        raise RuntimeError("trouble")

    async with open_child(python(DEAF), term_grace_s=0.05, backend=backend) as child:
        child.on_late_death = trouble
        await up(child)
    os.kill(child.pid, signal.SIGKILL)
    backend.leash.thawed.set()
    with trio.fail_after(PATIENCE_S):
        await child.gone.wait()
        await trio.testing.wait_all_tasks_blocked()
    assert "trouble" in caplog.text


def test_an_abandoned_child_does_not_hold_the_supervisors_own_end(monkeypatch):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.05)
    monkeypatch.setattr(child_module, "UNKILLABLE_AFTER_S", 0.05)
    backend = StuckLinux()

    async def main() -> Child:
        with trio.fail_after(PATIENCE_S):
            async with open_child(python(DEAF), term_grace_s=0.05, backend=backend) as child:
                await up(child)
            return child

    child = trio.run(main)  # returns, though the process is still there
    assert not child.gone.is_set()
    os.kill(child.pid, signal.SIGKILL)
    assert backend.leash.reap() == Exit(signal=signal.SIGKILL)


# ---- pipes and numbers


async def test_a_child_that_closes_its_pipes_is_alive_until_it_ends():
    code = "import os, time; os.close(0); os.close(1); os.write(2, b'closed\\n'); time.sleep(1000)"
    seen = trio.Event()
    async with open_child(python(code, on_stderr_line=lambda _text: seen.set())) as child:
        with trio.fail_after(PATIENCE_S):
            await seen.wait()
            assert await child.read() == b""
            with pytest.raises(BrokenPipeError):
                await child.write(b"x")
        assert child.exit is None
    assert child.exit == Exit(signal=signal.SIGTERM)


async def test_a_bad_line_callback_does_not_cost_the_reaper(caplog):
    def bad(_text: str) -> None:
        raise ValueError("bad callback")

    spec = python("import sys; sys.stderr.write('a\\nb\\n')", on_stderr_line=bad)
    with trio.fail_after(PATIENCE_S):
        _output, how, child = await run_child(spec, deadline_s=10)
    assert how == Exit(code=0)
    assert child.stderr_tail() == ["a", "b"]
    assert "bad callback" in caplog.text


async def test_a_hundred_children_at_once_leak_no_descriptor_and_no_process():
    before = len(os.listdir("/proc/self/fd"))
    started: list[Child] = []
    all_up = trio.Event()

    async def one(number: int) -> None:
        spec = ChildSpec(name=f"c{number}", argv=("sh", "-c", "echo up; exec sleep 1000"), lifeline=number % 2 == 0)
        async with open_child(spec) as child:
            await up(child)
            started.append(child)
            if len(started) == 100:
                all_up.set()
            await all_up.wait()
            if number % 2:
                child.kill("test")
                await child.wait()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
    assert len(os.listdir("/proc/self/fd")) <= before  # what earlier tests left may go meanwhile
    assert [child.pid for child in started if psutil.pid_exists(child.pid)] == []
    assert {child.exit.signal for child in started if child.exit} == {signal.SIGTERM, signal.SIGKILL}


async def test_a_program_that_cannot_be_started_leaks_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(FileNotFoundError):
            async with open_child(ChildSpec(name="x", argv=("/no/such/program",), lifeline=True)):
                pass
    assert len(os.listdir("/proc/self/fd")) <= before  # what earlier tests left may go meanwhile
