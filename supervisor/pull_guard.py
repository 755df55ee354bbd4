"""HTTP for addresses that somebody else has named: nothing of this machine or its network is reached by them.

Whoever offers a job with the address of a model must not be able to have this worker ask the router of its house, a
cloud's metadata service or a program on loopback. So a name is resolved here, every address of it has to be a public
one, and the connection goes to the very address that was looked at: a name that resolves to another one a moment
later is no way around. Redirects come by here as well. What the operator has named is let through as it is.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Any

import httpx

from supervisor.pull_fetch import READ_TIMEOUT_S, FetchFailed

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Resolve = Callable[..., Any]


def guarded_client(hosts: Collection[str], resolve: Resolve = socket.getaddrinfo) -> httpx.Client:
    """An HTTP client that refuses addresses that are not public, and plain http.

    Args:
        hosts: names and addresses that the operator lets through, with plain http as well.
        resolve: as `socket.getaddrinfo`.
    """
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=15.0)
    return httpx.Client(follow_redirects=True, timeout=timeout, transport=_Guarded(hosts, resolve))


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
        address = self._address(url.host, url.port or 443)
        sent = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,  # Host is the name still, and so is what the certificate must be for
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": url.host},
        )
        return self._inner.handle_request(sent)

    def close(self) -> None:
        self._inner.close()

    def _address(self, host: str, port: int) -> str:
        """A public address of a host. Raises FetchFailed: it has another kind of address, too."""
        try:
            found = self._resolve(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
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
        return addresses[0]


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
    return address.is_global and not address.is_multicast
