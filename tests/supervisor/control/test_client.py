"""Questions to a supervisor: what answers well, what answers badly, and what does not answer."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.control import client
from supervisor.control.client import Event, NotRunning, RequestFailed, ask, fetch, follow
from supervisor.control.server import open_control
from supervisor.errors import NoPermission, SupervisorError

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def off(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
    return await trio.to_thread.run_sync(functools.partial(function, *given, **more))


@contextlib.asynccontextmanager
async def answering(path: Path, *parts: bytes, hold: bool = False) -> AsyncIterator[Path]:
    """Somebody who answers every request with these bytes, whatever they are."""

    async def speak(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some(65536)
            for part in parts:
                await stream.send_all(part)
            if hold:
                await trio.sleep_forever()
        await stream.aclose()

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, [trio.SocketListener(listener)])
        yield path
        nursery.cancel_scope.cancel()


async def test_ask(box):
    assert (await off(ask, box.path, "GET", "/v1/health"))["ok"] is True
    with pytest.raises(RequestFailed, match="/v1/nonsense"):
        await off(ask, box.path, "GET", "/v1/nonsense")
    with pytest.raises(RequestFailed, match="body is wrong"):
        await off(ask, box.path, "POST", "/v1/pause", {"for_s": "soon"})


def test_nobody_is_there(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none" / "none", tmp_path):
        with pytest.raises((NotRunning, RequestFailed)):
            ask(path, "GET", "/v1/health")
    with pytest.raises(NotRunning, match="supervisor run"):
        ask(tmp_path / "none", "GET", "/v1/health")
    with pytest.raises(NotRunning):
        next(follow(tmp_path / "none", "/v1/events"))
    with pytest.raises(NotRunning):
        fetch(tmp_path / "none", "/v1/diagnostics", io.BytesIO(), patience_s=1)


@pytest.mark.parametrize(
    "words",
    [
        b"SSH-2.0-OpenSSH\r\n",
        OK + b"content-length: 5\r\n\r\nnever",
        OK + b"content-length: 50\r\n\r\n{}",
        b"",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n<>",
        b"\x00" * 70000,
    ],
)
async def test_what_is_no_supervisor(tmp_path, words):
    async with answering(tmp_path / "s", words) as path:
        for question in (
            lambda: ask(path, "GET", "/v1/status"),
            lambda: next(follow(path, "/v1/events")),
        ):
            with pytest.raises((RequestFailed, StopIteration)):
                await off(_without_stop, question)


def _without_stop(question: Callable[[], Any]) -> Any:
    """A StopIteration does not come through a thread."""
    try:
        return question()
    except StopIteration:
        raise RequestFailed("ended") from None


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (403, b'{"error":{"message":"no"}}', NoPermission, "^no$"),
        (409, b'{"error":{"message":"not now"}}', RequestFailed, "not now"),
        (500, b'{"error":"x"}', RequestFailed, "answered 500"),
        (500, b"[]", RequestFailed, "answered 500"),
    ],
)
async def test_refusals(tmp_path, status, body, kind, sentence):
    head = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    async with answering(tmp_path / "s", head + body) as path:
        with pytest.raises(kind, match=sentence):
            await off(ask, path, "GET", "/v1/status")


async def test_a_supervisor_of_a_newer_kind(tmp_path):
    head = OK + b"x-bulkhead-api: 2\r\nx-bulkhead-version: 9.1\r\ncontent-length: 2\r\n\r\n{}"
    async with answering(tmp_path / "s", head) as path:
        with pytest.raises(RequestFailed, match=r"of version 9\.1, newer than this command"):
            await off(ask, path, "GET", "/v1/status")


async def test_one_that_is_mute(tmp_path):
    async with answering(tmp_path / "s", b"", hold=True) as path:
        with pytest.raises(RequestFailed, match=r"did not answer within 0\.1 s"):
            await off(ask, path, "GET", "/v1/status", patience_s=0.1)


# ---- files


async def test_fetch(box):
    out = io.BytesIO()
    assert await off(fetch, box.path, "/v1/diagnostics", out, patience_s=5.0) == 8
    assert out.getvalue() == b"a bundle"


async def test_half_a_file(tmp_path):
    async with answering(tmp_path / "s", OK + b"content-length: 10\r\n\r\nhalf") as path:
        with pytest.raises(RequestFailed, match="stopped in the middle"):
            await off(fetch, path, "/v1/diagnostics", io.BytesIO(), patience_s=5.0)


async def test_a_full_disk_is_not_the_supervisors_fault(box):
    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await off(fetch, box.path, "/v1/diagnostics", Full(), patience_s=5.0)


# ---- streams


def chunks(*parts: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


EVENTS = (
    b': alive\n\nid: ab-1\nevent: line\ndata: {"a": 1}\n\nevent: gap\ndata: {}\n\n'
    b'id: ab-2\nevent: line\ndata: "\xc3\xa4"\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"", b"9\r\nid: ab-3\n"])
async def test_events_however_they_are_cut(tmp_path, size, end):
    pieces = [EVENTS[at : at + size] for at in range(0, len(EVENTS), size)]
    async with answering(tmp_path / "s", chunks(*pieces) + end) as path:
        seen = await off(lambda: list(follow(path, "/v1/events")))
    assert seen == [Event("line", "ab-1", {"a": 1}), Event("gap", "", {}), Event("line", "ab-2", "ä")]


async def test_a_stream_that_falls_silent_ends(tmp_path):
    async with answering(tmp_path / "s", chunks(EVENTS), hold=True) as path:
        assert len(await off(lambda: list(follow(path, "/v1/events", quiet_s=2.0)))) == 3


async def test_a_stream_that_is_refused(box):
    with pytest.raises(RequestFailed, match="keeps no events"):
        await off(lambda: list(follow(box.path, "/v1/events")))


# ---- strangers


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_told_so(box):
    path = Path("/tmp") / f"bh-control-cli-{os.getpid()}.sock"
    script = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from supervisor.control.client import ask
        from supervisor.errors import SupervisorError
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            ask(Path({str(path)!r}), "GET", "/v1/status")
        except SupervisorError as error:
            print(error)
            sys.exit(int(error.exit_code))
    """)
    argv = [sys.executable, "-c", script]
    for mode, sentence in ((0o600, "is not for this user"), (0o666, "for the owner of the supervisor")):
        async with open_control(path, box.surface):
            path.chmod(mode)
            ended = await off(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 77, ended.stderr
        assert sentence in ended.stdout


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(SupervisorError, match="too long"):
        ask(tmp_path / ("x" * 200), "GET", "/v1/status")


# ---- many at once


async def test_a_crowd_is_served_one_after_the_other(box):
    """More than the kernel lets wait, and more than the supervisor serves at once."""
    seen: list[bool] = []

    async def one() -> None:
        seen.append((await trio.to_thread.run_sync(ask, box.path, "GET", "/v1/health", limiter=limiter))["ok"])

    limiter = trio.CapacityLimiter(200)
    async with trio.open_nursery() as nursery:
        for _ in range(120):
            nursery.start_soon(one)
    assert seen == [True] * 120


async def test_room_that_does_not_come_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "CROWDED_S", 0.1)
    full = b'{"error": {"message": "48 connections are open already."}}'
    head = b"HTTP/1.1 503 x\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    async with answering(tmp_path / "s", head + b"content-length: %d\r\n\r\n" % len(full) + full) as path:
        with pytest.raises(RequestFailed, match="48 connections are open already"):
            await off(ask, path, "GET", "/v1/health")
