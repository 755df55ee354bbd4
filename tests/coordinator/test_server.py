"""Listening, exposure, TLS files: what is refused says how to mend it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from coordinator.server import Refusal, adopt, base_url, check_exposure, check_tls, listen, ready_line


@pytest.mark.parametrize("address", ["8080", ":8080", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:²"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(Refusal, match="is not HOST:PORT"):
        listen(address)


def test_a_free_port_and_a_taken_one() -> None:
    with listen("127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        assert base_url(listener, secure=False) == f"http://127.0.0.1:{port}"
        assert base_url(listener, secure=True) == f"https://127.0.0.1:{port}"
        with pytest.raises(Refusal, match="cannot be taken"):
            listen(f"127.0.0.1:{port}")


def test_beyond_loopback_needs_tls_or_a_proxy() -> None:
    with listen("0.0.0.0:0") as listener:
        with pytest.raises(Refusal, match=r"--tls-cert and --tls-key, or --behind-proxy.* or listen on 127\.0\.0\.1"):
            check_exposure(listener, tls=False, behind_proxy=False)
        check_exposure(listener, tls=True, behind_proxy=False)
        check_exposure(listener, tls=False, behind_proxy=True)
        assert base_url(listener, secure=False).startswith("http://127.0.0.1:")
    with listen("127.0.0.1:0") as listener:
        check_exposure(listener, tls=False, behind_proxy=False)


def test_ipv6_loopback() -> None:
    try:
        listener = listen("[::1]:0")
    except Refusal:
        pytest.skip("this machine has no IPv6 loopback")
    with listener:
        check_exposure(listener, tls=False, behind_proxy=False)
        assert base_url(listener, secure=False).startswith("http://[::1]:")


def test_an_inherited_socket() -> None:
    parent = socket.create_server(("127.0.0.1", 0))
    port = parent.getsockname()[1]
    with adopt(parent.detach()) as listener:
        assert listener.getsockname()[1] == port
    with pytest.raises(Refusal, match="--fd 999999 is not"):
        adopt(999999)


def test_tls_files(tmp_path: Path) -> None:
    check_tls(None, None)
    with pytest.raises(Refusal, match="belong together"):
        check_tls(tmp_path / "cert.pem", None)
    with pytest.raises(Refusal, match="cannot be used"):
        check_tls(tmp_path / "cert.pem", tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(Refusal, match="cannot be used"):
        check_tls(tmp_path / "cert.pem", tmp_path / "cert.pem")


def test_the_ready_line(tmp_path: Path) -> None:
    line = ready_line("http://127.0.0.1:1", tmp_path / "client.key")
    assert "\n" not in line
    assert json.loads(line)["client_key_file"] == str(tmp_path / "client.key")
