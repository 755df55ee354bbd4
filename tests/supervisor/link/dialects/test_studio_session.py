from __future__ import annotations

import datetime
import logging

import msgspec
import pytest
import trio

from supervisor.link.dialects import studio_session as subject
from supervisor.link.dialects.studio_register import Credentials, CredentialsFile, base_url
from supervisor.link.dialects.studio_session import Door
from supervisor.suspend import Clocks
from supervisor.testing_studio import open_studio_server
from tests.supervisor.link.dialects.studio_rig import FAST, open_bench

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("told", "skew_s"),
    [
        ("2026-01-01T00:00:04Z", 0),
        ("2026-01-01T00:01:00.000Z", 60),
        ("2025-12-31T23:00:00", 3600),
        ("2026-01-01T01:00:00+01:00", 0),
        ("yesterday", 0),
        ("", 0),
    ],
)
def test_clocks_that_differ(told, skew_s):
    assert subject._skew_s(told, NOW) == skew_s


def test_the_address_of_the_socket():
    assert Door("https://x/graphics/api", "w/1", "t", None).url == "wss://x/graphics/api/workers/w%2F1/connect"
    assert Door("http://x:1/graphics/api", "w", "t", None).url == "ws://x:1/graphics/api/workers/w/connect"


async def test_clock_skew_is_told_and_harms_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    async with open_studio_server() as server:
        server.approving, server.server_time = True, "2001-01-01T00:00:00Z"
        async with open_bench(tmp_path, server.url):
            session = await server.session()
            await server.until(lambda: session.said("heartbeat"), "a heartbeat")
    assert "clock and ours differ by" in caplog.text


async def test_a_session_ends_soon_after_the_machine_slept(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "SLEEP_LOOK_S", 0.02)
    slept_s, looks = 0.0, 0

    def always() -> float:
        nonlocal looks
        looks += 1
        return slept_s

    pace = msgspec.structs.replace(FAST.pace, beat_s=1.0, silent_s=60.0)
    patient = msgspec.structs.replace(FAST, pace=pace)
    async with open_studio_server() as server:
        server.approving = True
        async with open_bench(tmp_path, server.url, timing=patient, clocks=Clocks(lambda: 0.0, always)) as bench:
            session = await server.session()
            await server.until(lambda: bench.worker.connected, "the worker has seen its welcome")

            async def beats(more: int) -> None:
                seen = len(session.said("heartbeat"))
                await server.until(lambda: len(session.said("heartbeat")) >= seen + more, "heartbeats")

            slept_s, seen = 3600.0, looks  # and the server still answers: nothing is lost by it
            with trio.fail_after(20):
                while looks < seen + 2:  # noqa: ASYNC110 - nothing tells of a look
                    await trio.sleep(0.01)
            await beats(2)
            assert bench.worker.connected
            assert not bench.ends
            session.muted = True
            await beats(2)  # an answer that was under way is heard by then
            slept_s = 7200.0
            await server.session(1)
    assert "silent after the machine slept" in bench.ends[0].sentence


async def test_a_server_that_does_not_speak_this_protocol_is_the_end(tmp_path, monkeypatch):
    async with open_studio_server() as server:
        server.approving = True
        monkeypatch.setattr(subject.frames, "SUBPROTOCOL", "studio-worker-v2")
        monkeypatch.setattr("supervisor.testing_studio.SUBPROTOCOL", "studio-worker-v2")
        original = subject.WebSocketConnection.subprotocol
        monkeypatch.setattr(subject.WebSocketConnection, "subprotocol", property(lambda _self: None))
        try:
            async with open_bench(tmp_path, server.url) as bench:
                assert "does not speak studio-worker-v2" in await bench.refused()
        finally:
            monkeypatch.setattr(subject.WebSocketConnection, "subprotocol", original)


async def test_nobody_there_is_no_end(tmp_path):
    nobody = "http://127.0.0.1:9"
    known = Credentials(install_id="i", studio=base_url(nobody), worker_id="w", auth_token="t")
    CredentialsFile(tmp_path / "studio").write(known)
    async with open_bench(tmp_path, nobody) as bench:
        with trio.fail_after(20):
            while len(bench.ends) < 3:  # noqa: ASYNC110 - nothing tells of an end
                await trio.sleep(0.01)
    assert not any(end.final for end in bench.ends)
    assert "cannot be reached" in bench.ends[-1].sentence
