"""From a request to its answer: one table of routes for the owner's socket and for the page.

Nothing here changes anything: orders go to whoever was handed over as `Requests`, which is what everybody else asks,
too; and what is shown comes from a snapshot. A route is a path with `{name}` for a part that varies, and a handler
per method, in routes_look.py or routes_act.py. All speak JSON, and refusals are {"error": {"message": …}}.

GET               /v1/health                    is it there, and which API
GET               /v1/status                    everything at this moment, and why nothing is done
GET               /v1/events                    ?since=ID: what happens, as SSE: started, status, model, job, jobs,
                                                hold, link, gpu, incident, config, ended; "hello" without since, "gap"
                                                where some are lost
GET               /v1/jobs                      ?state= &model= &kind= &limit=: open ones, then the latest that ended
GET               /v1/jobs/{id}                 all attempts of one job
POST              /v1/jobs/{id}/cancel          reason
GET               /v1/logs                      ?since=ID &level= &q= &job= &limit=; with &follow=1 as SSE: line,
                                                "hello" without since, "dropped" where some are lost
GET, POST         /v1/log-level                 level, for_s
GET               /v1/models                    as configured, with their state
POST              /v1/models/{name}/load        before anybody asks for it
POST              /v1/models/pull               name or source; its progress (SSE)
POST              /v1/models/remove             name
GET               /v1/engines                   the instances
POST              /v1/engines/{model}/restart   reason, now
POST              /v1/engines/{model}/unload    reason
GET               /v1/gpus                      memory, load, faults, and why each is idle
POST              /v1/gpus/{uuid}/cordon        reason, for_s, unload
POST              /v1/gpus/{uuid}/uncordon
GET, POST         /v1/holds                     why work is not taken; put one
DELETE            /v1/holds/{source}            lift one
POST              /v1/pause                     reason, for_s, free_vram, kind, gpu
POST              /v1/resume                    kind, gpu
POST              /v1/drain                     reason, restart
POST              /v1/shutdown                  reason
POST              /v1/reload                    read the configuration again
POST              /v1/register                  another coordinator
GET, PATCH        /v1/config                    masked, with the place of each value, and its ETag; a patch is
                                                {dotted key: value or null} and names the ETag in If-Match
GET               /v1/config/schema             JSON Schema of worker.toml
GET               /v1/incidents                 the latest bad ends of instances
GET               /v1/metrics                   for Prometheus
GET               /v1/diagnostics               a redacted bundle (tar.gz)
GET               /v1/doctor                    everything that a person would check
POST              /v1/login-code                for the page
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
