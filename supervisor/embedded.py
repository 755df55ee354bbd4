"""The embedded coordinator: one more supervised child, started first and stopped last.

The supervisor binds the listener and keeps it, so the port stays while the child is replaced, and connections
made meanwhile wait in its backlog. The worker token is made at each start of the supervisor and travels through
a pipe; it is in no file, no argv and no environment. The end of the child's stdin tells it that the supervisor
is gone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from supervisor.errors import ConfigError, CoordinatorFailed, ExitCode, IdentityHeld, NoPermission, SupervisorError
from supervisor.host.child import Child, ChildSpec, open_child
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.settings import CoordinatorTable

log = logging.getLogger(__name__)
child_log = logging.getLogger("coordinator")
_LOG_LINE = re.compile(r"\S+ \S+ (?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<name>\S+): (?P<text>.*)")

OF_WORKERS = "coordinator.worker"  # the coordinator's logger of what workers send it of their logs
READY_S = 60.0  # a cold disk and a busy machine: imports alone may take seconds
STOP_S = 4.0  # after the end of its stdin; it closes connections for up to 2 s
TERM_GRACE_S = 3.0
BACKLOG = 2048
# How long the port of a coordinator whose supervisor was killed may still be taken: it ends within about 2 s, but not
# on a machine that stands still for seconds.
PREDECESSOR_S = 10.0
PREDECESSOR_POLL_S = 0.1
MAX_READY_LINE_BYTES = 65536


class Ready(msgspec.Struct, frozen=True):
    """The one line that the child writes when it answers requests."""

    url: str
    client_key_file: str


class Embedded:
    """A running embedded coordinator. Made by `open_embedded`."""

    def __init__(
        self, table: CoordinatorTable, state: Path, on_ready: Callable[[Ready], None], listener: socket.socket
    ) -> None:
        self._table = table
        self._state = state
        self._on_ready = on_ready
        self._token = secrets.token_urlsafe(32)
        self._listener = listener
        self._child: Child | None = None
        self._draining = False
        self._stopping = False
        self._up = trio.Event()
        self._failed: SupervisorError | None = None

    @property
    def address(self) -> Address:
        """Where our own link finds it."""
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        scheme = "wss" if self._table.tls_cert else "ws"
        where = f"[{host}]" if ":" in host else host
        return Address(
            url=f"{scheme}://{where}:{port}",
            token=self._token,
            connect_s=self._table.connect_s,
            tls=_trust(self._table.tls_cert) if self._table.tls_cert else None,
        )

    async def drain(self) -> None:
        """From now on it refuses new jobs; those that it has go on."""
        self._draining = True
        if self._child is not None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._child.write(b"drain\n")

    # ---- the task

    async def _keep(self) -> None:
        """Start the child, and start it again whenever it ends, until the block is left."""
        backoff = Backoff(0.2, 30.0)
        while not self._stopping:
            began = trio.current_time()
            end = await self._one_life()
            if not self._up.is_set():
                self._failed = end
                self._up.set()
                return
            if not self._stopping:
                pause_s = backoff.pause_s(trio.current_time() - began)
                log.error("%s; starting it again in %.1f s", end, pause_s)
                await trio.sleep(pause_s)

    async def _one_life(self) -> SupervisorError:
        """One child from start to end; returns how it ended."""
        with contextlib.ExitStack() as ours:
            token_fd = self._token_pipe()
            ours.callback(os.close, token_fd)
            async with open_child(self._spec(token_fd), term_grace_s=TERM_GRACE_S) as child:
                ours.close()  # the child has its own; a second reader of the pipe would be a leak
                self._child = child
                try:
                    await self._greet(child)
                    while await child.read():
                        pass  # nothing more is said there; reading on keeps the pipe from filling
                    await child.wait()
                finally:
                    self._child = None
                    await _let_go(child)
        return _end_of(child)

    def _spec(self, token_fd: int) -> ChildSpec:
        argv = [sys.executable, "-P", "-m", "coordinator", "serve"]
        argv += ["--fd", str(self._listener.fileno()), "--worker-token-fd", str(token_fd), "--state", str(self._state)]
        if self._table.tls_cert:
            argv += ["--tls-cert", self._table.tls_cert, "--tls-key", self._table.tls_key]
        return ChildSpec(
            name="coordinator",
            argv=tuple(argv),
            pass_fds=(self._listener.fileno(), token_fd),
            on_stderr_line=_pass_on,
        )

    def _token_pipe(self) -> int:
        """The reading end of a pipe that holds the token and nothing else."""
        reading, writing = os.pipe()
        os.write(writing, self._token.encode())  # 43 bytes: never blocks
        os.close(writing)
        return reading

    async def _greet(self, child: Child) -> None:
        """Wait for the ready line; a child that is silent for too long is ended."""
        line = b""
        with trio.move_on_after(READY_S) as patience:
            while b"\n" not in line and len(line) < MAX_READY_LINE_BYTES:
                data = await child.read()
                if not data:
                    return
                line += data
        if patience.cancelled_caught:
            log.error("the coordinator was not ready after %.0f s", READY_S)
            await child.end(TERM_GRACE_S)
            return
        try:
            ready = msgspec.json.decode(line.partition(b"\n")[0], type=Ready)
        except msgspec.MsgspecError as error:
            log.error("the coordinator's ready line cannot be read: %s", error)
            await child.end(TERM_GRACE_S)
            return
        if self._draining:
            await self.drain()
        self._on_ready(ready)
        self._up.set()


@contextlib.asynccontextmanager
async def open_embedded(
    table: CoordinatorTable, state: Path, on_ready: Callable[[Ready], None]
) -> AsyncIterator[Embedded]:
    """Start the embedded coordinator and keep it up; leaving the block stops it.

    Args:
        on_ready: called at each start, with where clients find it.

    Raises:
        SupervisorError: the listener cannot be bound, or the first start did not succeed.

    Cancellation: the child is ended within `STOP_S` + `TERM_GRACE_S` + the host's patience with SIGKILL.
    """
    embedded = Embedded(table, state, on_ready, await _bind_patiently(table.listen))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(embedded._keep)
            await embedded._up.wait()
            if embedded._failed is None:
                try:
                    yield embedded
                finally:
                    embedded._stopping = True
                    nursery.cancel_scope.cancel()
    finally:
        embedded._listener.close()
    if embedded._failed is not None:
        raise embedded._failed


async def _let_go(child: Child) -> None:
    """Let it end by itself: it closes its connections, which a signal would cut."""
    with trio.CancelScope(shield=True), trio.move_on_after(STOP_S):
        child.close_stdin()
        await child.wait()


def _end_of(child: Child) -> SupervisorError:
    exit_ = child.exit
    assert exit_ is not None
    last = next((line for line in reversed(child.stderr_tail()) if line.strip()), "")
    sentence = f"The coordinator {exit_.describe()}{f': {last}' if last else ''}"
    if "No module named" in last:
        sentence += "; install it with: pip install 'bulkhead-worker[coordinator]'"
    if exit_.code == ExitCode.BAD_CONFIG:
        return ConfigError([sentence])
    return IdentityHeld(sentence) if exit_.code == ExitCode.IDENTITY_HELD else CoordinatorFailed(sentence)


def _pass_on(line: str) -> None:
    """Put a line of the child's log into ours, with its own level; tracebacks and the like come as they are.

    What it was told by workers is left out: it is our own log, and would go to the coordinator and back for ever.
    """
    if found := _LOG_LINE.match(line):
        if found["name"] == OF_WORKERS:
            return
        logging.getLogger(found["name"]).log(logging.getLevelNamesMapping()[found["level"]], "%s", found["text"])
    else:
        child_log.info("%s", line)


class _Taken(CoordinatorFailed):
    """Another program has the port; perhaps not for long."""


async def _bind_patiently(listen: str) -> socket.socket:
    """`_bind`, with some patience for the coordinator of a supervisor that was killed a moment ago."""
    until = trio.current_time() + PREDECESSOR_S
    told = False
    while True:
        try:
            return _bind(listen)
        except _Taken:
            if trio.current_time() >= until:
                raise
        if not told:
            log.info("%s is taken, perhaps by a coordinator that is just leaving: waiting for a moment", listen)
            told = True
        await trio.sleep(PREDECESSOR_POLL_S)


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.socket(found[0][0], socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError([f"[coordinator] listen: {listen} cannot be resolved: {error.strerror}"]) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[0][4])
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EACCES:
            raise NoPermission(f"[coordinator] listen: this user may not listen on {listen}.") from None
        sentence = f"[coordinator] listen: {listen}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            raise _Taken(f"{sentence}; end the other program or choose another port.") from None
        raise CoordinatorFailed(f"{sentence}.") from None
    return listener


def _trust(certificate: str) -> ssl.SSLContext:
    """Trust exactly what we serve with. Its name is that of the public address, so over loopback it is not checked."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
