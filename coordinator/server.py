"""uvicorn around the application: one process, one listener, an orderly end.

The end comes by SIGTERM or SIGINT, by the end of standard input (embedded: the supervisor is gone), or by the
dispatcher's failure. First new jobs are refused and running requests get `drain_s` to finish, then connections
are closed. A second signal ends the process at once: the store is safe at any instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from coordinator.app import Coordinator
from coordinator.gateway import UVICORN_OPTIONS
from coordinator.http_bounds import BoundedHttp
from coordinator.websockets_end import EndingWebSockets

log = logging.getLogger(__name__)

OK = 0
FAILED = 70
# After the drain, waiting requests get their 503 within LAST_ANSWERS_S, then connections are closed within CLOSE_S.
# Together below 3 s, the supervisor's grace period before SIGKILL.
LAST_ANSWERS_S = 0.5
CLOSE_S = 1
BACKLOG = 2048
DEAD_PEER_S = 60.0  # a peer that takes not one byte for so long is cut off
FORCED = 1


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """How to serve.

    Attributes:
        tls_cert, tls_key: PEM files; None serves plain HTTP.
        proxies: addresses whose X-Forwarded-* headers are believed; () believes nobody.
        drain_s: what running requests get at the end.
        watch_stdin: embedded: `drain` lines and the end of standard input are commands.
        ready: called with the base URL when requests are answered.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    proxies: tuple[str, ...] = ()
    drain_s: float = 30.0
    watch_stdin: bool = False
    ready: Callable[[str], None] = lambda _url: None


class Server(uvicorn.Server):
    """uvicorn's server without its own signal handling, and with a word when it serves."""

    on_started: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        for listener in sockets or ():
            _bound_peers(listener)
        await super().startup(sockets)
        if self.started:
            self.on_started()


def run(coordinator: Coordinator, listener: socket.socket, serving: Serving) -> int:
    """Serve until asked to stop; returns the exit code."""
    config = uvicorn_config(coordinator.app, serving)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(coordinator, config, listener, serving))


def uvicorn_config(app: Any, serving: Serving) -> uvicorn.Config:
    """uvicorn's settings; each is a decision of facts measured on this stack, see the comments."""
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        ws=EndingWebSockets,
        **UVICORN_OPTIONS,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(serving.proxies),
        forwarded_allow_ips=list(serving.proxies),
        backlog=BACKLOG,
        timeout_keep_alive=75,  # longer than the idle time of common proxies, so that they close first
        timeout_graceful_shutdown=CLOSE_S,
        ssl_certfile=serving.tls_cert,
        ssl_keyfile=serving.tls_key,
    )


async def _serve(coordinator: Coordinator, config: uvicorn.Config, listener: socket.socket, serving: Serving) -> int:
    server = Server(config)
    ending = _Ending(coordinator, server, serving.drain_s)
    url = base_url(listener, secure=serving.tls_cert is not None)
    server.on_started = lambda: serving.ready(url)
    coordinator.on_death = ending.died
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.signalled, number)
    stdin = loop.create_task(_obey_stdin(coordinator, ending)) if serving.watch_stdin else None
    try:
        await server.serve(sockets=[listener])
    finally:
        if stdin is not None:
            stdin.cancel()
    return ending.code if server.started else FAILED


class _Ending:
    """Why and how the server ends."""

    def __init__(self, coordinator: Coordinator, server: Server, drain_s: float) -> None:
        self.code = OK
        self._coordinator = coordinator
        self._server = server
        self._drain_s = drain_s
        self._task: asyncio.Task[None] | None = None

    def signalled(self, number: int) -> None:
        """First signal: orderly; second: now."""
        if self._task is not None:
            log.warning("Second signal: ending at once.")
            os._exit(FORCED)
        log.info("%s: stopping.", signal.Signals(number).name)
        self.begin(self._drain_s)

    def died(self) -> None:
        """The dispatcher failed: nothing can be finished any more."""
        self.code = FAILED
        self.begin(0.0)

    def begin(self, drain_s: float) -> None:
        """Start the end; later calls change nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._end(drain_s))

    async def _end(self, drain_s: float) -> None:
        parts = self._coordinator.parts
        if parts.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._coordinator.hand_over()
                    await parts.http.wait_idle()
        self._coordinator.stop_dispatching()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(parts.http.wait_idle(), LAST_ANSWERS_S)
        self._server.should_exit = True


async def _obey_stdin(coordinator: Coordinator, ending: _Ending) -> None:
    """`drain` refuses new jobs; the end of input means that the supervisor stopped, so nobody can finish jobs."""
    reader = asyncio.StreamReader()
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
    except (OSError, ValueError) as error:
        log.error("Standard input is no pipe (%s), so the supervisor's end would go unseen: stopping.", error)
        ending.died()
        return
    try:
        while line := await reader.readline():
            if line.strip() == b"drain":
                log.info("Draining: new jobs are refused.")
                coordinator.parts.dispatcher.stop_accepting()
            elif line.strip():
                log.warning("Unknown command on standard input: %r", line[:100])
        log.info("Standard input ended: stopping.")
        ending.begin(0.0)
    finally:
        transport.close()


def ready_line(url: str, client_key_file: Path) -> str:
    """The one line on standard output by which the supervisor learns that requests are answered."""
    return json.dumps({"ready": True, "pid": os.getpid(), "url": url, "client_key_file": str(client_key_file)})


# ---- listener -----------------------------------------------------------------------------------------------


def _bound_peers(listener: socket.socket) -> None:
    """Let the kernel cut connections whose peer reads nothing, or is gone without a word.

    Otherwise a client that stops reading its stream keeps its job, and its connection, for as long as it likes.
    Connections inherit this from their listener. Linux only; elsewhere TCP's own patience applies.
    """
    if listener.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_PEER_S * 1000))


class Refusal(Exception):
    """The server cannot be started like this; the message names the cure."""


def listen(address: str) -> socket.socket:
    """Bind HOST:PORT; `[::1]:8080` for IPv6, port 0 for a free one. Raises Refusal."""
    host, separator, port = address.rpartition(":")
    host = host.strip("[]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Refusal(f"listen: {address!r} is not HOST:PORT, such as 127.0.0.1:8080.")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Refusal(f"listen: {address!r} cannot be resolved: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Refusal(f"listen: {address} cannot be taken: {error.strerror}; free it or choose another.") from None
    return listener


def adopt(descriptor: int) -> socket.socket:
    """Take over a listening socket from the parent. Raises Refusal."""
    try:
        listener = socket.socket(fileno=descriptor)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.listen(BACKLOG)
    except OSError as error:
        raise Refusal(f"--fd {descriptor} is not a listening socket: {error.strerror}.") from None
    return listener


def check_exposure(listener: socket.socket, *, tls: bool, behind_proxy: bool) -> None:
    """Keys and prompts must not cross a network in the clear. Raises Refusal with the cure."""
    if tls or behind_proxy or listener.family == socket.AF_UNIX:
        return
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise Refusal(
            f"listen: {host} can be reached from other machines, and keys would cross the network in the clear. "
            "Give --tls-cert and --tls-key, or --behind-proxy when a proxy on a trusted network adds TLS, "
            "or listen on 127.0.0.1."
        )


def check_tls(cert: Path | None, key: Path | None) -> None:
    """Both files or none, and they must fit together. Raises Refusal."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise Refusal("--tls-cert and --tls-key belong together; give both.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise Refusal(f"The TLS files {cert} and {key} cannot be used: {error}.") from None


def base_url(listener: socket.socket, *, secure: bool) -> str:
    """A URL that reaches the listener from this machine."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if secure else 'http'}://{host}:{port}"
