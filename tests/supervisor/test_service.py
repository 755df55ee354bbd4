from __future__ import annotations

import socket

from supervisor.service import sd_notify


def test_it_tells_a_service_manager_that_listens(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(5)
        sd_notify("READY=1", {"NOTIFY_SOCKET": str(path)})
        assert manager.recv(100) == b"READY=1"


def test_an_abstract_socket_and_nobody_there(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0bulkhead-test-notify")
        manager.settimeout(5)
        sd_notify("STOPPING=1", {"NOTIFY_SOCKET": "@bulkhead-test-notify"})
        assert manager.recv(100) == b"STOPPING=1"
    sd_notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    sd_notify("READY=1", {})
