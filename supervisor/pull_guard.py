"""HTTP for addresses that somebody else has named: nothing of this machine or its network is reached by them.

Whoever offers a job with the address of a model must not be able to have this worker ask the router of its house, a
cloud's metadata service or a program on loopback. So a name is resolved here, every address of it has to be a public
one, and the connection goes to the very address that was looked at: a name that resolves to another one a moment
later is no way around. Redirects come by here as well. What the operator has named is let through as it is.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Any

import httpx

from supervisor.pull_fetch import READ_TIMEOUT_S, FetchFailed, without_text

MOST_ADDRESSES = 4
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
Resolve = Callable[..., Any]


def guarded_client(hosts: Collection[str], resolve: Resolve = socket.getaddrinfo) -> httpx.Client:
    """An HTTP client that refuses addresses that are not public, and plain http.

    Args:
        hosts: names and addresses that the operator lets through, with plain http as well.
        resolve: as `socket.getaddrinfo`.
    """
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=15.0)
    hooks = {"response": [without_text]}
    return httpx.Client(follow_redirects=True, timeout=timeout, transport=_Guarded(hosts, resolve), event_hooks=hooks)


class _Guarded(httpx.BaseTransport):
    def __init__(self, hosts: Collection[str], resolve: Resolve) -> None:
        self._hosts, self._resolve = frozenset(host.lower() for host in hosts), resolve
        # No connection is used twice: one to a shared address was judged for another name.
        self._inner = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.host.lower() in self._hosts:
            return self._inner.handle_request(request)
        if url.scheme != "https":
            raise FetchFailed(f"{url.scheme}://{url.host} is not encrypted; use an https address.")
        *others, last = self._addresses(url.host, url.port or 443)
        for address in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return self._sent(request, address)
        return self._sent(request, last)

    def _sent(self, request: httpx.Request, address: str) -> httpx.Response:
        sent = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,  # Host is the name still, and so is what the certificate must be for
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": request.url.host},
        )
        return self._inner.handle_request(sent)

    def close(self) -> None:
        self._inner.close()

    def _addresses(self, host: str, port: int) -> list[str]:
        """Some public addresses, in the order to try them. Raises FetchFailed: the host has another kind, too."""
        try:
            found = self._resolve(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name can be like that
            raise httpx.ConnectError(f"{host} is not known: {error}") from None
        addresses = [str(one[4][0]) for one in found]
        for address in addresses:
            if not is_public(address):
                raise FetchFailed(
                    f"{host} is at {address}, which is no public address: models are not fetched from this machine or"
                    " its network, unless coordinator.studio.hosts names the host."
                )
        if not addresses:
            raise httpx.ConnectError(f"{host} has no address")
        return list(dict.fromkeys(addresses))[:MOST_ADDRESSES]


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet at large, whatever it is wrapped in."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if inner is None and address not in _UNICAST:
            return False  # what is not given out is nobody's, or means something else to somebody
    return address.is_global and not address.is_multicast
