"""Request bodies: JSON read with a limit, fields checked against a table, parameters parsed with the
caller's own field names in every refusal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
from anyio.to_thread import run_sync
from starlette.datastructures import QueryParams
from starlette.requests import Request

from protocol.faults import Fault, FaultError, Owner, refuse
from protocol.work import parse_params

JSON_BYTES = 8 * 2**20
JSON_WITH_FILES_BYTES = 32 * 2**20  # data URLs: 20 MiB of image are 27 MiB of base64
THREAD_BYTES = 256 * 2**10  # decoding more than this on the event loop would hold up everybody's tokens
MAX_DEPTH = 64
MAX_NAME_CHARS = 200

_decoder = msgspec.json.Decoder()


async def read_json(request: Request, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
        FaultError: payload_too_large; unsupported_media_type; invalid_request when it is not a JSON object
            (NaN, Infinity, whole numbers of more than 64 bits and nesting beyond `MAX_DEPTH` included).
        ClientDisconnect: the client left while sending.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise refuse("unsupported_media_type", f"Expected a body of type application/json, not {kind!r}.")
    check_length(request, limit)
    body = bytearray()
    async with aclosing(request.stream()) as stream:
        async for piece in stream:
            body += piece
            if len(body) > limit:
                raise refuse("payload_too_large", f"The body exceeds {limit} bytes.")
    if len(body) > THREAD_BYTES:
        return await run_sync(decode_object, bytes(body))
    return decode_object(bytes(body))


def whole_number(text: str, least: int, most: int) -> int | None:
    """A whole number from `least` to `most` that is written in digits; None for anything else.

    Python reads no number of thousands of digits, and no database one of twenty.
    """
    digits = text.lstrip("0") or text[-1:]
    if not text.isascii() or not text.isdigit() or len(digits) > len(str(most)):
        return None
    return number if least <= (number := int(digits)) <= most else None


def page_size(query: QueryParams, default: int, most: int) -> int:
    """The query's `limit`. Raises FaultError(invalid_parameter)."""
    limit = whole_number(query.get("limit", str(default)), 1, most)
    if limit is None:
        raise refuse("invalid_parameter", f"limit: Expected a number from 1 to {most}.", "limit")
    return limit


def check_length(request: Request, limit: int) -> None:
    """Refuse by the announced length, before the body is read. Raises FaultError(payload_too_large)."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise refuse("payload_too_large", f"The body of {announced} bytes exceeds {limit} bytes.")


def decode_object(body: bytes, what: str = "The body") -> dict[str, Any]:
    """Decode a JSON object. Raises FaultError(invalid_request)."""
    if not body.strip():
        raise refuse("invalid_request", f"{what} is empty; expected a JSON object.")
    try:
        value = _decoder.decode(body)
    except RecursionError:
        raise refuse("invalid_request", f"{what} is nested too deeply.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise refuse("invalid_request", f"{what} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise refuse("invalid_request", f"{what} must be a JSON object.")
    _check_tree(value, what)
    return value


def _check_tree(value: Any, what: str) -> None:
    """Depth and numbers that can be kept and passed on, without recursion (1e999 decodes to infinity)."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise refuse("invalid_request", f"{what} holds a number that is not finite.")
            elif isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise refuse("invalid_request", f"{what} holds a whole number of more than 64 bits.")
        if not below:
            return
        level = below
    raise refuse("invalid_request", f"{what} is nested deeper than {MAX_DEPTH} levels.")


class FieldTable(NamedTuple):
    """Which fields a route takes.

    Attributes:
        passed: handed to the work parameters under the same name.
        handled: read by the route itself.
        ignored: known to OpenAI, never change the answer here: accepted and dropped.
        fixed: fields that would change the answer if we could do them: only these values are taken.
    """

    passed: frozenset[str]
    handled: frozenset[str]
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = {}

    def pick(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (passed, handled); null counts as not given.

        Raises:
            FaultError: invalid_parameter for an unknown field, unsupported for a value that is not in `fixed`.
        """
        passed: dict[str, Any] = {}
        handled: dict[str, Any] = {}
        for name, value in body.items():
            if name in self.passed:
                target = passed
            elif name in self.handled:
                target = handled
            elif name in self.ignored:
                continue
            elif name in self.fixed:
                if value is not None and not _among(value, self.fixed[name]):
                    raise refuse("unsupported", _fixed_sentence(name, self.fixed[name]), name)
                continue
            else:
                raise refuse("invalid_parameter", f"{_short(name)}: Unknown field.", _short(name))
            if value is not None:
                target[name] = value
        return passed, handled


def _among(value: Any, allowed: Iterable[Any]) -> bool:
    # 1 == True in Python, but not in JSON.
    return any(type(value) is type(item) and value == item for item in allowed)


def _fixed_sentence(name: str, allowed: tuple[Any, ...]) -> str:
    words = ", ".join(msgspec.json.encode(item).decode() for item in allowed)
    return f"{name}: This server takes only {words} here; leave the field out." if words else f"{name}: Not supported."


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"


def model_name(handled: Mapping[str, Any]) -> str:
    """The `model` field. Raises FaultError(invalid_parameter)."""
    name = handled.get("model")
    if name is None:
        raise refuse("invalid_parameter", "model: The field is required.", "model")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise refuse("invalid_parameter", f"model: Expected a name of 1 to {MAX_NAME_CHARS} characters.", "model")
    return name


def flag(handled: Mapping[str, Any], name: str) -> bool:
    """A boolean field, false when not given. Raises FaultError(invalid_parameter)."""
    value = handled.get(name, False)
    if not isinstance(value, bool):
        raise refuse("invalid_parameter", f"{name}: Expected true or false.", name)
    return value


def choice(handled: Mapping[str, Any], name: str, allowed: Iterable[str], default: str) -> str:
    """A field with a closed list of values. Raises FaultError(invalid_parameter)."""
    allowed = tuple(allowed)
    value = handled.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise refuse("invalid_parameter", f"{name}: Expected one of {', '.join(allowed)}.", name)
    return value


def work_params(kind: str, value: Mapping[str, Any], names: Mapping[str, str] | None = None, prefix: str = "") -> Any:
    """`parse_params`, with refusals in the caller's words.

    Args:
        kind: the task kind.
        value: the parameters.
        names: our field names -> the route's, where they differ.
        prefix: put before every field name.

    Raises:
        FaultError: invalid_parameter, unsupported.
    """
    try:
        return parse_params(kind, dict(value))
    except FaultError as error:
        raise FaultError(in_callers_words(error.fault, names or {}, prefix)) from None
    except RecursionError:
        raise refuse("invalid_request", "The body is nested too deeply.") from None


def in_callers_words(fault: Fault, names: Mapping[str, str], prefix: str = "") -> Fault:
    """A caller's fault with the field named as the route names it; engines know only the work parameters' names.

    Args:
        fault: of the parameter check, or of the engine's validation.
        names: our field names -> the route's, where they differ.
        prefix: put before every field name.
    """
    field = fault.field
    if field is None or fault.owner is not Owner.CALLER:
        return fault
    head = re.split(r"[.\[]", field, maxsplit=1)[0]
    renamed = f"{prefix}{names.get(head, head)}{field[len(head) :]}"
    message = fault.message
    if message.startswith(f"{field}: "):
        message = f"{renamed}: {message.removeprefix(f'{field}: ')}"
    return msgspec.structs.replace(fault, field=renamed, message=message)
