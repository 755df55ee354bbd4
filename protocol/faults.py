"""Faults: what went wrong, whose it is, and whether trying again can help.

A fault is data that crosses every wire unchanged. `CODES` is the one table that says, for each code,
who owns it, whether a new attempt may succeed, and what an HTTP client is told.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import msgspec


class Owner(enum.StrEnum):
    """Who has to act: the first question anybody asks of a failed job."""

    CALLER = "caller"
    ENGINE = "engine"
    WORKER = "worker"
    COORDINATOR = "coordinator"


class CodeInfo(NamedTuple):
    """One row of the table: owner, retryable, HTTP status, OpenAI error type."""

    owner: Owner
    retryable: bool
    http_status: int
    openai_type: str


_BAD = "invalid_request_error"
_SRV = "server_error"

CODES: dict[str, CodeInfo] = {
    # the caller's: never retried
    "invalid_request": CodeInfo(Owner.CALLER, False, 400, _BAD),
    "invalid_parameter": CodeInfo(Owner.CALLER, False, 400, _BAD),
    "invalid_input_file": CodeInfo(Owner.CALLER, False, 400, _BAD),
    "context_length_exceeded": CodeInfo(Owner.CALLER, False, 400, _BAD),
    "unsupported": CodeInfo(Owner.CALLER, False, 400, _BAD),
    "payload_too_large": CodeInfo(Owner.CALLER, False, 413, _BAD),
    "unsupported_media_type": CodeInfo(Owner.CALLER, False, 415, _BAD),
    "model_not_found": CodeInfo(Owner.CALLER, False, 404, _BAD),
    "not_found": CodeInfo(Owner.CALLER, False, 404, _BAD),
    "unauthorized": CodeInfo(Owner.CALLER, False, 401, "authentication_error"),
    "forbidden": CodeInfo(Owner.CALLER, False, 403, "permission_error"),
    "rate_limited": CodeInfo(Owner.CALLER, True, 429, "rate_limit_error"),
    "conflict": CodeInfo(Owner.CALLER, False, 409, _BAD),
    "cancelled": CodeInfo(Owner.CALLER, False, 499, _BAD),
    # the engine's
    "engine_failed": CodeInfo(Owner.ENGINE, False, 500, _SRV),
    "engine_crashed": CodeInfo(Owner.ENGINE, True, 500, _SRV),
    # It crashed its engine twice while it ran alone: another attempt would only crash it again.
    "job_poisoned": CodeInfo(Owner.ENGINE, False, 500, _SRV),
    "quarantined": CodeInfo(Owner.ENGINE, True, 503, _SRV),
    "gpu_failed": CodeInfo(Owner.WORKER, True, 503, _SRV),
    "engine_hung": CodeInfo(Owner.ENGINE, True, 504, _SRV),
    "engine_protocol": CodeInfo(Owner.ENGINE, True, 500, _SRV),
    "load_failed": CodeInfo(Owner.ENGINE, False, 503, _SRV),
    "cpu_fallback": CodeInfo(Owner.ENGINE, False, 503, _SRV),
    "out_of_memory": CodeInfo(Owner.ENGINE, True, 503, _SRV),
    "model_corrupt": CodeInfo(Owner.ENGINE, False, 503, _SRV),
    "not_installed": CodeInfo(Owner.ENGINE, False, 503, _SRV),
    "command_failed": CodeInfo(Owner.ENGINE, False, 500, _SRV),
    "deadline_exceeded": CodeInfo(Owner.ENGINE, False, 504, _SRV),
    # the worker's
    "worker_stopping": CodeInfo(Owner.WORKER, True, 503, _SRV),
    "worker_lost": CodeInfo(Owner.WORKER, True, 503, _SRV),
    "worker_disk_full": CodeInfo(Owner.WORKER, True, 503, _SRV),
    "worker_failed": CodeInfo(Owner.WORKER, True, 500, _SRV),
    "input_unavailable": CodeInfo(Owner.WORKER, True, 502, _SRV),
    "upload_failed": CodeInfo(Owner.WORKER, True, 502, _SRV),
    # the coordinator's
    "no_worker": CodeInfo(Owner.COORDINATOR, True, 503, _SRV),
    # Its load goes on: who comes again finds it further.
    "model_loading": CodeInfo(Owner.COORDINATOR, True, 503, _SRV),
    "overloaded": CodeInfo(Owner.COORDINATOR, True, 503, _SRV),
    "storage_full": CodeInfo(Owner.COORDINATOR, True, 507, _SRV),
    "internal": CodeInfo(Owner.COORDINATOR, False, 500, _SRV),
}


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fault as it crosses a wire.

    Attributes:
        code: a key of `CODES`; an unknown code from a newer peer is kept and treated as `engine_failed`.
        message: one sentence for people.
        field: dotted name of the request field that is wrong, where there is one.
        retryable: overrides the table for this one fault (exit code 42 of a command, say).
        detail: evidence: exit_code, signal, stderr_tail (list of lines), library, hint.
    """

    code: str
    message: str
    field: str | None = None
    retryable: bool | None = None
    detail: dict[str, Any] = {}

    @property
    def info(self) -> CodeInfo:
        """The row of `CODES` that applies."""
        return CODES.get(self.code, CODES["engine_failed"])

    @property
    def owner(self) -> Owner:
        """Who has to act."""
        return self.info.owner

    @property
    def may_retry(self) -> bool:
        """Whether a new attempt could succeed."""
        return self.info.retryable if self.retryable is None else self.retryable

    @property
    def http_status(self) -> int:
        """Status for an HTTP client."""
        return self.info.http_status

    def openai_error(self) -> dict[str, Any]:
        """The body that OpenAI clients expect: `{"error": {message, type, param, code}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.info.openai_type,
                "param": self.field,
                "code": self.code,
                "owner": str(self.owner),
                "retryable": self.may_retry,
            }
        }


class FaultError(Exception):
    """Carries a `Fault` through Python code that raises; nothing is lost on the way."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def refuse(code: str, message: str, field: str | None = None, **detail: Any) -> FaultError:
    """Build the exception for `code`; use as `raise refuse("invalid_parameter", "…", "width")`."""
    return FaultError(Fault(code, message, field=field, detail=detail))
