"""Requests per minute: the arithmetic of the buckets, and what clients see of it."""

from __future__ import annotations

import pytest

from coordinator.limits import MAX_BUCKETS, RateLimited, Rates, counted, duration
from coordinator.register.known import Key, Tenant


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def key(rpm: int = 0, prefix: str = "bhc_aaaaaaaa") -> Key:
    return Key(prefix=prefix, scope="client", tenant="acme", rpm=rpm)


ACME = Tenant(name="acme")


def test_a_minute_has_so_many_requests_and_fills_evenly() -> None:
    clock = Clock()
    rates = Rates(clock)
    spent = [rates.take(key(60), ACME) for _ in range(60)]
    assert [one.remaining for one in spent if one] == list(range(59, -1, -1))
    with pytest.raises(RateLimited, match="key bhc_aaaaaaaa may make 60 requests per minute") as caught:
        rates.take(key(60), ACME)
    assert caught.value.fault.http_status == 429
    assert caught.value.fault.detail["retry_after_s"] == 1
    assert caught.value.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.s += 1
    last = rates.take(key(60), ACME)
    assert last is not None
    assert last.remaining == 0
    with pytest.raises(RateLimited):
        rates.take(key(60), ACME)
    clock.s += 3600
    full = rates.take(key(60), ACME)
    assert full is not None
    assert full.remaining == 59  # no more than a minute's


def test_the_stricter_holds_and_a_refused_request_is_counted_by_none() -> None:
    clock = Clock()
    rates, acme = Rates(clock), Tenant(name="acme", rpm=3)
    first, second = key(2, "bhc_1"), key(100, "bhc_2")
    assert rates.take(first, acme) is not None
    assert rates.take(first, acme) is not None
    with pytest.raises(RateLimited, match="key bhc_1"):
        rates.take(first, acme)
    left = rates.take(second, acme)
    assert left is not None
    assert (left.limit, left.remaining) == (3, 0)  # the refused one was not counted
    with pytest.raises(RateLimited, match="tenant 'acme' may make 3") as caught:
        rates.take(second, acme)
    assert caught.value.fault.detail["retry_after_s"] == 20


def test_without_limits_nothing_is_counted_or_kept() -> None:
    rates = Rates(Clock())
    assert rates.take(key(), ACME) is None
    assert not rates._buckets


def test_replicas_share_a_limit_and_a_changed_limit_holds_at_once() -> None:
    clock, replicas = Clock(), 3
    rates = Rates(clock, lambda: replicas)
    for _ in range(20):
        rates.take(key(60), ACME)
    with pytest.raises(RateLimited):
        rates.take(key(60), ACME)
    clock.s += 60
    replicas = 1
    clock.s += 60
    for _ in range(60):
        rates.take(key(60), ACME)
    clock.s += 60
    for _ in range(5):
        rates.take(key(5), ACME)
    with pytest.raises(RateLimited):
        rates.take(key(5), ACME)
    rates = Rates(clock, lambda: 10)
    assert rates.take(key(1), ACME) is not None  # a share below one request is one


def test_the_buckets_are_bounded() -> None:
    rates = Rates(Clock())
    for number in range(MAX_BUCKETS + 10):
        rates.take(key(5, f"bhc_{number}"), ACME)
    assert len(rates._buckets) == MAX_BUCKETS


@pytest.mark.parametrize(
    ("method", "path", "counts"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/jobs", True),
        ("POST", "/v1/batches", True),
        ("GET", "/v1/models", False),
        ("POST", "/v1/jobs/x/cancel", False),
        ("POST", "/v1/batches/x/cancel", False),
        ("POST", "/v1/workers/w/pause", False),
        ("DELETE", "/v1/files/x", False),
    ],
)
def test_what_may_make_work_counts(method: str, path: str, counts: bool) -> None:
    assert counted(method, path) is counts


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (6.2, "7s"), (60, "1m0s"), (361, "6m1s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
