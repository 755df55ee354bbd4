"""What the official client makes of every fault: the class it raises, and whether it tries again."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from coordinator.errors import fault_response
from protocol.faults import CODES, Fault

httpx2 = pytest.importorskip("httpx2", reason="this release of the client brings another HTTP library")

CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    413: openai.APIStatusError,
    415: openai.APIStatusError,
    429: openai.RateLimitError,
    499: openai.APIStatusError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
    507: openai.InternalServerError,
}


class Answering:
    """A client whose every request is answered with one fault."""

    def __init__(self, fault: Fault) -> None:
        self.requests = 0

        def answer(_request: Any) -> Any:
            self.requests += 1
            response = fault_response(fault)
            headers = {**response.headers, "x-request-id": "req_1"}
            return httpx2.Response(response.status_code, headers=headers, content=response.body)

        http = httpx2.Client(transport=httpx2.MockTransport(answer))
        self.ai = openai.OpenAI(base_url="http://here/v1", api_key="k", max_retries=1, http_client=http)
        self.ai._calculate_retry_timeout = lambda *_args: 0.0  # type: ignore[method-assign]


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_fault(code: str) -> None:
    info = CODES[code]
    answering = Answering(Fault(code, "It is so.", "field"))
    with answering.ai as ai, pytest.raises(openai.APIStatusError) as caught:
        ai.models.list()
    error = caught.value
    assert type(error) is CLASSES[info.http_status]
    assert (error.code, error.param, error.type) == (code, "field", info.openai_type)
    assert error.request_id == "req_1"
    assert "It is so." in error.message
    again = info.retryable and (info.http_status in (409, 429) or info.http_status >= 500)
    assert answering.requests == 1 + again


@pytest.mark.parametrize(("retryable", "requests"), [(True, 2), (False, 1)])
def test_one_fault_may_differ_from_its_code(retryable: bool, requests: int) -> None:
    answering = Answering(Fault("engine_crashed", "It died.", retryable=retryable))
    with answering.ai as ai, pytest.raises(openai.InternalServerError):
        ai.models.list()
    assert answering.requests == requests
