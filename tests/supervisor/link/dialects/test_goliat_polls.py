"""An assignment counts as ours only when it is, and a failed one is never left completed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.link.dialects.goliat_notes import Notes
from supervisor.link.dialects.goliat_polls import MOST_CLAIMS, MOST_UNTOLD, SETTLE_TRIES, Assigned, Claimed
from supervisor.link.dialects.goliat_wire import Odd, Slip
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard


class Bench:
    def __init__(self, folder: Path, dashboard: Dashboard, http: Http) -> None:
        self.dashboard, self.http, self.notes = dashboard, http, Notes(folder)
        self.claimed, self.assigned = Claimed(http, "box", "x", 0.0), Assigned(http, "box")

    async def claim(self) -> Slip | None:
        found = await self.claimed.next(self.notes, lambda _job: 1)
        return None if found is None else found.slip

    async def finished(self) -> None:
        await trio.lowlevel.checkpoint()
        self.dashboard._update({"machineId": "box", "message": {"type": "finished"}})


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with open_dashboard() as dashboard, Http(dashboard.url) as http:
        yield Bench(tmp_path, dashboard, http)


async def test_the_lowest_pending_index_is_claimed_and_noted(bench: Bench) -> None:
    parts = bench.dashboard.study("x", {"n": 0}, {"n": 1}, {"n": 2})
    parts[0].status = "COMPLETED"
    bench.dashboard.studies["s1"] = ("x", parts[::-1])
    found = await bench.claimed.next(bench.notes, lambda _job: 7)
    assert found is not None
    assert (found.slip.id, found.slip.index, found.slip.attempt, found.config) == (parts[1].id, 1, 7, b'{"n":1}')
    assert parts[1].worker == found.slip.worker
    assert await bench.notes.all() == {found.slip.job: found.slip}
    assert await bench.claimed.ours(found.slip)


async def test_a_claim_that_somebody_overwrote_is_not_ours(bench: Bench) -> None:
    first, second = bench.dashboard.study("x", {}, {})

    def steal() -> None:  # at the look after the claim
        if first.status == "RUNNING":
            first.worker = "w-other"

    bench.dashboard.before["/api/super-studies/s1/assignments"] = steal
    slip = await bench.claim()
    assert slip is not None
    assert slip.id == second.id
    assert first.worker == "w-other"
    assert set(await bench.notes.all()) == {second.id}


async def test_where_others_are_always_faster_it_gives_up_for_now(bench: Bench) -> None:
    parts = bench.dashboard.study("x", *[{}] * 10)

    def steal() -> None:
        for part in parts:
            if part.status == "RUNNING":
                part.worker = "w-other"

    bench.dashboard.before["/api/super-studies/s1/assignments"] = steal
    assert await bench.claim() is None
    assert sum(part.status == "RUNNING" for part in parts) == MOST_CLAIMS
    assert await bench.notes.all() == {}


@pytest.mark.parametrize("stumble", ["drop", Answer(500)])
async def test_whether_a_claim_got_through_is_looked_up(bench: Bench, stumble: Answer | str) -> None:
    (part,) = bench.dashboard.study("x", {})
    bench.dashboard.known.meet("box")
    bench.dashboard.stumbles[f"/api/assignments/{part.id}/claim"] = [stumble]
    slip = await bench.claim()
    assert (slip is not None) == (stumble == "drop") == (part.status == "RUNNING")
    assert len(await bench.notes.all()) == (stumble == "drop")


async def test_a_claim_that_was_refused_leaves_no_note(bench: Bench) -> None:
    (part,) = bench.dashboard.study("x", {})
    bench.dashboard.stumbles[f"/api/assignments/{part.id}/claim"] = [Answer(429)]
    with pytest.raises(Trouble):
        await bench.claim()
    assert await bench.notes.all() == {}


@pytest.mark.parametrize("change", ["stolen", "reset", "gone", "no study"])
async def test_what_went_to_somebody_else_is_not_ours_any_more(bench: Bench, change: str) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    match change:
        case "stolen":
            part.worker = "w-other"
        case "reset":
            part.status, part.worker = "PENDING", None
        case "gone":
            bench.dashboard.studies["s1"] = ("x", [])
        case "no study":
            bench.dashboard.studies.clear()
    assert not await bench.claimed.ours(slip)


async def test_a_page_that_is_not_found_says_nothing_of_an_assignment(bench: Bench) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    path = "/api/super-studies/s1/assignments"
    bench.dashboard.stumbles[path] = [Answer(404, b"<html>")]
    with pytest.raises(Trouble):
        await bench.claimed.ours(slip)
    assert await bench.claimed.ours(slip)
    await bench.claimed.note_failure(slip, bench.notes)
    part.status = "COMPLETED"
    bench.dashboard.stumbles[path] = [Answer(404, b"<html>")]
    with pytest.raises(Trouble):
        await bench.claimed.settle(Slip(id="other"), bench.notes, trio.lowlevel.checkpoint)
    assert set(await bench.notes.all()) == {slip.job}
    await bench.claimed.settle(Slip(id="other"), bench.notes, trio.lowlevel.checkpoint)
    assert part.status == "RUNNING"


async def test_what_is_ours_under_a_new_row_is_ours(bench: Bench) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    bench.dashboard.later_s = 3600
    part.worker = bench.dashboard.known.meet("box").id
    assert part.worker != slip.worker
    assert await bench.claimed.ours(slip)
    part.worker = "w-other"
    assert not await bench.claimed.ours(slip)


@pytest.mark.parametrize("answer", [*map(Answer, (404, 408, 425, 429, 500)), Answer(200, []), Answer(200, {"id": ""})])
async def test_where_our_row_is_not_told_nothing_is_said_of_an_assignment(bench: Bench, answer: Answer) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    bench.dashboard.later_s = 3600
    part.worker = bench.dashboard.known.meet("box").id
    bench.dashboard.stumbles["/api/heartbeat"] = [answer]
    with pytest.raises((Trouble, Odd)):
        await bench.claimed.ours(slip)
    assert await bench.claimed.ours(slip)

    bench.claimed = Claimed(bench.http, "box", "x", 0.0)  # the next life: only the note knows
    await bench.claimed.note_failure(slip, bench.notes)
    part.status = "COMPLETED"
    bench.dashboard.stumbles["/api/heartbeat"] = [answer]
    with pytest.raises((Trouble, Odd)):
        await bench.claimed.settle(Slip(id="other"), bench.notes, trio.lowlevel.checkpoint)
    assert set(await bench.notes.all()) == {slip.job}
    await bench.claimed.settle(Slip(id="other"), bench.notes, trio.lowlevel.checkpoint)
    assert part.status == "RUNNING"


async def test_a_dashboard_that_never_tells_our_row_is_not_asked_for_ever(bench: Bench) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    part.worker = "w-other"
    bench.dashboard.stumbles["/api/heartbeat"] = ["drop", *[Answer(404)] * (MOST_UNTOLD + 2)]
    for _ in range(MOST_UNTOLD + 1):
        with pytest.raises(Trouble):
            await bench.claimed.ours(slip)
    assert not await bench.claimed.ours(slip)
    bench.dashboard.stumbles["/api/heartbeat"] = ["drop"]
    with pytest.raises(Trouble):  # no answer at all says nothing, however often
        await bench.claimed.ours(slip)


@pytest.mark.parametrize("answer", [Answer(404), Answer(200, [])])
async def test_a_claim_whose_holder_is_not_told_does_not_count(bench: Bench, answer: Answer) -> None:
    (part,) = bench.dashboard.study("x", {})
    bench.dashboard.stumbles[f"/api/assignments/{part.id}/claim"] = ["drop"]
    bench.dashboard.stumbles["/api/heartbeat"] = [answer]
    assert await bench.claim() is None
    assert bench.dashboard.stumbles["/api/heartbeat"] == []
    assert await bench.notes.all() == {}


@pytest.mark.parametrize("stumble", [None, "drop", Answer(500)])
async def test_what_an_end_from_a_new_row_did_not_complete_is_claimed_and_ended_again(
    bench: Bench, stumble: Answer | str | None
) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    bench.dashboard.later_s = 3600
    await bench.finished()
    assert part.status == "RUNNING"
    if stumble is not None:
        bench.dashboard.stumbles[f"/api/assignments/{part.id}/claim"] = [stumble]
        with pytest.raises(Trouble):
            await bench.claimed.settle(slip, bench.notes, bench.finished)
    await bench.claimed.settle(slip, bench.notes, bench.finished)
    assert part.status == "COMPLETED"
    part.status = "RUNNING"
    part.worker = "w-other"
    await bench.claimed.settle(slip, bench.notes, bench.finished)
    assert (part.status, part.worker) == ("RUNNING", "w-other")


@pytest.mark.parametrize("answered", [True, False])
async def test_an_outage_while_an_end_is_told_again_is_survived_too(bench: Bench, answered: bool) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    bench.dashboard.later_s += 3600
    await bench.finished()
    outages = 0

    async def again() -> None:
        nonlocal outages
        if outages < 2:
            outages += 1
            bench.dashboard.later_s += 3600
            if not answered:
                bench.dashboard.stumbles["/api/super-studies/s1/assignments"] = ["drop"]
        await bench.finished()

    if not answered:
        for _ in range(2):
            with pytest.raises(Trouble):
                await bench.claimed.settle(slip, bench.notes, again)
            assert await bench.claimed.ours(slip), "the session that was lost began anew with this"
    await bench.claimed.settle(slip, bench.notes, again)
    assert len(bench.dashboard.known.rows) == 4
    assert part.status == "COMPLETED"


async def test_a_failure_is_remembered_under_the_row_of_its_last_claim(bench: Bench) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    await bench.claimed.note_failure(slip, bench.notes)
    for _ in range(3):
        bench.dashboard.later_s += 3600
        bench.claimed = Claimed(bench.http, "box", "x", 0.0)  # another life
        part.status = "COMPLETED"
        await bench.claimed.settle(Slip(id="other"), bench.notes, trio.lowlevel.checkpoint)
        assert part.status == "RUNNING"
        assert (await bench.notes.all())[slip.job] == msgspec.structs.replace(slip, worker=part.worker, failed=True)
    assert len(bench.dashboard.known.rows) == 4


async def test_a_failed_assignment_that_another_end_completed_is_failed_again(bench: Bench) -> None:
    failed, good = bench.dashboard.study("x", {}, {})
    slip = await bench.claim()
    assert slip is not None
    await bench.claimed.note_failure(slip, bench.notes)
    ours = await bench.claim()
    assert ours is not None

    await bench.finished()
    assert [failed.status, good.status] == ["COMPLETED", "RUNNING"]  # what the real one may do
    await bench.claimed.settle(ours, bench.notes, bench.finished)
    assert [failed.status, good.status] == ["RUNNING", "COMPLETED"]
    failed.status, failed.worker = "PENDING", None
    await bench.claimed.settle(ours, bench.notes, bench.finished)
    assert slip.job not in await bench.notes.all(), "somebody has reset it: it is not ours to watch"


async def test_an_end_that_counts_at_the_last_try_counts(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    (part,) = bench.dashboard.study("x", {})
    slip = await bench.claim()
    assert slip is not None
    tries = 0

    async def again() -> None:
        nonlocal tries
        tries += 1
        if tries < SETTLE_TRIES:
            await trio.lowlevel.checkpoint()
        else:
            await bench.finished()

    await bench.claimed.settle(slip, bench.notes, again)
    assert part.status == "COMPLETED"
    assert "may never count" not in caplog.text


async def test_a_dashboard_that_never_settles_does_not_hold_us_for_ever(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.dashboard.study("x", {}, {})
    slip = await bench.claim()
    assert slip is not None
    await bench.claimed.note_failure(slip, bench.notes)
    ours = await bench.claim()
    assert ours is not None
    tries = 0

    async def ignored() -> None:
        nonlocal tries
        await trio.lowlevel.checkpoint()
        tries += 1

    await bench.claimed.settle(ours, bench.notes, ignored)
    assert tries == SETTLE_TRIES + 1
    assert "may never count" in caplog.text


async def test_the_planned_one_gives_and_notes(bench: Bench) -> None:
    bench.dashboard.give("a", b"config")
    bench.dashboard.give("b", b"config", flat=True)
    ids = []
    for name in ("a", "b"):
        found = await bench.assigned.next(bench.notes, lambda _job: 2)
        assert found is not None
        assert (found.slip.attempt, found.config) == (2, None)
        assert found.config_url.endswith(f"/configs/{name}")
        ids.append(found.slip.id)
        assert found.slip.job in await bench.notes.all()
        assert await bench.assigned.ours(found.slip)
    assert ids[0] == "a"
    assert await bench.assigned.next(bench.notes, lambda _job: 1) is None
    bench.dashboard.queue.append([])
    with pytest.raises(Odd):
        await bench.assigned.next(bench.notes, lambda _job: 1)
    slip = (await bench.notes.all())["a"]
    await bench.assigned.note_failure(slip, bench.notes)
    assert set(await bench.notes.all()) == {ids[1]}
