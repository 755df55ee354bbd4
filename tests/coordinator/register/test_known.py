"""The register on both databases: what one writes, others know; what is known while the database is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import trio

from coordinator.enrolments import Enrolments
from coordinator.keys import KeyRefusal, Keys, digest
from coordinator.register import Register, Turn
from coordinator.register import known as module
from coordinator.register.known import Known
from coordinator.registrations import Registrations
from coordinator.store import StoreError
from coordinator.tenants import Tenants
from protocol.faults import FaultError

Open = Callable[[], Register]
WAIT_S = 60.0


async def test_a_key_made_and_revoked_at_one_replica_is_so_at_another(make: Open) -> None:
    here, there = Keys(make()), Keys(make())
    there.known.clock = lambda: 1000.0
    secret = here.create("client", tenant="acme", rpm=60, concurrent=4, models=["b", "a", "a"], by="me")
    found = await there.look_up(secret)
    assert found is not None
    assert (found.tenant, found.rpm, found.concurrent, found.models) == ("acme", 60, 4, ("a", "b"))
    assert there.lives(found.prefix)
    here.revoke(found.prefix, by="me")
    assert await there.look_up(secret) is not None  # for a moment, where nobody watches
    await there.known.fresh()
    assert await there.look_up(secret) is None
    assert not there.lives(found.prefix)


async def test_watching_finds_a_revocation_within_a_second_and_says_who_made_it(
    make: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the looks: one begins every `POLL_S`, and the first that begins after the revocation finds it."""
    caplog.set_level(logging.INFO, "coordinator.audit")
    beside, known = Keys(make()), Known(make())
    keys, changed = Keys(known), trio.Event()
    looks, found_at, real = 0, list[int](), known.refresh

    def counting() -> None:
        nonlocal looks
        looks += 1
        real()

    monkeypatch.setattr(known, "refresh", counting)
    secret = beside.create("worker", worker="box7", by="anna@desk")
    assert await keys.look_up(secret) is not None

    def notice() -> None:
        if not keys.lives(secret[:12]) and not found_at:
            found_at.append(looks)
            changed.set()

    known.on_change.append(notice)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(known.watch)
        while not known.watched:
            await trio.lowlevel.checkpoint()
        beside.revoke(secret[:12], by="anna@desk")
        seen = looks
        with trio.fail_after(WAIT_S):
            await changed.wait()
        nursery.cancel_scope.cancel()
    assert found_at[0] <= seen + 1
    assert module.POLL_S < 1.0
    assert f"anna@desk: revoked the key {secret[:12]}" in caplog.text
    assert secret not in caplog.text


async def test_many_unknown_secrets_share_questions_to_the_database(
    make: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, asked = Keys(make()), 0
    real = keys.known.refresh

    def counting() -> None:
        nonlocal asked
        asked += 1
        real()

    monkeypatch.setattr(keys.known, "refresh", counting)
    async with trio.open_nursery() as nursery:

        async def wrong(number: int) -> None:
            assert await keys.look_up(f"bhc_{number:043d}") is None

        for number in range(1000):
            nursery.start_soon(wrong, number)
    assert 1 <= asked <= 3
    assert not keys.known.keys  # nothing is remembered of them


async def test_known_keys_stay_good_while_the_database_is_away_but_not_for_ever(make: Open) -> None:
    now = 1000.0
    register = make()
    keys = Keys(register)
    keys.known.clock = lambda: now
    secret = keys.create("client")
    assert await keys.look_up(secret) is not None
    keys.known.watched = True  # a watcher that finds nothing
    register.close()
    now += module.STALE_S - 1
    assert await keys.look_up(secret) is not None
    with pytest.raises(FaultError) as caught:  # not "unknown": nobody can tell
        await keys.look_up("bhc_" + "a" * 43)
    assert caught.value.fault.code == "overloaded"
    now += 1
    with pytest.raises(FaultError, match="try again"):
        await keys.look_up(secret)


async def test_a_watcher_survives_a_database_that_goes_away(
    make: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    known, failures, seen = Known(make()), 3, trio.Event()
    real = known.refresh

    def refresh() -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreError("gone")
        real()

    monkeypatch.setattr(known, "refresh", refresh)
    known.on_change.append(seen.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(known.watch)
        with trio.fail_after(WAIT_S):
            await seen.wait()
        nursery.cancel_scope.cancel()
    assert caplog.text.count("cannot be read") == 1


async def test_a_database_that_hangs_keeps_nobody_waiting(make: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, hang, hanging = Keys(make()), threading.Event(), 0
    secret = keys.create("client")
    assert await keys.look_up(secret) is not None
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    real = keys.known.refresh

    def refresh() -> None:
        nonlocal hanging
        hanging += 1
        assert hang.wait(2 * WAIT_S)
        real()

    monkeypatch.setattr(keys.known, "refresh", refresh)
    keys.known.watched = True
    try:
        with trio.fail_after(WAIT_S):
            for number in range(3):
                with pytest.raises(FaultError, match="try again"):
                    await keys.look_up(f"bhc_{number:043d}")
                assert await keys.look_up(secret) is not None
        assert hanging == 1  # no thread hangs beside the first
    finally:
        hang.set()


def test_a_register_put_back_from_a_backup_is_read_anew(make: Open) -> None:
    keys = Keys(make())
    old = keys.create("client")
    new = keys.create("client")
    assert keys.find(new) is not None

    def put_back(turn: Turn) -> None:
        turn.all("DELETE FROM keys WHERE prefix = :prefix RETURNING prefix", prefix=new[:12])
        turn.all("UPDATE changes SET number = 2 RETURNING number")

    keys.known.register.write(put_back)
    keys.known.refresh()
    assert digest(new) not in keys.known.keys
    assert digest(old) in keys.known.keys


def test_two_creates_at_once_make_two_keys_and_numbers_in_order(make: Open) -> None:
    keys = [Keys(make()) for _ in range(4)]
    made: list[str] = []

    def work(one: Keys) -> None:
        made.extend(one.create("client", name="x") for _ in range(5))

    threads = [threading.Thread(target=work, args=[one]) for one in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20
    rows = keys[0].known.register.read("SELECT changed FROM keys ORDER BY changed")
    assert [row["changed"] for row in rows] == list(range(2, 22))
    assert all(keys[0].find(secret) is not None for secret in made)


def test_a_second_key_of_the_same_prefix_is_refused(make: Open) -> None:
    keys = Keys(make())
    keys.adopt("bhc_" + "a" * 43, "client")
    keys.adopt("bhc_" + "a" * 43, "client")  # the same one again changes nothing
    with pytest.raises(KeyRefusal, match="Another key begins"):
        keys.adopt("bhc_" + "a" * 42 + "b", "client")
    assert len(list(keys.list())) == 1


@pytest.mark.parametrize("prefix", ["", "bhc_", "%____", "bhc_%", "bhc_\u00e9", "\udc80" * 6, "b" * 100_000])
def test_what_is_no_prefix_revokes_nothing(make: Open, prefix: str) -> None:
    keys = Keys(make())
    secret = keys.create("client")
    with pytest.raises(KeyRefusal, match="No live key"):
        keys.revoke(prefix)
    assert keys.find(secret) is not None


def test_tenants(make: Open) -> None:
    keys, tenants = Keys(make()), Tenants(make())
    keys.create("client", tenant="unset")
    assert tenants.get("acme").weight == 1.0
    tenants.set("acme", weight=2.5, models=["a"], rpm=60)
    tenants.set("acme", store_content=False)
    acme = tenants.get("acme")
    assert (acme.weight, acme.store_content, acme.models, acme.rpm, acme.concurrent) == (2.5, False, ("a",), 60, 0)
    assert [one.name for one in tenants.list()] == ["acme", "unset"]
    assert tenants.set("acme", models=[]).models == ()
    for wrong in ({"weight": 0.0}, {"weight": float("nan")}, {"rpm": -1}, {"models": [""]}, {"models": ["a\nb"]}):
        with pytest.raises(KeyRefusal):
            tenants.set("acme", **wrong)
    with pytest.raises(KeyRefusal):
        tenants.set("")


def test_models_of_tenant_and_key_both_hold(make: Open) -> None:
    register = make()
    known = Known(register)
    keys, tenants = Keys(known), Tenants(known)
    own = keys.find(keys.create("client", tenant="acme", models=["a", "b"]))
    free = keys.find(keys.create("client", tenant="acme"))
    assert own is not None
    assert free is not None
    assert [tenants.may_use(own, name) for name in "abc"] == [True, True, False]
    assert tenants.may_use(free, "c")
    tenants.set("acme", models=["b", "c"])
    assert [tenants.may_use(own, name) for name in "abc"] == [False, True, False]
    assert [tenants.may_use(free, name) for name in "abc"] == [False, True, True]
    keys.revoke(own.prefix)
    assert not tenants.may_submit("acme", own.prefix, "c")  # lines of a batch that it left behind


def test_an_enrolment_token_admits_once(make: Open) -> None:
    register = make()
    tokens, keys = Enrolments(register), Keys(register)
    token = tokens.create(60, worker="box7", by="me")
    worker, secret = tokens.use(token, "another")
    assert worker == "box7"
    key = keys.find(secret)
    assert key is not None
    assert (key.scope, key.worker, key.name) == ("worker", "box7", "box7")
    with pytest.raises(FaultError, match=f"used before, for the key {key.prefix}"):
        tokens.use(token)
    with pytest.raises(FaultError, match="no enrolment token"):
        tokens.use(secret)
    with pytest.raises(FaultError, match="unknown"):
        tokens.use("bhe_" + "a" * 43)
    assert [one.state(0) for one in tokens.list()] == ["used"]


def test_an_enrolment_token_that_is_over_admits_nobody(make: Open) -> None:
    register = make()
    tokens = Enrolments(register)
    expired, revoked, nameless = (tokens.create(60) for _ in range(3))
    prefix = expired[:12]
    register.write(
        lambda turn: turn.all("UPDATE enrolments SET expires_ms = 1 WHERE prefix = :p RETURNING 1", p=prefix)
    )
    tokens.revoke(revoked[:12])
    with pytest.raises(FaultError, match="expired"):
        tokens.use(expired, "w")
    with pytest.raises(FaultError, match="revoked"):
        tokens.use(revoked, "w")
    for name in ("", "a b", "../x", "x" * 1000):
        with pytest.raises(FaultError, match="worker"):
            tokens.use(nameless, name)
    assert tokens.use(nameless, "w")[0] == "w"  # what was refused did not use it up
    with pytest.raises(KeyRefusal, match="0 open tokens"):
        tokens.revoke(nameless[:12])
    for wrong in (0, -1, 31 * 86_400, float("nan")):
        with pytest.raises(KeyRefusal, match="expires"):
            tokens.create(wrong)


def test_of_two_that_use_a_token_at_once_one_gets_a_key(make: Open) -> None:
    both = [Enrolments(make()) for _ in range(2)]
    token = both[0].create(60)
    ends: list[str] = []
    ready = threading.Barrier(2)

    def use(one: Enrolments, name: str) -> None:
        ready.wait()
        try:
            ends.append(one.use(token, name)[0])
        except FaultError as error:
            ends.append(error.fault.code)

    threads = [threading.Thread(target=use, args=[one, f"w{n}"]) for n, one in enumerate(both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends)[0] == "unauthorized"
    assert sorted(ends)[1] in {"w0", "w1"}
    assert sum(1 for _ in Keys(make()).list()) == 1


async def test_a_registration_approved_at_one_replica_is_admitted_at_another(make: Open) -> None:
    here, there = Registrations(make()), Registrations(make())
    known = {"machine": "box", "user": "me", "models": ["m"]}
    request, created = here.request("i", "192.0.2.1", digest("s"), "x", known)
    assert created
    assert there.request("i", "192.0.2.1", digest("s"), "x", known) == (request, False)
    worker = there.approve(request, by="boss").worker
    assert worker is not None
    polled = here.poll(request, "s")
    assert polled is not None
    assert await there.admits_now(worker, polled.token)
    assert not await there.admits_now(worker, polled.token + "x")
    here.reject(request, "sold")
    assert not here.knows(worker)
    assert not there.admits(worker, polled.token)


def test_a_native_worker_is_admitted_at_its_request(make: Open) -> None:
    register = make()
    known = Known(register)
    asked, keys = Registrations(known), Keys(known)
    said = {"machine": "box", "user": "me", "models": []}

    def ask(secret: str) -> str:
        return asked.request("box7", "192.0.2.1", digest(secret), "1.0", said, "native")[0]

    studio, _ = asked.request("box7", "192.0.2.1", digest("s"), "x", said)
    request = ask("s")
    assert request != studio
    assert asked.approve(request).worker == "box7"
    first, second = asked.poll(request, "s"), asked.poll(request, "s")
    assert first is not None
    assert second is not None
    key = keys.find(second.token)
    assert key is not None
    assert (key.scope, key.worker) == ("worker", "box7")
    assert keys.find(first.token) is None  # its answer may have been lost
    assert not asked.admits("box7", second.token)  # it opens no door of the studio contract

    keys.revoke(key.prefix)
    again = asked.poll(request, "s")
    assert again is not None
    assert (again.state, again.reason, again.token) == ("rejected", "Its key was revoked.", "")

    third = ask("t")
    asked.approve(third)
    polled = asked.poll(third, "t")
    assert polled is not None
    fourth = ask("u")
    assert keys.find(polled.token) is not None
    asked.approve(fourth)  # it lost everything, and is admitted anew
    assert keys.find(polled.token) is None
    last = asked.poll(fourth, "u")
    assert last is not None
    assert keys.find(last.token) is not None
    asked.reject(fourth)
    assert keys.find(last.token) is None
