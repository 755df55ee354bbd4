"""The control socket against its friends and its enemies. Real sockets, real processes.

Where its patience is tried, both ends are in this process and the clock is virtual: what one end has sent, the other
end has, so that time passes only when nobody has anything left to do.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from supervisor.control import conversation, server
from supervisor.control.conversation import MAX_BODY_BYTES, MOST
from supervisor.control.server import make_listener, open_control
from supervisor.errors import IdentityHeld, NoPermission

NOBODY = 65534
GET = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"


async def connect(path: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(path))


async def talk(path: Path, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, read the answer to its end: status, headers, body."""
    with trio.fail_after(60):
        async with await connect(path) as stream:
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                pass  # it has heard enough
            return parse(await everything(stream))


async def everything(stream: trio.SocketStream) -> bytes:
    got = b""
    try:
        while more := await stream.receive_some(65536):
            got += more
    except trio.BrokenResourceError:
        pass  # closed with some of ours unread
    return got


def parse(data: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


async def is_well(path: Path) -> None:
    status, _headers, body = await talk(path, GET)
    assert status == 200
    assert json.loads(body)["ok"] is True


# ---- friends


async def test_a_request_is_answered_with_the_version(box):
    status, headers, body = await talk(box.path, b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 200
    assert headers["x-bulkhead-api"] == "1"
    assert headers["x-bulkhead-version"]
    assert headers["cache-control"] == "no-store"
    assert json.loads(body)["worker"] == "box"


async def test_an_order_arrives(box):
    body = b'{"for_s": 60, "free_vram": true, "reason": "a game"}'
    head = b"POST /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    status, _headers, _body = await talk(box.path, head % len(body) + body)
    assert status == 200
    assert box.acts.asked == [("pause", "a game", 60.0, True)]


async def test_a_request_that_comes_byte_by_byte(box):
    async with await connect(box.path) as stream:
        for number in range(len(GET)):
            await stream.send_all(GET[number : number + 1])
        assert parse(await everything(stream))[0] == 200


async def test_the_socket_is_the_owners_and_goes_with_the_block(tmp_path, box):
    mode = box.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    path = tmp_path / "other.sock"
    async with open_control(path, box.surface):
        assert path.exists()
    assert not path.exists()


# ---- enemies


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\xff\x16\x03\x01garbage\r\n\r\n", 400),
        (b"GET /v1/health SPDY/9\r\n\r\n", 400),
        (b"GET /v1/health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET /v1/../v1/health HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/%2e%2e/health HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET http://x/v1/health HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET //v1/health HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"DELETE /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /v1/pause HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nOrigin: null\r\n\r\n", 403),
        (b"GET /v1/health HTTP/1.1\r\nHost: x\r\nreferer: http://evil.example/\r\n\r\n", 403),
        (b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{}\n", 415),
        (
            b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
            415,
        ),
        (
            b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n" + b"a" * (MAX_BODY_BYTES + 1),
            413,
        ),
        (b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
async def test_what_is_refused(box, data, status):
    got, headers, body = await talk(box.path, data)
    assert got == status
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["message"]
    assert box.acts.asked == []
    await is_well(box.path)


@pytest.mark.parametrize("data", [b"", b"GET /v1/hea", GET[:-2], b"POST /v1/drain HTTP/1.1\r\nHost: x\r\n"])
async def test_half_a_request_and_a_hang_up(box, data):
    async with await connect(box.path) as stream:
        await stream.send_all(data)
    await is_well(box.path)
    assert box.acts.asked == []


@pytest.mark.parametrize("data", [b"", GET[:-2]])
async def test_half_a_request_and_silence(box, autojump_clock, data):
    status, _headers, body = await talk(box.path, data)
    assert status == 408
    assert b"did not come within" in body


async def test_one_who_drips_is_dropped_and_holds_up_nobody(box, autojump_clock, nursery):
    dropped = trio.Event()

    async def drip() -> None:
        stream = await connect(box.path)
        try:
            for byte in GET * 1000:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.02)
        except trio.BrokenResourceError:
            dropped.set()
        await stream.aclose()

    nursery.start_soon(drip)
    with trio.fail_after(20):
        while not dropped.is_set():
            await is_well(box.path)
            await trio.sleep(0.01)


async def test_one_who_takes_no_answer_is_dropped(box, autojump_clock):
    """The answer is larger than the socket's buffer, and nobody reads it."""
    models = json.dumps({"x": "y" * 2_000_000})
    box.surface = box.surface._replace(more_metrics=lambda: [models])
    path = box.path.with_name("second.sock")
    async with open_control(path, box.surface):
        stream = await connect(path)
        await stream.send_all(b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.sleep(0.05)
        status, _headers, _body = await talk(path, GET)
        assert status == 200
        with trio.fail_after(20):
            await trio.sleep(2 * conversation.PATIENCE_S + 0.2)
            got = await everything(stream)
        assert 0 < len(got) < 2_000_000
        await stream.aclose()


async def test_fifty_silent_connections_cost_only_themselves(box, autojump_clock):
    streams = [await connect(box.path) for _ in range(50)]
    refused = [parse(await everything(stream))[0] for stream in streams[MOST:]]
    assert set(refused) <= {503, 408}
    assert 503 in refused
    with trio.fail_after(20):
        assert {parse(await everything(stream))[0] for stream in streams[:MOST]} == {408}
    for stream in streams:
        await stream.aclose()
    await is_well(box.path)


async def test_many_at_once_are_all_answered(box):
    async with trio.open_nursery() as nursery:
        for _ in range(MOST - 1):
            nursery.start_soon(is_well, box.path)


async def test_a_mistake_of_ours_is_one_answer(box, caplog):
    box.surface = box.surface._replace(snapshot=lambda: 1 / 0)
    path = box.path.with_name("second.sock")
    async with open_control(path, box.surface):
        with caplog.at_level(logging.ERROR):
            assert (await talk(path, GET))[0] == 500
        assert "ZeroDivisionError" in caplog.text
    await is_well(box.path)


# ---- other users

CHILD = """
import os, socket, sys
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
s = socket.socket(socket.AF_UNIX)
try:
    s.connect({path!r})
except PermissionError:
    sys.exit("no entry")
s.sendall(b"POST /v1/drain HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
got = b""
while more := s.recv(65536):
    got += more
sys.stdout.write(got.decode())
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(CHILD.format(uid=NOBODY, path=str(path)))
    return subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("mode", "answer"), [(0o600, "no entry"), (0o666, "HTTP/1.1 403")])
async def test_another_user_is_kept_out_by_the_mode_and_by_the_kernels_word(tmp_path, box, mode, answer, caplog):
    path = Path("/tmp") / f"bh-control-{os.getpid()}.sock"  # /tmp, where nobody gets as far as the socket
    async with open_control(path, box.surface):
        path.chmod(mode)
        ended = await trio.to_thread.run_sync(as_nobody, path)
    assert answer in ended.stdout + ended.stderr
    assert box.acts.asked == []
    assert (f"refused uid {NOBODY}" in caplog.text) == (mode == 0o666)


async def test_who_cannot_be_told_is_refused(box):
    strict = server.owners(box.surface, uid_of=lambda _peer: None)
    path = box.path.with_name("second.sock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(strict.serve, [trio.SocketListener(make_listener(path))])
        assert (await talk(path, GET))[0] == 403
        nursery.cancel_scope.cancel()


async def test_the_kernel_tells_who_we_are():
    left, right = socket.socketpair()
    with left, right:
        assert server.peer_uid(trio.socket.from_stdlib_socket(left)) == os.geteuid()


# ---- the place


def start(script: str, path: Path) -> subprocess.Popen[bytes]:
    """Start a script and wait for its first line."""
    child = subprocess.Popen([sys.executable, "-I", "-c", script, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


LEFT = """
import socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
print(1, flush=True)
time.sleep(99)
"""


async def test_what_a_killed_supervisor_left_is_replaced(tmp_path, box):
    path = tmp_path / "left.sock"
    child = await trio.to_thread.run_sync(functools.partial(start, LEFT, path))
    with pytest.raises(IdentityHeld, match="Another process answers"):
        make_listener(path)
    child.kill()
    child.communicate(timeout=60)
    assert path.exists()
    async with open_control(path, box.surface):
        await is_well(path)


async def test_two_supervisors_do_not_share_a_socket(box):
    with pytest.raises(IdentityHeld):
        async with open_control(box.path, box.surface):
            pytest.fail("two of them")
    await is_well(box.path)


def test_a_file_in_the_way_is_not_removed(tmp_path):
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(NoPermission, match="is not one; move it away"):
        make_listener(path)
    assert path.read_text() == "precious"


def test_a_link_in_the_way_is_not_followed(tmp_path):
    path = tmp_path / "control.sock"
    path.symlink_to("/etc/passwd")
    with pytest.raises(NoPermission, match="is not one"):
        make_listener(path)


def test_a_path_that_is_too_long_says_so(tmp_path):
    path = tmp_path / ("x" * 120)
    with pytest.raises(NoPermission, match=r"a socket's may have 107.*\[control\] socket"):
        make_listener(path)


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(NoPermission, match="chmod go-w"):
        make_listener(folder / "control.sock")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NoPermission, match="No such file"):
        make_listener(tmp_path / "nowhere" / "control.sock")


async def test_the_socket_of_a_successor_is_left_alone(tmp_path, box):
    path = tmp_path / "other.sock"
    async with open_control(path, box.surface):
        path.unlink()
        successor = make_listener(path)
    assert path.exists()
    successor.close()
