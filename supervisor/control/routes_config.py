"""Routes to the configuration: looking at it, and editing worker.toml without losing what others wrote meanwhile.

Whoever edits names the version that it has seen, in `If-Match`, as `GET` gave it in `ETag`: else it would undo a
change that it has never seen (RFC 9110, 13.1.1; RFC 6585 for 428).
"""

from __future__ import annotations

import re
from typing import Any

from supervisor.config_edit import StaleEdit
from supervisor.control.exchange import Handler, Refused, Request, Response, body, reply
from supervisor.control.surface import Configuration, Surface
from supervisor.errors import ConfigError, NoPermission

MOST_KEYS = 200
_TAGS = re.compile(r'\s*(W/)?"([^"]+)"\s*(?:,|$)')


def _there(surface: Surface) -> Configuration:
    if surface.config is None:
        raise Refused(503, "This supervisor was started without a file of its own; there is nothing to show or edit.")
    return surface.config


async def _shown(_request: Request, surface: Surface) -> Response:
    told, etag = await _there(surface).shown()
    return reply(told)._replace(headers=_tagged(etag))


def _schema(_request: Request, _surface: Surface) -> Response:
    from supervisor.config_schema import schema  # 2 ms, for the few who ask

    made = reply(schema())
    return made._replace(kind="application/schema+json")


async def _edited(request: Request, surface: Surface) -> Response:
    config = _there(surface)
    changes: dict[str, Any] = body(request, dict[str, Any])
    if not 0 < len(changes) <= MOST_KEYS:
        raise Refused(400, f"The body must name 1 to {MOST_KEYS} keys with their values, not {len(changes)}.")
    seen = request.headers.get("if-match", "").strip()
    if not seen:
        raise Refused(428, "Name the version that you have seen: If-Match with the ETag of GET /v1/config.")
    try:
        told, etag = await config.edit(changes, await _one_of(seen, config))
    except StaleEdit as error:
        raise Refused(412, f"{error}.") from None
    except ConfigError as error:
        count = len(error.problems)
        sentence = error.problems[0] if count == 1 else f"The result would have {count} mistakes; nothing was written."
        raise Refused(400, sentence, problems=error.problems) from None
    except NoPermission as error:
        raise Refused(403, str(error)) from None
    return reply(told)._replace(headers=_tagged(etag))


async def _one_of(seen: str, config: Configuration) -> str:
    """The version that the edit is for; "" for any.

    Raises:
        Refused: it is none of those that `If-Match` names.
    """
    if seen == "*":
        return ""
    # A weak tag never matches here: it says "about the same", and edits need "the same".
    tags = [found[2] for found in _TAGS.finditer(seen) if not found[1]]
    if len(tags) == 1:
        return tags[0]
    _told, etag = await config.shown()
    if etag not in tags:
        raise Refused(412, "The configuration is none of those that If-Match names; look at it again.")
    return etag


def _tagged(etag: str) -> dict[str, str]:
    return {"etag": f'"{etag}"'} if etag else {}


CONFIG: dict[str, dict[str, Handler]] = {
    "/v1/config": {"GET": _shown, "PATCH": _edited},
    "/v1/config/schema": {"GET": _schema},
}
