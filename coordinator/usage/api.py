"""GET /v1/usage: what jobs used, summed up; JSON, or CSV for a spreadsheet.

A client key sees its own tenant, an admin key all of them. The sums have what the jobs have that are deleted long ago.
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.errors import Json
from coordinator.services import caller, services
from coordinator.usage.report import as_csv, file_name, groups, report, span
from protocol.faults import refuse

PARAMETERS = ("from", "to", "group_by", "format", "tenant")
FORMATS = ("json", "csv")


async def usage(request: Request) -> Response:
    """Sums over days (UTC), both ends included; without `from`, the 30 days up to `to`; without `to`, up to today."""
    asked = request.query_params
    if unknown := [name for name in asked if name not in PARAMETERS]:
        raise refuse("invalid_parameter", f"{unknown[0]}: Expected one of {', '.join(PARAMETERS)}.", unknown[0])
    wanted = asked.get("format") or ("csv" if _prefers_csv(request.headers.get("accept", "")) else "json")
    if wanted not in FORMATS:
        raise refuse("invalid_parameter", f"format: Expected one of {', '.join(FORMATS)}.", "format")
    dispatcher = services(request).dispatcher
    group_by = groups(asked.get("group_by", ""))
    days = span(asked.get("from", ""), asked.get("to", ""), await dispatcher.now_ms())
    found = report(await dispatcher.usage(*days, group_by, _tenant(request)), days, group_by)
    if wanted == "json":
        return Json(found)
    name = file_name(found, time.time())
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(as_csv(found), media_type="text/csv; charset=utf-8", headers=headers)


ROUTES = [Route("/v1/usage", usage, methods=["GET"])]


def _tenant(request: Request) -> str | None:
    """Whose sums; None is everybody's. Raises FaultError(forbidden)."""
    key, wanted = caller(request), request.query_params.get("tenant")
    if key.scope == "admin":
        return wanted
    if wanted not in (None, key.tenant):
        raise refuse("forbidden", f"This key sees the usage of the tenant {key.tenant!r}; ask with an admin key.")
    return key.tenant


def _prefers_csv(accept: str) -> bool:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "text/csv" in kinds and "application/json" not in kinds
