"""From a request to its answer: one table of routes for the owner's socket and for the page.

Nothing here changes anything: orders go to whoever was handed over as `Requests`, which is what everybody else asks,
too; and what is shown comes from a snapshot. A route is a path with `{name}` for a part that varies, and a handler
per method, in routes_look.py or routes_act.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from urllib.parse import unquote

from supervisor.control.exchange import Answer, Handler, Refused, Request, error
from supervisor.control.login import LOGIN
from supervisor.control.routes_act import ACT
from supervisor.control.routes_look import LOOK
from supervisor.control.surface import Surface


async def answer(request: Request, surface: Surface) -> Answer:
    """Answer a request. Nothing that a client sends makes it raise.

    Cancellation: what the handler does is cancelled with it.
    """
    try:
        handler, params = _route(request)
        found = handler(request._replace(params=params), surface)
        return await found if inspect.isawaitable(found) else found
    except Refused as refusal:
        return error(refusal.status, str(refusal), **refusal.more)


def _route(request: Request) -> tuple[Handler, Mapping[str, str]]:
    path = request.path
    for pattern, methods in _PATTERNS:
        if (found := pattern.fullmatch(path)) is None:
            continue
        handler = methods.get(request.method)
        if handler is None:
            raise Refused(405, f"{path[:100]} takes {', '.join(methods)}.")
        return handler, {name: unquote(text) for name, text in found.groupdict().items()}
    raise Refused(404, f"There is no {path[:100]!r}; there are {', '.join(ROUTES)}.")


def _pattern(path: str) -> re.Pattern[str]:
    """`{name}` stands for one part of the path, never for a slash."""
    return re.compile(
        "".join(
            f"(?P<{part[1:-1]}>[^/]+)" if part[:1] == "{" else re.escape(part) for part in re.split(r"(\{\w+\})", path)
        )
    )


def _merged(*tables: Mapping[str, Mapping[str, Handler]]) -> dict[str, dict[str, Handler]]:
    """One table: a path may be looked at by a route of one and acted upon by a route of another."""
    merged: dict[str, dict[str, Handler]] = {}
    for table in tables:
        for path, methods in table.items():
            merged.setdefault(path, {}).update(methods)
    return merged


ROUTES = _merged(LOOK, ACT, LOGIN)
_PATTERNS = [(_pattern(path), methods) for path, methods in ROUTES.items()]
