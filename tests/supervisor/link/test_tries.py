"""Troubles of moving files: which pass, which do not, and how long anybody waits for it."""

from __future__ import annotations

import errno
import math
import os

import httpx
import pytest
import trio

from protocol.faults import FaultError, refuse
from supervisor.link.reconnect import Backoff
from supervisor.link.tries import Transient, judge, outlast, patience, persist, pour, unusable
from supervisor.link.web import Web


async def tried(*troubles: Exception, patience_s: float = 60.0) -> int:
    """Fail in these ways, then return the number of the try."""
    left, count = list(troubles), 0

    async def once() -> int:
        nonlocal count
        await trio.lowlevel.checkpoint()
        count += 1
        if left:
            raise left.pop(0)
        return count

    async with Web(None, 1.0) as web:
        await web.client()
        return await persist(web, once, "input_unavailable", Backoff(1.0, 8.0, chance=lambda: 1.0), patience_s)


async def test_what_may_pass_is_tried_again_with_growing_pauses(autojump_clock):
    began = trio.current_time()
    assert await tried(Transient("x"), httpx.ConnectError("x"), httpx.StreamClosed()) == 4
    assert trio.current_time() - began == pytest.approx(1 + 2 + 4)


async def test_patience_ends_with_the_last_trouble(autojump_clock):
    began = trio.current_time()
    with pytest.raises(Transient, match="ReadError: the third"):
        await tried(Transient("x"), Transient("y"), httpx.ReadError("the third"), patience_s=6.0)
    assert trio.current_time() - began == pytest.approx(1 + 2), "the next try would be too late"


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (OSError(errno.ENOSPC, "full"), "worker_disk_full"),
        (OSError(errno.EDQUOT, "full"), "worker_disk_full"),
        (OSError(errno.EIO, "broken"), "worker_failed"),
        (httpx.InvalidURL("x"), "input_unavailable"),
        (ValueError("Invalid IPv6 URL"), "input_unavailable"),
    ],
)
async def test_what_does_not_pass_is_told_at_once(autojump_clock, trouble, code):
    with pytest.raises(FaultError) as refused:
        await tried(trouble)
    assert refused.value.fault.code == code


@pytest.mark.parametrize("status", [500, 503, 408, 425, 429])
def test_answers_that_may_be_others_later(status):
    with pytest.raises(Transient, match=str(status)):
        judge(status, "upload_failed", "It was not taken")


@pytest.mark.parametrize(("status", "again"), [(301, True), (401, True), (404, True), (413, False)])
def test_answers_that_are_final(status, again):
    with pytest.raises(FaultError, match=f"It was not taken: HTTP {status}") as refused:
        judge(status, "upload_failed", "It was not taken")
    assert refused.value.fault.may_retry is again, "by another worker"


def test_more_answers_may_be_others_later():
    judge(204, "upload_failed", "It was not taken")
    with pytest.raises(Transient):
        judge(401, "upload_failed", "It was not taken", (401,))


async def test_nobody_is_patient_beyond_the_deadline(autojump_clock):
    now = trio.current_time()
    assert patience(10.0, None) == 10.0
    assert patience(10.0, now + 4.0) == 4.0
    assert patience(10.0, now - 1.0) == 0.0


def test_a_file_that_cannot_be_used_is_the_workers_trouble():
    assert unusable(OSError(errno.EACCES, "no")).fault.may_retry


class Body(httpx.AsyncByteStream):
    """Pieces of a response, which notes whether it was closed."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.closed = pieces, False

    async def __aiter__(self):
        for piece in self.pieces:
            await trio.lowlevel.checkpoint()
            yield piece

    async def aclose(self) -> None:
        self.closed = True


async def test_a_body_is_written_and_seen(tmp_path):
    seen: list[bytes] = []
    with (tmp_path / "x").open("wb") as file:
        response = httpx.Response(200, stream=Body(b"ab", b"cd"))
        moved: list[int] = []
        assert await pour(response, os.dup(file.fileno()), 4, moved.append, seen.append) == 4
    assert (tmp_path / "x").read_bytes() == b"abcd"
    assert (b"".join(seen), sum(moved)) == (b"abcd", 4)


async def test_a_body_that_is_too_long_is_left(tmp_path):
    endless = httpx.Response(200, stream=Body(*[b"x" * 2**20] * 100))
    with (tmp_path / "x").open("wb") as file:
        size = await pour(endless, os.dup(file.fileno()), 2**20, lambda _n: None, lambda _p: None)
    assert 2**20 < size <= 3 * 2**20
    assert (tmp_path / "x").stat().st_size == 2**20


async def test_a_disk_that_refuses_is_told_when_the_body_has_ended(tmp_path):
    there, away = os.pipe()
    os.close(there)
    with pytest.raises(OSError, match="Broken pipe"):
        await pour(httpx.Response(200, stream=Body(b"x" * 2**20)), away, 2**21, lambda _n: None, lambda _p: None)


class _Away:
    """Something that is tried for 10 s each time, and works at the last."""

    def __init__(self, tries: int, takes_s: float = 10.0) -> None:
        self.left, self.takes_s = tries, takes_s

    async def __call__(self) -> None:
        self.left -= 1
        await trio.sleep(self.takes_s)
        if self.left:
            raise refuse("upload_failed", "nobody was there")


async def test_patience_that_ran_out_while_nobody_was_there_begins_anew(autojump_clock):
    away = _Away(1000)
    await outlast(away, lambda: math.inf, 10.0)
    assert away.left == 0


async def test_the_other_side_that_came_back_meanwhile_gets_its_time_and_no_more(autojump_clock):
    away = _Away(1000)
    with pytest.raises(FaultError, match="nobody was there"):
        await outlast(away, lambda: 25.0, 10.0)
    assert (1000 - away.left, trio.current_time()) == (4, 40.0)


async def test_what_cannot_pass_is_told_at_once_though_nobody_is_there(autojump_clock):
    away = _Away(1000, takes_s=1.0)
    with pytest.raises(FaultError):
        await outlast(away, lambda: math.inf, 10.0)
    assert away.left == 999
    with pytest.raises(FaultError):
        await outlast(away, lambda: math.inf, math.inf)
    assert away.left == 998
