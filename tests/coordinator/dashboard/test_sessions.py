"""Sessions by themselves: what a browser sends, who may ask, and how often a wrong key may be tried."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from coordinator.dashboard.sessions import (
    FAILED_MOST,
    FAILED_S,
    MOST_ADDRESSES,
    FailedLogins,
    check_same_origin,
    cookie_name,
    cookie_of,
    set_cookie,
)
from protocol.faults import FaultError

HERE = {"host": "box:8080"}


@pytest.mark.parametrize(
    ("host", "secure", "name"),
    [
        ("box:8080", False, "bulkhead-8080"),
        ("box", False, "bulkhead-session"),
        ("box", True, "__Host-bulkhead-session"),
        ("[::1]:81", True, "__Host-bulkhead-81"),
        ("box:8²", False, "bulkhead-session"),
    ],
)
def test_each_port_has_a_cookie_of_its_own(host: str, secure: bool, name: str) -> None:
    headers = Headers({"host": host, "cookie": f"a=b; {name}=half; x{name}=other"})
    assert cookie_name(headers, secure) == name
    assert cookie_of(headers, secure) == "half"
    assert cookie_of(headers, not secure) == ""


def test_a_cookie_is_for_no_script_and_no_other_site_and_secure_where_it_can() -> None:
    plain, secure, ended = set_cookie("n", "v", False), set_cookie("n", "v", True), set_cookie("n", "", False)
    assert plain == "n=v; Path=/; HttpOnly; SameSite=Strict; Max-Age=43200"
    assert secure == f"{plain}; Secure"
    assert "Max-Age=0" in ended


@pytest.mark.parametrize(
    ("method", "sent", "good"),
    [
        ("POST", {"sec-fetch-site": "same-origin"}, True),
        ("GET", {"sec-fetch-site": "none"}, True),
        ("POST", {"sec-fetch-site": "none"}, False),
        ("POST", {"sec-fetch-site": "same-site", "origin": "http://box:8080"}, False),
        ("GET", {"sec-fetch-site": "cross-site"}, False),
        ("POST", {"origin": "http://box:8080"}, True),
        ("POST", {"origin": "https://BOX:8080"}, True),
        ("POST", {"origin": "http://box:8081"}, False),
        ("POST", {"origin": "null"}, False),
        ("POST", {"origin": "http://[box"}, False),
        ("POST", {}, False),
        ("GET", {}, True),
        ("GET", {"origin": "http://evil"}, False),
    ],
)
def test_only_our_own_page_may_ask(method: str, sent: dict[str, str], good: bool) -> None:
    headers = Headers({**HERE, **sent})
    if good:
        check_same_origin(headers, method)
        return
    with pytest.raises(FaultError) as refused:
        check_same_origin(headers, method)
    assert refused.value.fault.code == "forbidden"


def test_wrong_keys_are_bounded_by_address_and_forgiven_after_a_while() -> None:
    now = [0.0]
    failed = FailedLogins(lambda: now[0])
    for _ in range(FAILED_MOST):
        failed.check("a")
        failed.note("a")
        now[0] += 1
    with pytest.raises(FaultError) as refused:
        failed.check("a")
    assert refused.value.fault.detail["retry_after_s"] == FAILED_S - FAILED_MOST
    failed.check("b")
    now[0] = FAILED_S
    failed.check("a")


def test_addresses_are_forgotten_before_there_are_too_many() -> None:
    failed = FailedLogins()
    for n in range(MOST_ADDRESSES + 10):
        failed.note(str(n))
    assert len(failed._failed) == MOST_ADDRESSES
