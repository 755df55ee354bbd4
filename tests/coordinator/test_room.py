"""How many jobs may wait, of a tenant and of all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.blobs.folder import FolderBlobs
from coordinator.cli.main import _opened
from coordinator.config import Config, load
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_settings import DispatchSettings
from coordinator.records import JobRecord, Submission
from coordinator.room import Room
from coordinator.store import SqliteStore
from coordinator.testing_link import submission
from protocol.faults import Fault, FaultError

LATER = 4_000_000_000_000  # in the year 2096


def asked(tenant: str, run_after_ms: int = 0) -> Submission:
    return Submission(kind="llm", model="m", params=b"", tenant=tenant, run_after_ms=run_after_ms)


def waits(tenant: str, run_after_ms: int = 0) -> JobRecord:
    return JobRecord(
        id="j",
        kind="llm",
        model="m",
        state="queued",
        tenant=tenant,
        attempt=0,
        created_ms=0,
        params=b"",
        run_after_ms=run_after_ms,
    )


def refusal(room: Room, wanted: Submission, more: int = 0) -> Fault | None:
    try:
        room.check(wanted, more)
    except FaultError as error:
        return error.fault
    return None


def code(room: Room, wanted: Submission, more: int = 0) -> str:
    fault = refusal(room, wanted, more)
    return fault.code if fault else ""


def test_a_tenant_fills_its_own_room_and_no_other() -> None:
    room = Room(most=100, most_of_tenant=3)
    room.came([waits("a")] * 2)
    assert (code(room, asked("a")), code(room, asked("a"), 1)) == ("", "rate_limited")
    room.came([waits("a")])
    fault = refusal(room, asked("a"))
    assert fault is not None
    assert "'a'" in fault.message
    assert "max_queued_per_tenant in coordinator.toml" in fault.message
    assert fault.detail["retry_after_s"] > 0
    assert code(room, asked("b")) == ""
    room.went(waits("a"))
    assert code(room, asked("a")) == ""


def test_the_wide_limit_is_over_all_tenants() -> None:
    room = Room(most=4, most_of_tenant=3)
    room.came([waits("a"), waits("a"), waits("b"), waits("b")])
    fault = refusal(room, asked("c"))
    assert fault is not None
    assert (fault.code, fault.detail["retry_after_s"] > 0) == ("overloaded", True)
    assert "max_queued in coordinator.toml" in fault.message


def test_what_starts_later_stops_nothing_that_is_due() -> None:
    room = Room(most=3, most_of_tenant=3)
    room.came([waits("a", LATER)] * 3)
    assert code(room, asked("a", LATER)) == "rate_limited"
    assert code(room, asked("b", LATER)) == "overloaded"
    assert (code(room, asked("a")), code(room, asked("b"))) == ("", "")
    room.came([waits("a")] * 3)  # due, however many of its others wait for their hour
    assert (code(room, asked("a")), code(room, asked("b"))) == ("rate_limited", "overloaded")
    assert room.total == 6


def test_a_count_of_the_store_takes_the_place_of_what_was_added_up() -> None:
    room = Room(most=100, most_of_tenant=2)
    room.came([waits("a")] * 2)
    room.counted({"a": (1, 5), "b": (2, 0)})
    assert (code(room, asked("a")), code(room, asked("b")), room.total) == ("", "rate_limited", 8)
    room.went(waits("c"))
    assert room.total == 8


async def test_one_tenants_jobs_of_next_year_close_the_service_to_nobody(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        settings = DispatchSettings(max_queued=6, max_queued_per_tenant=4)
        dispatcher = Dispatcher(store, FolderBlobs(tmp_path / "blobs"), settings=settings)  # no loop counts meanwhile

        async def submit(tenant: str, **options: object) -> str:
            try:
                await dispatcher.submit(submission(tenant=tenant, wait_for_worker=True, **options))
            except FaultError as error:
                return error.fault.code
            return ""

        assert [await submit("a", run_after_ms=LATER) for _ in range(5)] == ["", "", "", "", "rate_limited"]
        lines = [submission(tenant="a", run_after_ms=LATER, wait_for_worker=True)] * 2
        lot, _ = await dispatcher.lots.submit("a", lines)
        assert (lot.total, lot.refused) == (2, 2)
        assert [await submit("b") for _ in range(5)] == ["", "", "", "", "rate_limited"]
        assert [await submit("a") for _ in range(3)] == ["", "", "overloaded"]
        assert store.waiting() == {"a": (2, 4), "b": (4, 0)}
        assert dispatcher.waiting == 10
    finally:
        store.close()


@pytest.mark.parametrize("said", ["", "max_queued = 7\nmax_queued_per_tenant = 5\n"])
def test_the_file_says_how_many(tmp_path: Path, said: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(said)
    config: Config = load(path)
    coordinator = _opened(config, "", tmp_path / "state", None)
    try:
        settings = coordinator.parts.dispatcher.settings
        expected = {"max_queued": 7, "max_queued_per_tenant": 5} if said else {}
        assert settings == msgspec.structs.replace(DispatchSettings(), **expected)
    finally:
        coordinator.close()
