"""Orders: each is passed on once, bounded, and leaves a line in the log that says who, what and how it went."""

from __future__ import annotations

import json
import logging

import pytest

from supervisor.control import asked
from supervisor.control.exchange import KEEP_ALIVE, Refused, Request, Stream
from supervisor.control.peer import PEER
from supervisor.control.routes import ROUTES, answer
from supervisor.control.routes_act import ACT
from supervisor.intake.holds import Source


async def ask(box, method: str, target: str, body: object = None):
    data = b"" if body is None else json.dumps(body).encode()
    return await answer(Request(method, target, data, "application/json" if data else ""), box.surface)


@pytest.mark.parametrize(
    ("target", "body", "passed"),
    [
        ("/v1/pause", {"kind": "image"}, ("pause", "", None, False, "image", "")),
        ("/v1/pause", {"gpu": "1"}, ("pause", "", None, False, "", "1")),
        ("/v1/resume", {"gpu": "1"}, ("resume", "", "1")),
        ("/v1/holds", {"source": "update", "mode": "abort"}, ("put_hold", None)),
        ("/v1/shutdown", None, ("shutdown", "the operator asked for it")),
        ("/v1/reload", {}, ("reload",)),
        ("/v1/log-level", {"level": "debug", "for_s": 60}, ("log_level", "debug", 60.0)),
        ("/v1/engines/chat/restart", {"now": True}, ("restart", "chat", "", True)),
        ("/v1/engines/owner%2Fchat/unload", {"reason": "x"}, ("unload", "owner/chat", "x")),
        ("/v1/models/chat/load", None, ("load", "chat")),
        ("/v1/models/remove", {"name": "chat"}, ("remove", asked.Remove(name="chat"))),
        ("/v1/gpus/GPU-1/cordon", {"unload": True}, ("cordon", "GPU-1", asked.Cordon(unload=True))),
        ("/v1/gpus/GPU-1/uncordon", {}, ("uncordon", "GPU-1")),
        ("/v1/jobs/j-1/cancel", {"reason": "mine"}, ("cancel_job", "j-1", "mine")),
        ("/v1/register", {"url": "wss://c"}, ("register", asked.Register(url="wss://c"))),
    ],
)
async def test_an_order_is_passed_on_once_and_told_in_the_log(box, caplog, target, body, passed):
    PEER.set("uid 1000, pid 77")
    with caplog.at_level(logging.INFO, "supervisor.control.routes_act"):
        response = await ask(box, "POST", target, body)
    assert response.status == 200, response.body
    ((*found,),) = box.acts.asked
    if passed[0] == "put_hold":
        passed = ("put_hold", asked.PutHold(source=Source.UPDATE, mode="abort"))
    assert tuple(found) == passed
    (line,) = caplog.messages
    assert line.startswith(f"order of uid 1000, pid 77: POST {target}")


async def test_a_hold_is_lifted_by_its_source_and_scope(box):
    response = await ask(box, "DELETE", "/v1/holds/update?gpu=GPU-1&kind=llm")
    assert json.loads(response.body)["lifted"] is True
    assert box.acts.asked == [("lift_hold", "update", "llm", "GPU-1")]
    assert (await ask(box, "DELETE", "/v1/holds/update?gqu=1")).status == 400


async def test_a_refused_order_is_told_with_its_reason(box, caplog, monkeypatch):
    def refuse(*_args: object, **_named: object) -> None:
        raise Refused(404, "There is no such thing.")

    monkeypatch.setattr(box.acts, "load", refuse)
    with caplog.at_level(logging.INFO, "supervisor.control.routes_act"):
        response = await ask(box, "POST", "/v1/models/x/load")
    assert response.status == 404
    assert caplog.messages == ["order of somebody refused: POST /v1/models/x/load: There is no such thing."]


async def test_no_secret_of_an_order_reaches_the_log_nor_the_answer(box, caplog):
    with caplog.at_level(logging.DEBUG):
        response = await ask(box, "POST", "/v1/register", {"url": "wss://c", "token": "hunter2-hunter2"})
        source = "https://user:hunter2-hunter2@host/m.gguf?token=hunter2-hunter2"
        await ask(box, "POST", "/v1/models/pull", {"source": source})
        await ask(box, "POST", "/v1/register", {"url": "wss://c", "tokn": "hunter2-hunter2"})
    assert len(caplog.messages) == 3
    assert "hunter2" not in caplog.messages[0] + caplog.messages[1]
    assert b"hunter2" not in response.body


async def test_a_pull_is_a_stream_of_its_events(box):
    stream = await ask(box, "POST", "/v1/models/pull", {"source": "./a.gguf"})
    assert isinstance(stream, Stream)
    pieces = [piece async for piece in stream.parts]
    assert pieces == [
        b'event: plan\ndata: {"files":["a"],"total_bytes":3}\n\n',
        KEEP_ALIVE,
        b'event: done\ndata: {"name":"a"}\n\n',
    ]


@pytest.mark.parametrize(
    ("target", "body", "word"),
    [
        ("/v1/models/pull", {}, "source"),
        ("/v1/models/pull", {"source": ""}, "source"),
        ("/v1/models/pull", {"source": "x" * 5000}, "source"),
        ("/v1/models/pull", {"source": "x", "sha256": "abc"}, "sha256"),
        ("/v1/models/remove", {"name": ""}, "name"),
        ("/v1/log-level", {"level": "loud"}, "level"),
        ("/v1/log-level", {"level": "info", "for_s": -1}, "for_s"),
        ("/v1/register", {"url": "ftp://x"}, "url"),
        ("/v1/holds", {"source": "weather"}, "weather"),
        ("/v1/holds", {"mode": "off"}, "mode"),
        ("/v1/gpus/x/cordon", {"for_s": 0}, "for_s"),
        ("/v1/engines/x/restart", {"now": "yes"}, "now"),
        ("/v1/shutdown", {"restart": True}, "restart"),
    ],
)
async def test_a_wrong_body_is_named_and_nothing_happens(box, target, body, word):
    response = await ask(box, "POST", target, body)
    assert response.status == 400
    assert word in json.loads(response.body)["error"]["message"]
    assert box.acts.asked == []


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models//load",
        "/v1/models/a/b/load",
        "/v1/models/../load",
        "/v1/engines/unload",
        "/v1/gpus/cordon",
        "/v1/jobs//cancel",
        "/v1/models/x/load/",
        "/v1/Models/x/load",
    ],
)
async def test_a_path_that_is_none_of_ours_orders_nothing(box, target):
    response = await ask(box, "POST", target)
    assert response.status in (404, 405) or target == "/v1/models/../load"
    # Two dots are a name like any other: nothing here is a path of files.
    assert box.acts.asked in ([], [("load", "..")])


@pytest.mark.parametrize("name", ["..%2F..%2Fetc", "%00", "%2e%2e", "a%2Fb", "%ff", "%0d%0aX-Evil:%201"])
async def test_a_name_reaches_who_acts_decoded_once_and_no_header(box, name):
    response = await ask(box, "POST", f"/v1/models/{name}/load")
    assert response.status == 200
    ((_verb, found),) = box.acts.asked
    assert "%" not in found
    assert "X-Evil" not in "".join(response.headers)


async def test_orders_want_their_own_method(box):
    for path, methods in ACT.items():
        wrong = "GET" if "GET" not in ROUTES[path] else "PUT"
        assert (await ask(box, wrong, path.replace("{", "").replace("}", ""))).status == 405, (path, methods)
    assert box.acts.asked == []


async def test_the_bundle_and_the_doctor_are_handed_over(box):
    response = await ask(box, "GET", "/v1/diagnostics")
    assert (response.status, response.kind, response.body) == (200, "application/gzip", b"a bundle")
    assert response.headers == {"content-disposition": 'attachment; filename="bulkhead-diagnostics-box.tar.gz"'}
    assert json.loads((await ask(box, "GET", "/v1/doctor")).body)["ok"] is True
    box.surface = box.surface._replace(diagnostics=None, doctor=None)
    assert (await ask(box, "GET", "/v1/diagnostics")).status == 503
    assert (await ask(box, "GET", "/v1/doctor")).status == 503
