"""What counts as delivered: the last byte was given to the connection, of an answer that somebody was there for."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.deliveries import Deliveries, Notes, not_yet, note_blob, note_fault, note_file, note_job
from coordinator.records import JobRecord

OK = {"type": "http.response.start", "status": 200, "headers": []}
GONE = {**OK, "status": 499}
MORE = {"type": "http.response.body", "body": b"x", "more_body": True}
LAST = {"type": "http.response.body", "body": b"x"}


def job(state: Any = "succeeded", id_: str = "job_1") -> JobRecord:
    return JobRecord(id=id_, kind="llm", model="m", state=state, tenant="t", attempt=1, created_ms=0, params=b"")


async def served(app: Any, method: str = "GET") -> list[Notes]:
    taken: list[Notes] = []

    async def send(_message: Any) -> None: ...

    await Deliveries(app, taken.append)({"type": "http", "method": method}, None, send)  # type: ignore[arg-type]
    return taken


@pytest.mark.parametrize(
    ("messages", "method", "counts"),
    [
        ((OK, LAST), "GET", True),
        ((OK, MORE, LAST), "POST", True),
        ((OK, MORE), "GET", False),
        ((OK,), "GET", False),
        ((GONE, LAST), "GET", False),
        ((OK, LAST), "HEAD", False),
    ],
)
async def test_only_an_answer_that_went_out_to_its_end_counts(messages: Any, method: str, counts: bool) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note_job(job())
        for message in messages:
            await send(message)

    assert [notes.jobs for notes in await served(app, method)] == ([{"job_1": "t"}] if counts else [])


async def test_what_is_noted() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note_job(job(id_="job_1"))
        not_yet(job(id_="job_1"))
        note_job(job("running", "job_2"))
        note_fault(job("succeeded", "job_3"))
        note_fault(job("failed", "job_4"))
        note_blob("key")
        note_file("file-1", "t")
        await send(OK)
        await send(LAST)

    [notes] = await served(app)
    assert notes == Notes({"job_4": "t"}, ["key"], {"file-1": "t"})
    note_job(job())  # outside of a request it does nothing


async def test_an_answer_that_delivers_nothing_is_nobodys_business() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(OK)
        await send(LAST)

    assert await served(app) == []


async def test_a_failure_in_the_middle_delivers_nothing() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note_job(job())
        await send(OK)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await served(app)
    note_job(job())
