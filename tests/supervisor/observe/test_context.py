from __future__ import annotations

import logging

import trio

from supervisor.observe.context import Context, about, current


def record(**extra: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "", 0, "said", (), None)
    vars(made).update(extra)
    assert Context().filter(made)
    return made


def test_fields_nest_and_end() -> None:
    with about(job="j1", attempt=2, model="m"):
        with about(engine="e"):
            assert dict(current()) == {"job": "j1", "attempt": 2, "model": "m", "engine": "e"}
            assert vars(record())["engine"] == "e"
        assert "engine" not in current()
    assert dict(current()) == {}
    assert not hasattr(record(), "job")


def test_what_the_line_says_itself_goes_before() -> None:
    with about(job="outer", attempt=1):
        made = record(job="inner")
    assert vars(made)["job"] == "inner"
    assert vars(made)["attempt"] == 1


async def test_tasks_and_threads_of_a_job_have_its_fields_and_its_neighbours_do_not() -> None:
    seen: dict[str, set[object]] = {"a": set(), "b": set()}

    async def child(name: str) -> None:
        await trio.lowlevel.checkpoint()
        seen[name].add(current().get("job"))
        seen[name].add(await trio.to_thread.run_sync(lambda: current().get("job")))

    async def job(name: str) -> None:
        with about(job=name):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, name)
                nursery.start_soon(child, name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(job, "a")
        nursery.start_soon(job, "b")
    assert seen == {"a": {"a"}, "b": {"b"}}
    assert "job" not in current()
