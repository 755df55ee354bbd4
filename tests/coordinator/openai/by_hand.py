"""Requests whose connection a test holds in its hands, and closes when it wants to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import httpx

WAIT_S = 60.0


@contextlib.contextmanager
def sent_by_hand(request: httpx.Request) -> Iterator[None]:
    """A request over a connection that is closed at the end, whatever came of it."""
    body = request.read()
    head = f"POST {request.url.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port or 80), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        yield
