"""The doctor: every check is bounded, and none keeps another from being made."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio

from supervisor.doctor import Check, Finding, Patient, examine, fail, ok, plain, render, warn, well

WHO = Patient(None, None, Path("/nowhere"))


def fine(_patient: Patient) -> Iterator[Finding]:
    yield ok("fine", "It is well.")


def broken(_patient: Patient) -> Iterator[Finding]:
    yield ok("broken", "At first.")
    raise RuntimeError("the disk\nis gone.")


async def test_findings_come_in_the_order_of_the_table_whoever_is_first():
    first = trio.Event()

    async def slow(_patient: Patient) -> Iterable[Finding]:
        await first.wait()
        return [warn("slow", "It took its time.", "Wait.")]

    async def quick(_patient: Patient) -> Iterable[Finding]:
        first.set()
        await trio.lowlevel.checkpoint()
        return [ok("quick", "Yes."), fail("quick", "No.", "Mend it.")]

    found = await examine(WHO, [Check("slow", later=slow), Check("fine", fine), Check("quick", later=quick)])
    assert [finding.name for finding in found] == ["slow", "fine", "quick", "quick"]
    assert not well(found)
    assert well(found[:2])


async def test_a_check_that_raises_is_a_finding_and_the_others_are_made():
    found = await examine(WHO, [Check("broken", broken), Check("fine", fine)])
    assert [(finding.name, finding.verdict) for finding in found] == [("broken", "fail"), ("fine", "ok")]
    assert found[0].sentence == "It could not be looked at: the disk."
    assert found[0].cure


async def test_a_group_of_errors_is_told_by_its_first(autojump_clock):
    async def grouped(_patient: Patient) -> Iterable[Finding]:
        async with trio.open_nursery():
            raise OSError("no descriptor is left")

    (found,) = await examine(WHO, [Check("x", later=grouped)])
    assert found.sentence == "It could not be looked at: no descriptor is left."


async def test_a_check_that_hangs_is_left_alone_after_its_bound():
    """One in a thread that nothing can end, and one on the trio thread."""
    let_go = threading.Event()

    def stuck(_patient: Patient) -> Iterator[Finding]:
        let_go.wait(60)
        yield ok("stuck", "Too late.")

    async def forever(_patient: Patient) -> Iterable[Finding]:
        await trio.sleep_forever()
        return []

    checks = [Check("stuck", stuck, within_s=0.05), Check("forever", later=forever, within_s=0.05), Check("fine", fine)]
    try:
        with trio.fail_after(30):
            found = await examine(WHO, checks)
    finally:
        let_go.set()
    assert [(finding.name, finding.verdict) for finding in found] == [
        ("stuck", "fail"),
        ("forever", "fail"),
        ("fine", "ok"),
    ]
    assert found[0].sentence == "There was no answer within 0.05 s."


async def test_progress_is_told_only_of_what_takes_long(autojump_clock):
    told: list[list[str]] = []

    def sleeps(seconds: float):
        async def look(_patient: Patient) -> Iterable[Finding]:
            await trio.sleep(seconds)
            return []

        return look

    checks = [Check("one", later=sleeps(1)), Check("three", later=sleeps(3)), Check("five", later=sleeps(5))]
    await examine(WHO, checks, lambda left: told.append(list(left)))
    assert told == [["three", "five"], ["five"]]
    told.clear()
    await examine(WHO, checks[:1], lambda left: told.append(list(left)))
    assert told == []


async def test_what_is_about_no_supervisor_is_left_out_when_one_runs():
    checks = [Check("fine", fine, offline=True)]
    assert len(await examine(WHO, checks)) == 1
    assert await examine(WHO._replace(seen={}), checks) == []


def test_for_programs_and_for_people():
    findings = [
        ok("disk", "It has room."),
        warn("clock", "It is late.", "Set it."),
        fail("gpu", "It is gone.", "Look."),
    ]
    told = plain(findings, running=True)
    assert (told["ok"], told["running"], len(told["checks"])) == (False, True, 3)
    assert render(told["checks"]).splitlines() == [
        "ok    disk   It has room.",
        "warn  clock  It is late.",
        "             Set it.",
        "FAIL  gpu    It is gone.",
        "             Look.",
        "3 checks: 1 failed, 1 warning.",
    ]
    assert render([]) == "0 checks: none failed, no warnings."
