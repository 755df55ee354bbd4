"""What can be asked and ordered over the control socket: a table of routes, and functions from request to response.

Nothing here changes anything: orders go to whoever was handed over as `Requests`, which is what everybody else asks,
too; and what is shown comes from a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from supervisor.control.metrics import metrics
from supervisor.control.snapshot import Snapshot

API = 1
LONGEST_PAUSE_S = 366 * 86_400.0

_JSON = "application/json"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Requests(Protocol):
    """Who is asked to act. Every call returns at once; its effect shows in the next snapshot."""

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool) -> None:
        """Take no new jobs, for a while or until `resume`; also end loaded models when `free_vram`."""

    def resume(self) -> bool:
        """Lift the operator's hold; False when there was none."""

    def drain(self, reason: str, *, restart: bool) -> None:
        """Finish what runs, take nothing new, then end; with `restart` so that the service manager starts us again."""


class Surface(NamedTuple):
    """What the routes work on.

    Attributes:
        snapshot: everything at this moment, explained.
        requests: who acts.
        more_metrics: lines of further families (the GPUs').
    """

    snapshot: Callable[[], Snapshot]
    requests: Requests
    more_metrics: Callable[[], Iterable[str]] = tuple


class Request(NamedTuple):
    """One request; `target` as it came, `kind` is its content type in lower case without parameters."""

    method: str
    target: str
    body: bytes = b""
    kind: str = ""


class Response(NamedTuple):
    """One response."""

    status: int
    body: bytes
    kind: str = _JSON


class Refused(Exception):
    """The request is answered with `status` and this sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    for_s: Annotated[float, Meta(gt=0, le=LONGEST_PAUSE_S)] | None = None
    free_vram: bool = False
    reason: Annotated[str, Meta(max_length=200)] = ""


class _Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=200)] = ""
    restart: bool = False


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def answer(request: Request, surface: Surface) -> Response:
    """Answer a request. Never raises for anything that a client sends."""
    try:
        return _route(request)(request, surface)
    except Refused as refusal:
        return error(refusal.status, str(refusal))


def error(status: int, sentence: str) -> Response:
    """An answer that says what is wrong."""
    return _json({"error": {"message": sentence}}, status)


def _route(request: Request) -> Callable[[Request, Surface], Response]:
    path = request.target.partition("?")[0]
    methods = ROUTES.get(path)
    if methods is None:
        raise Refused(404, f"There is no {path[:100]!r}; there are {', '.join(ROUTES)}.")
    function = methods.get(request.method)
    if function is None:
        raise Refused(405, f"{path} takes {', '.join(methods)}.")
    return function


# ---- looking


def _health(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return _json({"ok": True, "state": seen.state, "version": seen.version, "pid": seen.pid, "api": API})


def _status(_request: Request, surface: Surface) -> Response:
    return _json(surface.snapshot())


def _engines(_request: Request, surface: Surface) -> Response:
    return _json({"engines": surface.snapshot().models})


def _gpus(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return _json({"gpus": seen.gpus, "reason": seen.gpu_reason})


def _incidents(_request: Request, surface: Surface) -> Response:
    return _json({"incidents": surface.snapshot().incidents})


def _metrics(_request: Request, surface: Surface) -> Response:
    return Response(200, metrics(surface.snapshot(), surface.more_metrics()).encode(), _TEXT)


# ---- ordering


def _pause(request: Request, surface: Surface) -> Response:
    order = _body(request, _Pause)
    surface.requests.pause(order.reason, for_s=order.for_s, free_vram=order.free_vram)
    return _status(request, surface)


def _resume(request: Request, surface: Surface) -> Response:
    _body(request, _Nothing)
    lifted = surface.requests.resume()
    return _json({"lifted": lifted, "status": surface.snapshot()})


def _drain(request: Request, surface: Surface) -> Response:
    order = _body(request, _Drain)
    surface.requests.drain(order.reason or "the operator asked for it", restart=order.restart)
    return _status(request, surface)


def _body(request: Request, type_: type[Any]) -> Any:
    if request.body and request.kind != _JSON:
        raise Refused(415, f"The body must be {_JSON}, not {request.kind[:100] or 'of an unnamed type'}.")
    try:
        return msgspec.json.decode(request.body or b"{}", type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(400, f"The body is wrong: {error}.") from None


def _json(value: object, status: int = 200) -> Response:
    return Response(status, msgspec.json.encode(value) + b"\n")


ROUTES: dict[str, dict[str, Callable[[Request, Surface], Response]]] = {
    "/v1/health": {"GET": _health},
    "/v1/status": {"GET": _status},
    "/v1/engines": {"GET": _engines},
    "/v1/gpus": {"GET": _gpus},
    "/v1/incidents": {"GET": _incidents},
    "/v1/metrics": {"GET": _metrics},
    "/v1/pause": {"POST": _pause},
    "/v1/resume": {"POST": _resume},
    "/v1/drain": {"POST": _drain},
}
