"""The Windows backend over a kernel that keeps books: what is asked for, in which order, and what is given back."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

import pytest
import trio

from supervisor.host.child import Child, ChildSpec, Exit, open_child
from supervisor.host.containment import windows, windows_pipe
from supervisor.host.containment import windows_api as api
from supervisor.host.containment.windows import KILLED, Job, Windows, WindowsLeash, exit_of

sys.path.insert(0, str(Path(__file__).parent))
from windows_kernel import BookKernel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the kernel is played")
SPEC = ChildSpec(name="engine", argv=(sys.executable, "-c", 'print("hi there")'), env={"A": "1"}, cwd=Path("/work"))


@pytest.fixture
def kernel() -> BookKernel:
    return BookKernel()


def leash(kernel: BookKernel, spec: ChildSpec = SPEC) -> WindowsLeash:
    return Windows(kernel).spawn(spec, lambda: False)


# ---- jobs


def test_a_job_kills_on_close_and_cannot_be_left(kernel: BookKernel):
    value = windows.limits(2**33)
    flags = value.BasicLimitInformation.LimitFlags
    assert flags & api.LIMIT_KILL_ON_JOB_CLOSE
    assert not flags & (api.LIMIT_BREAKAWAY_OK | api.LIMIT_SILENT_BREAKAWAY_OK)
    assert flags & api.LIMIT_JOB_MEMORY
    assert value.JobMemoryLimit == 2**33
    assert not windows.limits(0).BasicLimitInformation.LimitFlags & api.LIMIT_JOB_MEMORY
    assert value.BasicLimitInformation.ActiveProcessLimit == windows.MAX_PROCESSES
    assert Job(kernel, 2**33).verdict() == "verified"


def test_ui_limits_are_not_asked_for_where_windows_would_refuse_the_process(kernel: BookKernel):
    """A job with UI limits cannot be nested: AssignProcessToJobObject would fail with "access denied"."""
    assert Job(kernel).ui_limited
    kernel.nested = True
    kernel.calls.clear()
    assert not Job(kernel).ui_limited
    assert kernel.calls == ["create_job", "set_job 9"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"LimitFlags": 0}, "partial(survives us)"),
        ({"LimitFlags": 0x2000 | 0x1000}, "partial(may be left)"),
        ({"ActiveProcessLimit": 0}, "partial(no process limit)"),
    ],
)
def test_the_verdict_is_what_windows_answers(change: dict[str, int], verdict: str, kernel: BookKernel):
    job = Job(kernel)
    ((handle, kept),) = kernel.jobs.items()
    answer = api.ExtendedLimits.from_buffer_copy(kept[api.INFO_EXTENDED_LIMIT])
    for field, value in change.items():
        setattr(answer.BasicLimitInformation, field, value)
    kernel.jobs[handle][api.INFO_EXTENDED_LIMIT] = bytes(answer)
    assert job.verdict() == verdict


def test_verdicts_say_what_a_job_cannot_do(kernel: BookKernel):
    assert Windows(kernel).verdicts() == {
        "job": "verified",
        "ui": "claimed",
        "files": "unavailable",
        "network": "unavailable",
    }
    assert kernel.open == {}
    kernel.nested = True
    assert Windows(kernel).verdicts()["ui"].startswith("unavailable")
    kernel.refuse.add("create_job")
    assert Windows(kernel).verdicts()["job"].startswith("unavailable")
    assert Windows(kernel).facts() == {"platform": "windows"}


def test_a_job_that_cannot_be_limited_is_given_back(kernel: BookKernel):
    kernel.refuse.add("set_job 9")
    with pytest.raises(OSError, match="refused"):
        Job(kernel)
    assert kernel.open == {}


# ---- starting


def test_a_process_runs_only_after_it_is_in_its_job(kernel: BookKernel):
    held = leash(kernel)
    order = [call for call in kernel.calls if call in ("create_job", "create_process", "assign", "resume")]
    assert order == ["create_job", "create_process", "assign", "resume"]
    ((command, flags, env, cwd, handles),) = kernel.created
    assert command.endswith(' -c "print(\\"hi there\\")"')
    assert flags == api.CREATE_SUSPENDED | api.CREATE_NEW_PROCESS_GROUP
    assert (env, cwd, held.pid) == ({"A": "1"}, "/work", 4711)
    assert len(handles.lpAttributeList["handle_list"]) == 3
    assert sorted(kernel.open.values()) == ["job", "ours r", "ours r", "ours w", "process"]
    assert held._job.processes() == 1


def test_without_a_console_no_window_appears(kernel: BookKernel):
    kernel.console = False
    leash(kernel)
    assert kernel.created[0][1] & api.CREATE_NO_WINDOW


@pytest.mark.parametrize("failing", ["pipe", "create_process", "assign", "resume", "in_job"])
def test_a_child_that_cannot_be_held_is_not_started_and_nothing_leaks(failing: str, kernel: BookKernel):
    kernel.refuse.add(failing)
    with pytest.raises(OSError, match=r"refused|not in its job"):
        leash(kernel)
    assert kernel.open == {}
    assert ("terminate_process" in kernel.calls) == (failing in ("assign", "resume", "in_job"))


def test_descriptors_are_refused_and_missing_programs_are_named(kernel: BookKernel):
    with pytest.raises(OSError, match="cannot be passed to a child on Windows"):
        leash(kernel, ChildSpec(name="x", argv=("a",), pass_fds=(5,)))
    with pytest.raises(FileNotFoundError):
        leash(kernel, ChildSpec(name="x", argv=("no-such-program",)))
    assert kernel.calls == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("/bin/sh",), "/bin/sh"),
        (("/bin/sh", ""), '/bin/sh ""'),
        (("/bin/sh", "a b", "c"), '/bin/sh "a b" c'),
        (("/bin/sh", '{"a": "b\\\\"}'), '/bin/sh "{\\"a\\": \\"b\\\\\\\\\\"}"'),
        (("/bin/sh", "back\\"), "/bin/sh back\\"),
        (("/bin/sh", "back slash\\"), '/bin/sh "back slash\\\\"'),
    ],
)
def test_quoting(argv: tuple[str, ...], line: str):
    assert windows.command_line(argv) == line


def test_a_bare_name_is_looked_up_on_the_path_and_never_in_the_current_folder():
    assert windows.command_line(("tool", "x"), which=lambda _name: "/bin/sh") == "/bin/sh x"


# ---- ending


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (0, Exit(code=0)),
        (3, Exit(code=3)),
        (0xC000_0005, Exit(signal=11)),
        (0xC000_0409, Exit(signal=6)),
        (0xC000_013A, Exit(signal=15)),
        (-0x3FFF_FFFB, Exit(signal=11)),  # the same code read as signed
        (KILLED, Exit(signal=9)),
    ],
)
def test_exit_codes(code: int, how: Exit):
    assert exit_of(code) == how


def test_break_is_asked_only_where_it_arrives(kernel: BookKernel):
    held = leash(kernel)
    assert held.terminate() is True
    assert "press_break 4711" in kernel.calls
    kernel.refuse.add("press_break 4711")
    assert held.terminate() is False
    kernel.console = False
    assert leash(kernel).terminate() is False
    assert held.dump_stacks() is False


def test_the_family_is_killed_by_its_job_and_reaped_with_everything_given_back(kernel: BookKernel):
    held = leash(kernel)
    assert held.kill_family() is True
    assert held.reap() == Exit(signal=9)
    held.close()
    assert kernel.open == {}
    assert held.kill_family() is False
    held.signal(9)
    held.signal_group(9)  # nothing is left to hit
    assert held.cut_lifeline() is False


def test_signals_that_windows_has_no_word_for_are_dropped(kernel: BookKernel):
    held = leash(kernel)
    before = list(kernel.calls)
    held.signal(10)
    held.signal_group(10)
    assert kernel.calls == before
    held.signal(signal.SIGTERM)
    assert kernel.calls[-1] == "press_break 4711"
    held.signal(9)
    assert kernel.calls[-1] == "terminate_process"


def test_cutting_the_lifeline_is_closing_the_job(kernel: BookKernel):
    held = leash(kernel)
    assert held.cut_lifeline() is True
    assert "job" not in kernel.open.values()


async def test_a_whole_child_over_the_books(kernel: BookKernel, monkeypatch: pytest.MonkeyPatch):
    """`Child` itself over this leash: it ends by its job when it cannot be asked."""
    kernel.console = False
    dead = trio.Event()

    async def wait_dead(_self: WindowsLeash) -> None:
        await dead.wait()

    async def read_into(_handle: int, _view: memoryview) -> int:
        await dead.wait()
        raise BrokenPipeError(232, "the pipe is being closed")

    class DyingKernel(BookKernel):
        def terminate_job(self, job: int, code: int) -> None:
            super().terminate_job(job, code)
            dead.set()

    dying = DyingKernel()
    dying.console = False
    monkeypatch.setattr(WindowsLeash, "wait_dead", wait_dead)
    monkeypatch.setattr(windows_pipe, "_read_into", read_into)
    with trio.fail_after(60):  # and not after the grace
        async with open_child(SPEC, term_grace_s=600, backend=Windows(dying)) as child:
            assert isinstance(child, Child)
            assert child.exit is None
    assert child.exit == Exit(signal=9)
    assert child.exit.describe() == "killed by SIGKILL"
    assert dying.open == {}


def test_the_books_check_sizes(kernel: BookKernel):
    job = kernel.create_job()
    kernel.set_job(job, 9, api.ExtendedLimits())
    with pytest.raises(AssertionError):
        kernel.query_job(job, 9, api.UiRestrictions())
    assert ctypes.sizeof(api.ExtendedLimits) == len(kernel.jobs[job][9])
