from __future__ import annotations

import pytest
import trio
import trio.testing

from supervisor.link.dialects.studio_offers import Slip
from supervisor.link.dialects.studio_uploads import TRIES, Uploads
from supervisor.link.ledger import Key

SLIP = Slip(job="j", attempt=1, kind="image", model="m")


class Desk:
    """What the claims would say."""

    def __init__(self, held: Key | None = SLIP.key, left: bool = True) -> None:
        self.held = held
        self.failed: list[tuple[Key, str]] = []
        self.left: list[Key] = []
        self.verdicts: list[bool] = []
        self.uploads = Uploads(
            held=lambda: self.held,
            fail=lambda key, why: self.failed.append((key, why)),
            leave=lambda key: left and not self.left.append(key),
            on_fewer=lambda: None,
            aside_s=600.0,
        )

    async def refuse(self, at_once: bool = False) -> None:
        self.verdicts.append(await self.uploads.refused(SLIP, "because", at_once))

    async def conflict(self) -> None:
        self.verdicts.append(await self.uploads.taken_up(SLIP))


async def test_two_more_tries_and_then_the_job_has_failed_once_the_server_knows(nursery):
    desk = Desk()
    for _ in range(TRIES - 1):
        await desk.refuse()
    assert (desk.verdicts, desk.failed) == ([False, False], [])
    nursery.start_soon(desk.refuse)
    await trio.testing.wait_all_tasks_blocked()
    assert desk.failed == [(SLIP.key, "because")]
    assert len(desk.verdicts) == 2, "the result is kept meanwhile"
    assert desk.uploads.acknowledged(SLIP.key)
    await trio.testing.wait_all_tasks_blocked()
    assert desk.verdicts[2:] == [True]
    assert desk.uploads.keeps_offers_waiting(None), "until its end has come here"
    desk.uploads.forget(SLIP.key)
    assert not desk.uploads.keeps_offers_waiting(None)


async def test_what_no_other_try_helps_fails_at_once(nursery):
    desk = Desk()
    nursery.start_soon(desk.refuse, True)
    await trio.testing.wait_all_tasks_blocked()
    assert len(desk.failed) == 1
    desk.uploads.acknowledged(SLIP.key)


async def test_a_session_that_breaks_first_leaves_the_result_and_counts_from_the_beginning(nursery):
    desk = Desk()
    for _ in range(TRIES - 1):
        await desk.refuse()
    nursery.start_soon(desk.refuse)
    await trio.testing.wait_all_tasks_blocked()
    desk.uploads.over()
    await trio.testing.wait_all_tasks_blocked()
    assert desk.verdicts == [False] * TRIES
    assert not desk.uploads.acknowledged(SLIP.key), "a word of nobody's"
    for _ in range(TRIES - 1):
        await desk.refuse()
    assert len(desk.failed) == 1


@pytest.mark.parametrize("held", [None, ("other", 1), ("j", 2)])
async def test_without_its_claim_nothing_is_said_and_nothing_is_given_up(held):
    desk = Desk(held)
    for _ in range(3 * TRIES):
        await desk.refuse()
        await desk.refuse(True)
    assert not any(desk.verdicts)
    assert desk.failed == []


async def test_without_its_claim_a_result_that_is_not_taken_keeps_other_jobs_away_for_so_many_tries():
    desk = Desk(None)
    waiting = []
    for _ in range(2 * TRIES):
        await desk.refuse()
        desk.uploads.over()  # what another session was told counts as well
        waiting.append(desk.uploads.waiting)
    assert waiting == [0] * (TRIES - 1) + [1] * (TRIES + 1)
    desk.held = SLIP.key
    desk.uploads.taken(SLIP.key)
    assert desk.uploads.waiting == 0
    await desk.refuse()
    assert (desk.failed, desk.verdicts[-1]) == ([], False), "its claim has its own tries"
    desk.uploads.forget(SLIP.key)
    assert desk.uploads.waiting == 0


async def test_a_result_that_waits_for_its_job_and_was_not_taken_before_counts_once(nursery):
    desk = Desk(None)
    for _ in range(TRIES):
        await desk.refuse()
    nursery.start_soon(desk.conflict)
    await trio.testing.wait_all_tasks_blocked()
    assert desk.uploads.waiting == 1
    nursery.cancel_scope.cancel()


async def test_what_has_ended_leaves_no_count_to_the_next_of_its_name():
    """A job that ends and comes again in one session has its own attempt; the count is gone all the same."""
    desk = Desk()
    for _ in range(TRIES - 1):
        await desk.refuse()
    desk.uploads.forget(SLIP.key)
    with trio.fail_after(60):
        await desk.refuse()
    assert (desk.failed, desk.verdicts) == ([], [False] * TRIES)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("drained_first", [True, False])
async def test_a_drain_lets_go_of_what_waits_for_its_job(nursery, left, drained_first):
    desk = Desk(None, left)
    if drained_first:
        desk.uploads.drain()
    nursery.start_soon(desk.conflict)
    await trio.testing.wait_all_tasks_blocked()
    if not drained_first:
        assert desk.uploads.waiting == 1
        desk.uploads.drain()
        await trio.testing.wait_all_tasks_blocked()
    # Left to the next life, it is cancelled from there; what cannot be left is given up.
    assert (desk.left, desk.verdicts) == (([SLIP.key], []) if left else ([], [False]))
    nursery.cancel_scope.cancel()


async def test_a_drain_leaves_alone_what_was_offered_here_again_a_moment_ago(nursery):
    """Both come in one turn of the loop: its claim is ours, and it is delivered in this life."""
    desk = Desk(None)
    nursery.start_soon(desk.conflict)
    await trio.testing.wait_all_tasks_blocked()
    desk.held = SLIP.key
    desk.uploads.taken(SLIP.key)
    desk.uploads.drain()
    await trio.testing.wait_all_tasks_blocked()
    assert (desk.left, desk.verdicts) == ([], [True])


def test_an_upload_that_is_taken_without_its_claim_has_overtaken_one_offer_of_its_session():
    desk = Desk(None)
    desk.uploads.delivered(SLIP.key)
    assert not desk.uploads.overtook("other")
    assert [desk.uploads.overtook(SLIP.job) for _ in range(2)] == [True, False]
    desk.uploads.delivered(SLIP.key)
    desk.uploads.over()
    assert not desk.uploads.overtook(SLIP.job)
    desk.held = SLIP.key
    desk.uploads.delivered(SLIP.key)
    assert not desk.uploads.overtook(SLIP.job), "its offer came before"
