"""The line that somebody types on a worker's machine to let it join this coordinator."""

from __future__ import annotations

import ipaddress
import shlex
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from coordinator.config import Config
from coordinator.server import Refusal

UNKNOWN = "https://THIS-COORDINATOR"


def join_address(settings: Config, url: str = "", hostname: Callable[[], str] = socket.getfqdn) -> tuple[str, str]:
    """Where workers reach the coordinator, and a sentence about that; "" when there is nothing to say. May ask DNS.

    Args:
        settings: of the coordinator: without `url` its address is made from them.
        url: by which workers reach the coordinator, as its admin knows it.
        hostname: this machine's, for a coordinator that listens on all addresses.

    Raises:
        Refusal: `url` is none.
    """
    return (_checked(url), "") if url else _guessed(settings, hostname)


def join_line(address: str, token: str) -> str:
    """The line, for a token that admits a worker."""
    return f"supervisor enrol {shlex.quote(address)} {shlex.quote(token)}"


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fit = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # of a port, of brackets
        parts, fit = urlsplit(""), False
    if not fit or parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query:
        raise Refusal(f"--url: expected https://HOST, the coordinator's address for workers, not {url[:200]!r}.")
    return url.rstrip("/")


def _guessed(settings: Config, hostname: Callable[[], str]) -> tuple[str, str]:
    host, _, port = settings.listen.rpartition(":")
    bare = host.strip("[]")
    if settings.behind_proxy or not bare or port == "0":
        return UNKNOWN, f"Put its address in place of {UNKNOWN}; with --url it is in the line."
    if not settings.tls_cert:
        return f"http://{host}:{port}", "This address is good on this machine only; --url names another."
    try:
        everywhere = ipaddress.ip_address(bare.partition("%")[0]).is_unspecified
    except ValueError:
        everywhere = False  # a name
    return f"https://{hostname() if everywhere else host}:{port}", "If workers reach it by another address, give --url."
