"""A server of our own that is nothing but a script: places, environment, cache, and its end."""

from __future__ import annotations

import os
import select
import sys

import pytest

from protocol.engine_wire import Model, Ready
from protocol.faults import Fault

_SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers["Authorization"] != "Bearer " + os.environ["API_KEY"]:
            self.send_response(401); self.end_headers(); return
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *args): pass
names = ["HF_HOME", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "GREETING"]
print(json.dumps([os.getpid(), sys.argv[2:], [os.environ.get(name) for name in names]]), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _argv(program, *rest):  # noqa: ANN002
    return [sys.executable, "-I", "-c", program, *rest]


def _load(spawn, **options):  # noqa: ANN003
    child = spawn("server")
    model = Model(name="public", devices=("GPU-1", "GPU-2"), options={"start_s": 60, **options})
    return child, child.load(model)


def test_places_environment_and_key(spawn, tmp_path):
    argv = _argv(_SERVER, "{port}", "{name}", '{"json": {}}')
    env = {"API_KEY": "{key}", "GREETING": "hello"}
    child, ready = _load(spawn, argv=argv, env=env, cache_dir=str(tmp_path / "cache"), health="/")
    assert isinstance(ready, Ready), ready
    line = next(line for line in child.stderr().splitlines() if line.startswith("["))
    assert '"public", "{\\"json\\": {}}"' in line
    assert f'"{tmp_path}/cache/huggingface", "{tmp_path}/cache/", "GPU-1,GPU-2", "hello"' in line.replace(
        '/cache"', '/cache/"'
    )


@pytest.mark.parametrize(
    ("program", "start_s", "words"),
    [
        ("echo 'no such flag: {port}' >&2; exit 2", 60, "ended with exit code 2"),
        ("kill -ABRT $$; : {port}", 60, "was killed by SIGABRT"),
        ("echo loading weights for {port}; exec sleep 100", 3, "not healthy after"),
    ],
)
def test_a_server_that_does_not_come_up_tells_why(spawn, program, start_s, words):
    _, fault = _load(spawn, argv=["/bin/sh", "-c", program], start_s=start_s)
    assert isinstance(fault, Fault)
    assert fault.code == "load_failed"
    assert words in fault.message
    if "echo" in program:
        assert fault.detail["stderr_tail"]


def test_a_program_that_does_not_exist(spawn):
    _, fault = _load(spawn, argv=["/no/such/server", "{socket}"])
    assert isinstance(fault, Fault)
    assert fault.detail["stderr_tail"] == ["/no/such/server: No such file or directory"]


def test_shutdown_ends_the_server(spawn):
    child, ready = _load(spawn, argv=_argv(_SERVER, "{port}"), env={"API_KEY": "{key}"}, health="/")
    assert isinstance(ready, Ready), ready
    pid = int(next(line for line in child.stderr().splitlines() if line.startswith("["))[1:].split(",")[0])
    pidfd = os.pidfd_open(pid)
    child.process.stdin.close()
    assert child.process.wait(60) == 0
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
