"""Addresses that a stranger has named: only public ones are reached, and redirects do not lead around that."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from supervisor.pull_fetch import FetchFailed
from supervisor.pull_guard import _Guarded, guarded_client, is_public
from tests.supervisor.stand_in_hub import Site, serving


def resolving(*addresses: str) -> Any:
    def resolve(_host: str, port: int, **_more: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return resolve


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("172.16.5.5", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("::127.0.0.1", False),
        ("::a9fe:a9fe", False),
        ("fec0::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2001:db8::1", False),
        ("5f00::1", False),
        ("nonsense", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        (("127.0.0.1",), "models.example is at 127.0.0.1, which is no public address"),
        (("93.184.216.34", "10.0.0.1"), "is at 10.0.0.1"),
    ],
)
def test_a_name_with_an_address_that_is_not_public_is_refused_before_anything_is_sent(addresses, words):
    with guarded_client((), resolving(*addresses)) as http, pytest.raises(FetchFailed, match=words):
        http.get("https://models.example/m.gguf")


def test_addresses_themselves_and_plain_http_are_refused():
    with guarded_client(()) as http:
        for url in ("https://127.0.0.1:1/x", "https://[::1]:1/x", "https://169.254.169.254/latest"):
            with pytest.raises(FetchFailed, match="no public address"):
                http.get(url)
        with pytest.raises(FetchFailed, match="not encrypted"):
            http.get("http://models.example/m.gguf")


def test_a_name_that_is_not_known_may_be_tried_again():
    def unknown(*_args: Any, **_more: Any) -> Any:
        raise socket.gaierror("no such name")

    with guarded_client((), unknown) as http, pytest.raises(httpx.ConnectError, match="is not known"):
        http.get("https://models.example/m.gguf")
    with guarded_client((), resolving()) as http, pytest.raises(httpx.ConnectError, match="no address"):
        http.get("https://models.example/m.gguf")


def test_what_the_operator_names_is_let_through_and_a_redirect_from_there_is_looked_at():
    with serving(Site()) as site:
        site.files["/m"] = b"model"
        site.redirects["/away"] = "https://127.0.0.1:9/secret"
        site.redirects["/near"] = "/m"
        with guarded_client(["127.0.0.1"]) as http:
            assert http.get(f"{site.url}/m").content == b"model"
            assert http.get(f"{site.url}/near").content == b"model"
        port = site.url.rpartition(":")[2]
        with guarded_client(["LOCALHOST"]) as http:
            assert http.get(f"http://localhost:{port}/m").content == b"model"
            with pytest.raises(FetchFailed, match="no public address"):
                http.get(f"http://localhost:{port}/away")


def test_the_connection_goes_to_the_address_that_was_looked_at(monkeypatch):
    sent: list[httpx.Request] = []

    class Inner(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            sent.append(request)
            return httpx.Response(200, content=b"x")

    asked: list[str] = []

    def once(host: str, port: int, **_more: Any) -> Any:
        asked.append(host)
        return resolving("93.184.216.34")(host, port)

    with guarded_client((), once) as http:
        monkeypatch.setattr(http._transport, "_inner", Inner())
        assert http.get("https://models.example/m.gguf").content == b"x"
    (request,) = sent
    assert (str(request.url), request.headers["Host"]) == ("https://93.184.216.34/m.gguf", "models.example")
    assert request.extensions["sni_hostname"] == "models.example"
    assert asked == ["models.example"]


def test_another_address_is_tried_where_one_does_not_answer(monkeypatch):
    tried: list[str] = []

    class Inner(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            tried.append(request.url.host)
            if ":" in request.url.host:
                raise httpx.ConnectError("no route to host")
            return httpx.Response(200, content=b"x")

    transport = _Guarded((), resolving("2606:2800:220:1::1", "93.184.216.34"))
    monkeypatch.setattr(transport, "_inner", Inner())
    with httpx.Client(transport=transport) as http:
        assert http.get("https://models.example/m.gguf").content == b"x"
    assert tried == ["2606:2800:220:1::1", "93.184.216.34"]


def test_a_name_that_nobody_can_have_is_not_known():
    with guarded_client(()) as http, pytest.raises(httpx.ConnectError, match="is not known"):
        http.get(f"https://{'a' * 64}.example/m.gguf")
