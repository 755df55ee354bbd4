"""How an instance ended, told apart."""

from __future__ import annotations

import pytest

from supervisor.host.child import Exit
from supervisor.host.ends import HARMLESS, End, Why, judge

JOB = "while it ran a job"


@pytest.mark.parametrize(
    ("how", "ours", "oom", "why", "phrase"),
    [
        (Exit(code=0), None, False, Why.EXITED, "ended with exit code 0 while it ran a job"),
        (Exit(code=7), None, True, Why.EXITED, "ended with exit code 7 while it ran a job"),
        (Exit(signal=11), None, False, Why.SIGNALLED, "killed by SIGSEGV while it ran a job"),
        (Exit(signal=11), None, True, Why.SIGNALLED, "killed by SIGSEGV while it ran a job"),
        (Exit(signal=9), None, False, Why.SIGNALLED, "killed by SIGKILL while it ran a job"),
        (Exit(signal=9), None, True, Why.OOM_KILLED, "killed by the kernel for want of memory while it ran a job"),
        (Exit(signal=9), End(why=Why.MEMORY), True, Why.MEMORY, "ended because it took too much memory"),
        (Exit(code=0), End(why=Why.EVICTED, note="b needs it."), False, Why.EVICTED, "unloaded (b needs it)"),
        (None, None, False, Why.CLOSED_OUTPUT, "ended because it closed its output while it ran a job"),
        (
            Exit(),
            End(why=Why.HUNG, note="silent"),
            False,
            Why.UNKILLABLE,
            "not to be killed: it hangs in the kernel (ended because its work stood still; silent)",
        ),
    ],
)
def test_each_end_has_its_name(how, ours, oom, why, phrase):
    end = judge(how, ours, oom=oom, when=JOB)
    assert end.why is why
    assert end.phrase() == phrase


def test_the_exit_is_noted_though_the_end_was_ours():
    end = judge(Exit(signal=15), End(why=Why.NO_HELLO, when="within 3 s"), oom=False)
    assert end.detail() == {"end": "no-hello", "signal": 15}
    assert judge(Exit(code=3), None, oom=False).detail() == {"end": "exited", "exit_code": 3}


@pytest.mark.parametrize("why", list(Why))
def test_what_is_bad_and_what_counts(why):
    end = End(why=why)
    assert end.bad is (why not in HARMLESS)
    assert end.counts is (end.bad and why is not Why.STUCK_CANCEL)
    assert end.how
