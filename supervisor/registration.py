"""Where this worker gets its jobs: trying a coordinator, and writing it into worker.toml.

What it does today, in this order: the token is read; the way in is tried as the worker itself would go it, over TLS,
upgrade, token and greeting, and left at once without offering anything; the token is written to a file of its own
(mode 0600, in the state folder), and `[coordinator]` of worker.toml gets the address and the name of that file. A
coordinator that hands out tokens after an approval is not asked for one: whoever runs it makes the token
(`coordinator keys create --scope worker`). The next start works for the new coordinator.

Nothing is written when the way in is refused, and a worker.toml that would become wrong keeps its old content.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from protocol import link_wire as wire
from protocol.revision import LINK_WIRE
from supervisor.config_edit import edit
from supervisor.control.asked import Register
from supervisor.control.exchange import Refused
from supervisor.errors import ConfigError, SupervisorError
from supervisor.link.session import Address, Post, SessionEnd, Why, converse
from supervisor.secrets import TOKEN, secret
from supervisor.state import write_atomically

CONNECT_S = 15.0
TOKEN_FILE = "coordinator-token"


class _Visitor:
    """Greets as this worker, offers nothing, and leaves as soon as it is welcome. A `session.Side`."""

    running = 0

    def __init__(self, name: str, leave: Callable[[], None]) -> None:
        self._name, self._leave = name, leave
        self.welcome = False

    def hello(self) -> wire.Hello:
        nothing = wire.Capabilities(accepting=False, reason="the way in is being tried")
        return wire.Hello(worker=self._name, low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=nothing)

    def opened(self, _post: Post) -> None:
        self.welcome = True
        self._leave()

    def heard(self, _body: wire.Body, _job: str, _attempt: int) -> None:
        pass

    def broken_offer(self, _job: str, _attempt: int, _reason: str) -> None:
        pass

    def closed(self) -> None:
        pass

    def holds(self, _job: str, _attempt: int) -> bool:
        return False

    def leave(self, _job: str, _attempt: int) -> bool:
        return False

    def heartbeat(self, n: int) -> wire.Heartbeat:
        return wire.Heartbeat(n=n)


async def register(
    order: Register,
    *,
    config: Path,
    state: Path,
    name: str,
    connected: Callable[[], str] = lambda: "",
    environ: Mapping[str, str] = os.environ,
    connect_s: float = CONNECT_S,
) -> dict[str, Any]:
    """See the module.

    Args:
        config: worker.toml; made when it does not exist.
        name: this worker's id.
        connected: address of the coordinator that this worker is connected to now, "" for none: it is not tried, as a
            second session of the same worker would end the first.

    Returns:
        `url`, `token_file`, `checked`, `restart` and `message`; never the token.

    Raises:
        Refused: nothing was changed; the sentence says why.

    Cancellation: before the files are written nothing has changed.
    """
    token = await trio.to_thread.run_sync(_token, order, environ)
    checked = order.check and _same(connected()) != _same(order.url)
    if checked:
        await _try(order, token, name, connect_s)
    token_file = Path(order.token_file) if order.token_file else None
    if token_file is None and order.token:
        token_file = state / TOKEN_FILE
    stronger = await trio.to_thread.run_sync(_write, order, config, token_file)
    words = "It was not tried; " if not checked else "It lets this worker in; "
    end = f"{config} names it, and `supervisor drain --restart` takes it up."
    if stronger:
        end += f" But {', '.join(f'{key} is overridden by {place}' for key, place in stronger.items())}."
    return {
        "url": order.url,
        "token_file": str(token_file or ""),
        "checked": checked,
        "restart": True,
        "stronger": stronger,
        "message": words + end,
    }


def _same(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1/worker").lower()


def _token(order: Register, environ: Mapping[str, str]) -> str:
    if order.token and order.token_file:
        raise Refused(400, "The body is wrong: give token or token_file, not both.")
    if order.token:
        token = order.token.strip()
        if not token or not token.isprintable() or " " in token:
            raise Refused(400, "The body is wrong: token has characters that no token has.")
        return token
    if order.token_file and not Path(order.token_file).is_absolute():
        raise Refused(400, "The body is wrong: token_file must be an absolute path.")
    try:
        return secret(TOKEN, order.token_file, environ)
    except ConfigError as error:
        raise Refused(409, f"{'; '.join(error.problems)}.") from None


async def _try(order: Register, token: str, name: str, connect_s: float) -> None:
    """Raises Refused unless the coordinator welcomes this worker."""
    try:
        tls = ssl.create_default_context(cafile=order.tls_ca or None) if order.url.startswith("wss:") else None
    except (OSError, ValueError) as error:
        raise Refused(409, f"tls_ca: {order.tls_ca} cannot be read: {error}.") from None
    with trio.CancelScope() as scope:
        visitor = _Visitor(name, scope.cancel)
        end = await converse(Address(url=order.url, token=token, connect_s=connect_s, tls=tls), visitor)
    if not visitor.welcome:
        raise Refused(409, f"{_where(order.url)} does not let this worker in: {_why(end)}. Nothing was changed.")


def _why(end: SessionEnd) -> str:
    cures = {
        Why.REFUSED: "the token is not good there",
        Why.DUPLICATE: "another worker has this name there",
        Why.DELETED: "this worker was deleted there",
        Why.REVISION: "one of the two is too old",
    }
    return f"{cures[end.why]} ({end.sentence})" if end.why in cures else end.sentence


def _where(url: str) -> str:
    """Without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2] or url


def _write(order: Register, config: Path, token_file: Path | None) -> dict[str, str]:
    """Token first, then worker.toml; a token whose configuration is refused is taken back."""
    before = None
    ours = token_file is not None and bool(order.token)
    try:
        if ours and token_file is not None:
            with contextlib.suppress(FileNotFoundError):
                before = token_file.read_bytes()
            token_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(token_file, order.token.strip().encode() + b"\n")
        values: dict[str, Any] = {"coordinator.url": order.url}
        if token_file is not None:
            values["coordinator.token_file"] = str(token_file)
        if order.tls_ca:
            values["coordinator.tls_ca"] = order.tls_ca
        return edit(config, values).stronger
    except OSError as error:
        raise Refused(409, f"{error.filename or config} cannot be written: {error.strerror}.") from None
    except (ConfigError, SupervisorError) as error:
        if ours and token_file is not None:
            with contextlib.suppress(OSError):
                if before is None:
                    token_file.unlink()
                else:
                    write_atomically(token_file, before)
        raise Refused(409, f"{config} is left as it was: {error}") from None
