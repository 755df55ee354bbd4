"""From request to response, without a socket."""

from __future__ import annotations

import json

import pytest

from supervisor.control.exchange import Request
from supervisor.control.routes import ROUTES, answer


async def ask(box, method: str, target: str, body: object = None, kind: str = "application/json"):
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    response = await answer(Request(method, target, data, kind if data else ""), box.surface)
    return response.status, response


# Those that give more than a snapshot, or take a query: test_routes_look, _flow, _config and _act have them.
OTHERS = {"/v1/diagnostics", "/v1/jobs", "/v1/jobs/{id}", "/v1/log-level", "/v1/events", "/v1/logs", "/v1/config"}


@pytest.mark.parametrize(
    "target", [path for path, methods in ROUTES.items() if "GET" in methods and path not in OTHERS]
)
async def test_every_question_has_an_answer(box, target):
    status, response = await ask(box, "GET", target + "?anything=1")
    assert status == 200
    if target == "/v1/metrics":
        assert response.kind.startswith("text/plain; version=0.0.4")
        assert b"bulkhead_up 1\n" in response.body
        assert response.body.endswith(b"bulkhead_gpu_x 1\n")
    else:
        assert json.loads(response.body)
    assert box.acts.asked == []


@pytest.mark.parametrize(
    ("target", "body", "asked"),
    [
        ("/v1/pause", None, ("pause", "", None, False)),
        ("/v1/pause", {"for_s": 1.5, "reason": "x"}, ("pause", "x", 1.5, False)),
        ("/v1/pause", {"free_vram": True}, ("pause", "", None, True)),
        ("/v1/resume", None, ("resume",)),
        ("/v1/drain", {}, ("drain", "the operator asked for it", False)),
        ("/v1/drain", {"reason": "moving house"}, ("drain", "moving house", False)),
        ("/v1/drain", {"restart": True}, ("drain", "the operator asked for it", True)),
    ],
)
async def test_an_order_is_passed_on_once(box, target, body, asked):
    assert (await ask(box, "POST", target, body))[0] == 200
    assert box.acts.asked == [asked]


async def test_resume_says_whether_there_was_something_to_lift(box):
    assert json.loads((await ask(box, "POST", "/v1/resume"))[1].body)["lifted"] is True
    assert json.loads((await ask(box, "POST", "/v1/resume"))[1].body)["lifted"] is False


@pytest.mark.parametrize(
    ("target", "body", "word"),
    [
        ("/v1/pause", {"for_s": 0}, "for_s"),
        ("/v1/pause", {"for_s": -5}, "for_s"),
        ("/v1/pause", {"for_s": 1e12}, "for_s"),
        ("/v1/pause", {"for_s": "2h"}, "for_s"),
        ("/v1/pause", b'{"for_s": NaN}', "JSON"),
        ("/v1/pause", {"reason": "x" * 201}, "reason"),
        ("/v1/pause", {"fro_s": 5}, "fro_s"),
        ("/v1/pause", [], "object"),
        ("/v1/pause", b"\xff\xfe", ""),
        ("/v1/pause", b"[" * 60_000, ""),
        ("/v1/resume", {"x": 1}, "x"),
        ("/v1/drain", b"{", ""),
    ],
)
async def test_a_wrong_body_is_named_and_nothing_happens(box, target, body, word):
    status, response = await ask(box, "POST", target, body)
    assert status == 400
    assert word in json.loads(response.body)["error"]["message"]
    assert box.acts.asked == []
