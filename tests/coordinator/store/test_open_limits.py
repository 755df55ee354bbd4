"""At most so many open jobs of a key or a tenant, however many ask at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import pytest

from coordinator.records import Submission
from coordinator.store import Store
from protocol.faults import Fault, FaultError


def job(key: str = "k1", tenant: str = "acme", key_open: int = 0, tenant_open: int = 0) -> Submission:
    params = msgspec.msgpack.encode({})
    return Submission(
        kind="llm",
        model="m",
        params=params,
        tenant=tenant,
        key_id=key,
        wait_for_worker=True,
        key_open=key_open,
        tenant_open=tenant_open,
    )


def test_the_stricter_of_key_and_tenant_holds_until_a_job_has_ended(store: Store) -> None:
    store.insert("a", job(key_open=2, tenant_open=3))
    store.insert("b", job(key_open=2, tenant_open=3))
    with pytest.raises(FaultError, match="key k1 may have 2 jobs") as caught:
        store.insert("c", job(key_open=2, tenant_open=3))
    assert caught.value.fault.code == "rate_limited"
    assert caught.value.fault.detail["retry_after_s"] == 2
    store.insert("c", job("k2", key_open=2, tenant_open=3))
    with pytest.raises(FaultError, match="tenant 'acme' may have 3 jobs"):
        store.insert("d", job("k3", tenant_open=3))
    store.insert("e", job(tenant="other", tenant_open=1))
    store.insert("f", job("k3"))  # one without limits is not counted against any
    store.cancel("a", "acme", Fault("cancelled", "x"))
    store.cancel("f", "acme", Fault("cancelled", "x"))
    store.insert("g", job("k1", key_open=2, tenant_open=3))


def test_many_at_once_make_no_more_than_the_limit(make: Callable[[], Store], request: pytest.FixtureRequest) -> None:
    stores = [make()]
    if "postgres" in request.node.name:  # several replicas; a SQLite store has one
        stores.append(make())
    made: list[str] = []
    refused: list[str] = []

    def submit(number: int) -> None:
        try:
            made.append(stores[number % len(stores)].insert(f"job-{number}", job(tenant_open=3))[0].id)
        except FaultError as error:
            refused.append(error.fault.code)

    threads = [threading.Thread(target=submit, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert refused == ["rate_limited"] * 9
