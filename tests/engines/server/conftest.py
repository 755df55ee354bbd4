"""A real HTTP server in the test's own process: OpenAI's routes and a Gradio app, good and bad on request."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engines.synthetic.media import png, tone_wav


class StandIn:
    """What it was asked, and how it shall answer.

    Attributes:
        seen: (method, path, headers, decoded body) of every request.
        chat: frames to send for a streamed chat; strings are data lines, None hangs up.
        shape: shape of the Gradio answer.
        hold: requests to /hold wait for this; `gone` is set when the client of one went away.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        self.chat: list[str | None] = []
        self.health = [200]
        self.shape = "data"
        self.gone = threading.Event()
        self.asked = threading.Event()
        self.picture = png(32, 16, b"abc", b"def")
        self.url = ""

    def body_of(self, path: str) -> Any:
        return next(body for _, seen, _, body in self.seen if seen == path)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        path = self.path.partition("?")[0]
        self.standin.seen.append((self.command, self.path, dict(self.headers), body))
        answers = {
            "/health": self._health,
            "/v1/models": lambda: self._json({"data": [{"id": "inner", "max_model_len": 77}]}),
            "/v1/chat/completions": self._chat,
            "/v1/embeddings": lambda: self._embeddings(body),
            "/v1/rerank": lambda: self._rerank(body),
            "/v1/audio/speech": lambda: self._speech(body),
            "/v1/images/generations": lambda: self._images(body),
            "/gradio_api/call/infer": lambda: self._json({"event_id": "e1"}),
            "/gradio_api/call/infer/e1": self._gradio_events,
            "/run/predict": lambda: self._json({"data": [self._gradio_picture()]}),
            "/hold": self._hold,
        }
        if path in answers:
            answers[path]()
        elif "file=" in path:
            self._bytes(self.standin.picture, "image/png")
        else:
            self._json({"error": {"message": f"no route {path}", "type": "not_found_error"}}, 404)

    def _bytes(self, data: bytes, mime: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), "application/json", status)

    def _health(self) -> None:
        health = self.standin.health
        self._json({}, health.pop(0) if len(health) > 1 else health[0])

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def _chat(self) -> None:
        if self.standin.chat and self.standin.chat[0] == "HOLD":
            self._hold()
            return
        if self.standin.chat and self.standin.chat[0].isdecimal():
            self._json(json.loads(self.standin.chat[1]), int(self.standin.chat[0]))
            return
        self._stream()
        for line in self.standin.chat:
            if line is None:
                return
            self.wfile.write(line.encode())
            self.wfile.flush()

    def _hold(self) -> None:
        """Never answer; notice when the client hangs up."""
        self.standin.asked.set()
        self.close_connection = True
        try:
            hung_up = self.connection.recv(1) == b""
        except ConnectionError:
            hung_up = True
        if hung_up:
            self.standin.gone.set()

    def _embeddings(self, body: Any) -> None:
        rows = [{"index": number, "embedding": [3.0, 4.0 + number]} for number in range(len(body["input"]))]
        self._json({"data": rows[::-1], "usage": {"prompt_tokens": 9}})

    def _rerank(self, body: Any) -> None:
        rows = [{"index": number, "relevance_score": number / 10} for number in range(len(body["documents"]))]
        self._json({"results": rows})

    def _speech(self, body: Any) -> None:
        self._bytes(tone_wav([440.0], 0.5), "audio/wav")

    def _images(self, body: Any) -> None:
        picture = base64.b64encode(self.standin.picture).decode()
        shapes: dict[str, Any] = {
            "data": {"b64_json": picture},
            "relative": {"url": "/files/file=1.png"},
            "absolute": {"url": f"{self.standin.url}/files/file=1.png"},
            "elsewhere": {"url": "http://169.254.169.254/latest"},
            "nothing": {},
        }
        self._json({"data": [shapes[self.standin.shape]]})

    def _gradio_picture(self) -> Any:
        data = "data:image/png;base64," + base64.b64encode(self.standin.picture).decode()
        url, path = "/gradio_api/file=/tmp/a.png", "/tmp/a.png"
        return {
            "data": data,
            "relative": url,
            "absolute": self.standin.url + url,
            "object": {"path": path, "url": self.standin.url + url, "meta": {"_type": "gradio.FileData"}},
            "behind-proxy": {"path": path, "url": "https://public.example/gradio_api/file=/tmp/a.png"},
            "path": {"path": path, "url": None},
            "gallery": [{"image": {"path": path, "url": url}, "caption": None}] * 3,
            "pairs": [[{"name": path, "data": None, "is_file": True}, "caption"]],
            "old": {"name": path, "data": data, "is_file": False},
            "elsewhere": "http://169.254.169.254/latest",
            "nothing": None,
            "text": "just words",
        }[self.standin.shape]

    def _gradio_events(self) -> None:
        self._stream()
        heartbeat = "event: heartbeat\ndata: null\n\n"
        if self.standin.shape == "error":
            self.wfile.write((heartbeat + 'event: error\ndata: "out of cheese"\n\n').encode())
            return
        if self.standin.shape == "cut":
            self.wfile.write((heartbeat + "event: complete\ndata: [").encode())
            return
        answer = json.dumps(["first output", self._gradio_picture()])
        generating = "event: generating\ndata: [null, null]\n\n"
        self.wfile.write(f"{heartbeat}{generating}event: complete\ndata: {answer}\n\n".encode())


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """A running stand-in server; ends with the test."""
    standin = StandIn()
    handler = type("Handler", (_Handler,), {"standin": standin})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    standin.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield standin
    server.shutdown()
    thread.join(10)
    server.server_close()
