from __future__ import annotations

import os
import socket

import pytest
import trio

from supervisor.service import MAX_STATUS_CHARS, Service, sd_notify, status_sentence, watchdog_s


def test_it_tells_a_service_manager_that_listens(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30)
        sd_notify("READY=1", {"NOTIFY_SOCKET": str(path)})
        assert manager.recv(100) == b"READY=1"
        Service({"NOTIFY_SOCKET": str(path)}).extend(1.5)
        assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=1500000"


def test_an_abstract_socket_and_nobody_there(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"bulkhead-test-notify-{os.getpid()}"
        manager.bind(f"\0{name}")
        manager.settimeout(30)
        sd_notify("STOPPING=1", {"NOTIFY_SOCKET": f"@{name}"})
        assert manager.recv(100) == b"STOPPING=1"
    sd_notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    sd_notify("READY=1", {})


def test_a_service_manager_that_does_not_read_holds_nobody_up(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        for _ in range(5000):  # far more than a socket's queue
            sd_notify("STATUS=" + "x" * 200, {"NOTIFY_SOCKET": str(path)})


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for our parent
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
    ],
)
def test_the_watchdog_is_ours_only_when_it_names_us(environ: dict[str, str], seconds: float | None):
    assert watchdog_s(environ) == seconds


def test_states_as_systemd_spells_them():
    sent: list[str] = []
    service = Service({}, notify=sent.append)
    service.ready()
    service.alive()
    service.reloading()
    service.stopping()
    assert sent[:2] == ["READY=1", "WATCHDOG=1"]
    assert sent[2].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert int(sent[2].rpartition("=")[2]) > 0
    assert sent[3] == "STOPPING=1"


def test_a_status_is_one_line_sent_once_and_smuggles_nothing():
    sent: list[str] = []
    service = Service({}, notify=sent.append)
    service.status("one")
    service.status("one")
    service.status("a name\nWATCHDOG=trigger\x1b[2J")
    service.status("ü" * 1000)
    assert sent == ["STATUS=one", "STATUS=a name WATCHDOG=trigger [2J", "STATUS=" + "ü" * MAX_STATUS_CHARS]


async def test_a_drain_asks_for_time_until_it_is_over(autojump_clock):
    sent: list[str] = []
    with trio.move_on_after(35):
        await Service({}, notify=sent.append).keep_extending()
    assert sent == ["EXTEND_TIMEOUT_USEC=30000000"] * 4


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"models": 1, "ready": 0, "jobs": 0}, "0 of 1 model ready, no job runs"),
        ({"models": 3, "ready": 2, "jobs": 1}, "2 of 3 models ready, 1 job runs"),
        (
            {"models": 3, "ready": 3, "jobs": 0, "holds": ["paused by you until 22:00", "on battery"]},
            "3 of 3 models ready, no job runs; on hold: paused by you until 22:00, on battery",
        ),
        (
            {"models": 3, "ready": 3, "jobs": 4, "holds": ["paused"], "stopping": "SIGTERM was received"},
            "Draining (SIGTERM was received): 3 of 3 models ready, 4 jobs run",
        ),
    ],
)
def test_what_it_does_as_one_sentence(facts, sentence: str):
    assert status_sentence(**facts) == sentence
