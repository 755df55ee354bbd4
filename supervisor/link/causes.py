"""What ended a connection, out of the groups of errors that it came in."""

from __future__ import annotations

from typing import TypeVar

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


def closed_words(reason: CloseReason) -> str:
    """What a close frame said."""
    return f"the connection was closed with {reason.code}{f': {reason.reason}' if reason.reason else ''}"


def rejected_words(whom: str, error: ConnectionRejected) -> str:
    """What a refused upgrade said."""
    words = (error.body or b"").decode(errors="replace").strip()[:200]
    return f"the {whom} answered the upgrade with HTTP {error.status_code}{f': {words}' if words else ''}"
