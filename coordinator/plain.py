"""What a worker says beside its fields, before it is kept: it has to be such that it can be shown.

A worker speaks msgpack, which has more than JSON: extensions, maps whose keys are anything. Kept as it came, one such
value would fail every answer that it stands in: the list of all jobs, the list of all models, the page. And what is
kept for people and for the next attempt has a size.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protocol import link_wire as wire
from protocol.faults import Fault
from protocol.framing import UNDECODABLE

MOST_DETAIL_BYTES = 64 * 2**10
MESSAGE_CHARS = 4000
NAME_CHARS = 200
_encode = msgspec.json.Encoder().encode


def json_bytes(value: Any) -> int | None:
    """How long a value is in JSON; None when it cannot be said in JSON."""
    try:
        return len(_encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None


def why_not_plain(body: wire.Body) -> str:
    """A sentence when a message about an attempt or an order holds what cannot be shown; "" when all is well."""
    match body:
        case wire.Chunk(data=data):
            return "" if _is_plain(data) else "data: It cannot be said in JSON."
        case wire.Fail(fault=fault):
            return "" if json_bytes(fault.detail) is not None else "fault.detail: It cannot be said in JSON."
        case wire.OrderDone(detail=detail):
            return "" if json_bytes(detail) is not None else "detail: It cannot be said in JSON."
    return ""


def _is_plain(data: msgspec.Raw) -> bool:
    try:
        return json_bytes(msgspec.msgpack.decode(data)) is not None
    except UNDECODABLE:
        return False


def bounded(fault: Fault) -> Fault:
    """A worker's fault in the size in which it is kept."""
    detail = fault.detail
    size = json_bytes(detail)
    if size is None:
        detail = {"left_out": "The worker's detail cannot be said in JSON."}
    elif size > MOST_DETAIL_BYTES:
        detail = {
            "left_out": f"The worker sent {size} bytes of detail, more than the {MOST_DETAIL_BYTES} that are kept."
        }
    return msgspec.structs.replace(
        fault,
        code=fault.code[:NAME_CHARS],
        message=fault.message[:MESSAGE_CHARS],
        field=None if fault.field is None else fault.field[:NAME_CHARS],
        detail=detail,
    )
