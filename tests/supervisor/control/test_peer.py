"""Who has connected, in words."""

from __future__ import annotations

import os

import trio

from supervisor.control.peer import peer_named


async def test_the_kernel_tells_who_has_connected():
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        assert peer_named(1000, ours) == f"uid 1000, pid {os.getpid()}"


async def test_a_socket_that_tells_nothing_leaves_the_pid_out():
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as other:
        assert peer_named(7, other) == "uid 7"
