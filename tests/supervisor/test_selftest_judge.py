"""Containment is judged, never assumed: each single thing that can be wrong makes a row "not contained"."""

from __future__ import annotations

import json

import msgspec
import pytest

from protocol import work
from protocol.faults import Fault
from supervisor.host.work import Done, Failed
from supervisor.selftest_cases import CASES, Case
from supervisor.selftest_judge import Asked, Seen, judge

BY_NAME = {case.name: case for case in CASES}


def done(said: str) -> Done:
    return Done(body=msgspec.msgpack.encode(work.LlmResult(content=said)))


def failed(code: str, message: str = "Engine misbehave was killed by SIGSEGV while it ran this job.") -> Failed:
    return Failed(fault=Fault(code, message))


def seen(end: object, seconds: float = 0.1, **more: object) -> Seen:
    """All well, but for what is given."""
    fields = {"recovered_s": 0.2, "gone_s": 0.01, "processes": 3, "answers": 9, "worst_s": 0.01, "replaced": True}
    return Seen(asked=[Asked(end=end, seconds=seconds)], **fields | more)  # type: ignore[arg-type]


def test_a_contained_crash_says_what_happened():
    row = judge(BY_NAME["segv"], seen(failed("engine_crashed")))
    assert row.contained
    assert row.outcome == (
        "engine_crashed (was killed by SIGSEGV while it ran this job); its 3 processes gone after 10 ms; "
        "answers again after 0.20 s"
    )
    assert (row.code, row.seconds, row.gone_s, row.recovered_s) == ("engine_crashed", 0.1, 0.01, 0.2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"recovered_s": None, "recovery": "quarantined: No."}, "the next run did not work (quarantined: No.)"),
        ({"gone_s": None}, "processes of the engine outlived its end"),
        ({"strays": 2}, "2 processes were left"),
        ({"files": ["m0/i1/x"]}, "1 file was left, such as m0/i1/x"),
        ({"wrong": ["engine_crashed: Oh."]}, "a healthy neighbour was hurt: engine_crashed: Oh."),
        ({"answers": 0}, "a healthy neighbour gave no answer meanwhile"),
        ({"worst_s": 6.0}, "a healthy neighbour had to wait 6.0 s"),
        ({"leaked": True}, "a file of the user's came out"),
        ({"harmed": ["our nice went from 0 to 5"]}, "our nice went from 0 to 5"),
        ({"trouble": "the supervisor failed: OSError()"}, "the supervisor failed"),
    ],
)
def test_one_wrong_thing_is_enough(wrong, said):
    row = judge(BY_NAME["segv"], seen(failed("engine_crashed"), **wrong))
    assert not row.contained
    assert row.outcome.startswith("not contained: ")
    assert said in row.outcome


@pytest.mark.parametrize(
    ("end", "seconds", "said"),
    [
        (None, 14.0, "no answer came in 14.0 s"),
        (failed("engine_hung"), 0.1, "the caller got engine_hung"),
        (done("3"), 0.1, "the run was answered with '3'"),
        (failed("engine_crashed"), 4.5, "the caller waited 4.5 s, not at most 4.0 s"),
    ],
)
def test_the_caller_gets_the_right_fault_in_time(end, seconds, said):
    row = judge(BY_NAME["segv"], seen(end, seconds))
    assert not row.contained
    assert said in row.outcome


def test_an_answer_must_be_the_right_one():
    assert judge(BY_NAME["print"], seen(done("quiet"))).contained
    row = judge(BY_NAME["print"], seen(done("noise")))
    assert "the answer is 'noise', not 'quiet'" in row.outcome
    assert not judge(BY_NAME["print"], seen(failed("engine_crashed"))).contained


def test_a_run_in_flight_beside_it_gets_the_same_fault():
    case = BY_NAME["crash-beside"]
    assert judge(case, seen(failed("engine_crashed"), beside=failed("engine_crashed"))).contained
    for beside in (None, done("done"), failed("engine_hung")):
        assert not judge(case, seen(failed("engine_crashed"), beside=beside)).contained


def test_an_engine_that_never_loads_ends_in_quarantine():
    case = BY_NAME["crash-loop"]
    assert judge(case, seen(failed("quarantined"))).contained
    row = judge(case, seen(failed("engine_crashed")))
    assert "the last caller got engine_crashed, not quarantined" in row.outcome


def test_a_leaking_engine_has_to_be_replaced():
    assert judge(BY_NAME["leak"], seen(done("holds 48 MiB"))).contained
    assert not judge(BY_NAME["leak"], seen(done("holds 48 MiB"), replaced=False)).contained


def told(managed: list[str]) -> Done:
    return done(json.dumps({"managed": managed, "refused": {"ptrace": "EPERM"}}))


def test_an_attack_must_have_managed_nothing():
    row = judge(BY_NAME["spy"], seen(told([])))
    assert row.contained
    assert row.outcome.startswith("refused: ptrace EPERM; ")
    row = judge(
        BY_NAME["spy"], seen(told(["command line"]), sandbox={"pid": "unavailable(EPERM)", "seccomp": "verified"})
    )
    assert not row.contained
    assert row.lacks == ("pid unavailable(EPERM)",)
    assert row.outcome == "not contained: it managed: command line; this box lacks: pid unavailable(EPERM)"


def test_what_is_harmless_in_a_network_of_its_own_is_no_success():
    assert judge(BY_NAME["sockets"], seen(told(["listen"]))).contained
    assert not judge(BY_NAME["sockets"], seen(told(["TCP"]))).contained


def test_an_engine_that_lies_about_its_attack_is_not_believed():
    assert not judge(BY_NAME["home"], seen(done("nothing at all"))).contained
    assert not judge(BY_NAME["home"], seen(told([]), harmed=["the user's file was changed"])).contained


def test_where_only_the_canaries_can_tell_they_do():
    assert judge(BY_NAME["strays"], seen(told(["/dev/shm/x"]))).contained
    assert not judge(BY_NAME["strays"], seen(told([]), harmed=["/dev/shm was written to"])).contained


def test_the_latency_of_a_row_is_that_of_its_slowest_run():
    case = Case(name="x", title="x", expected="x.", prompt="memory", answer="")
    both = seen(done("a"), 0.1)
    both.asked.append(Asked(end=done("b"), seconds=0.3))
    assert judge(case, both).seconds == 0.3
