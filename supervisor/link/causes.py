"""What ended a connection, out of the groups of errors that it came in."""

from __future__ import annotations

import ssl
from typing import TypeVar

import trio
from trio_websocket import CloseReason, ConnectionRejected

_Error = TypeVar("_Error", bound=BaseException)


def root(error: BaseException) -> BaseException:
    """The innermost reason of a failed connect: trio wraps one error for each address that it tried."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return root(error.__cause__) if error.__cause__ is not None else error


def first(group: BaseExceptionGroup[BaseException], type_: type[_Error]) -> _Error | None:
    """The first error of a type, however deep it lies; None when there is none."""
    for error in group.exceptions:
        found = first(error, type_) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, type_):
            return found
    return None


def beside(
    group: BaseExceptionGroup[BaseException], known: tuple[type[BaseException], ...]
) -> BaseExceptionGroup[BaseException]:
    """What a group holds besides errors of these types: it goes on without them.

    A cancellation that comes while a session ends lies in one group with the reason of that end. Nobody waits for the
    reason any more, and raised beside the cancellation it would outlive it.
    """
    rest = group.split(known)[1]
    return group if rest is None else rest


MOST_CAUSES = 16


def broken_words(where: str, group: BaseExceptionGroup[BaseException]) -> str:
    """What the network did to a connection, or instead of one."""
    broken = first(group, trio.BrokenResourceError)
    if broken is not None and not isinstance(root(broken), ssl.SSLCertVerificationError):
        return f"the connection broke: {root(broken)}"
    return unreachable(where, group)


def unreachable(where: str, error: BaseException) -> str:
    """Why there was no connection, with the cure where it is known."""
    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None:
            break
        cause = root(cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = f"{where} shows a certificate that is not trusted here ({cause.verify_message.rstrip('.')})"
            return f"{why}: name its authority in coordinator.tls_ca"
        cause = cause.__context__
    return f"{where} cannot be reached: {root(error)}"


def closed_words(reason: CloseReason) -> str:
    """What a close frame said."""
    return f"the connection was closed with {reason.code}{f': {reason.reason}' if reason.reason else ''}"


def rejected_words(whom: str, error: ConnectionRejected) -> str:
    """What a refused upgrade said."""
    words = (error.body or b"").decode(errors="replace").strip()[:200]
    return f"the {whom} answered the upgrade with HTTP {error.status_code}{f': {words}' if words else ''}"
