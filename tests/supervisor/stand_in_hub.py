"""Servers for pull tests, over real HTTP: a Hugging Face hub, and plain files with Range and cut connections."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Site:
    """What the server holds and what it was asked.

    Attributes:
        files: URL path -> content.
        cut_after: URL path -> bytes after which the connection is cut, once per entry in the list.
        hold: until it is set, no connection is cut, nor any file sent to its end when `hold_all`: the server says
            nothing more, and `holding` is set.
        etags: whether a strong ETag is sent.
        asked: (method, path, Range, If-Range, Authorization) of each request.
        status: URL path -> statuses to answer first.
        redirects: URL path -> where to.
        repos: `owner/repo` -> {file name: content}.
        gated: repositories that want a token.
        retry_after: sent with the statuses of `status`.
        listed: file name -> size that the tree tells instead of the true one.
        commit: what the branch main of every repository points to; no other revision exists.
        drip: bytes per write, 0 for all at once; between two writes the server rests for some milliseconds.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: dict[str, list[int]] = {}
        self.etags = True
        self.ranges = True
        self.asked: list[dict[str, str]] = []
        self.status: dict[str, list[int]] = {}
        self.redirects: dict[str, str] = {}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.retry_after = ""
        self.listed: dict[str, int] = {}
        self.commit = COMMIT
        self.drip = 0
        self.hold: threading.Event | None = None
        self.hold_all = False
        self.holding = threading.Event()
        self.never = threading.Event()
        self.url = ""

    def ranges_asked(self) -> list[str]:
        """The Range headers of all GETs, "" where there was none."""
        return [asked["range"] for asked in self.asked if asked["method"] == "GET"]


def lfs(name: str) -> bool:
    """Whether a hub would keep this file in LFS (large) or in git itself."""
    return name.endswith((".gguf", ".onnx", ".bin", ".safetensors"))


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        site = self.site
        site.asked.append(
            {
                "method": self.command,
                "path": path,
                "range": self.headers.get("Range", ""),
                "if-range": self.headers.get("If-Range", ""),
                "authorization": self.headers.get("Authorization", ""),
            }
        )
        if statuses := site.status.get(path):
            extra = {"Retry-After": site.retry_after} if site.retry_after else {}
            self._say(statuses.pop(0), b"not now", **extra)
        elif path in site.redirects:
            self._say(302, b"", Location=site.redirects[path])
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._resolve(path)
        elif path in site.files:
            self._file(site.files[path], path)
        else:
            self._say(404, b"no such file")

    # ---- hub

    def _api(self, rest: str) -> None:
        repo = "/".join(rest.split("/")[:2])
        if refusal := self._refusal(repo):
            self._say(*refusal)
            return
        files = self.site.repos[repo]
        if "/revision/" in rest or rest == repo:
            if "/revision/" in rest and rest.rsplit("/", 1)[1] not in ("main", self.site.commit):
                self._say(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in files]
            self._json(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": self.site.commit,
                    "private": False,
                    "tags": [],
                    "siblings": siblings,
                }
            )
        elif "/tree/" in rest:
            self._json([self._entry(name, data) for name, data in files.items()])
        else:
            self._say(404, b"{}")

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.site.listed.get(name, len(data))
        found: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
        if lfs(name):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return found

    def _refusal(self, repo: str) -> tuple[int, bytes] | None:
        if repo not in self.site.repos:
            self._code = "RepoNotFound"
            return 401, b"{}"
        if repo in self.site.gated and "Authorization" not in self.headers:
            self._code = "GatedRepo"
            return 403, b"{}"
        return None

    def _resolve(self, path: str) -> None:
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if refusal := self._refusal(repo):
            self._say(*refusal)
            return
        if revision not in ("main", self.site.commit):
            self._say(404, b"", **{"X-Error-Code": "RevisionNotFound"})
            return
        if name not in self.site.repos[repo]:
            self._say(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        self._file(self.site.repos[repo][name], path, **{"X-Repo-Commit": self.site.commit})

    # ---- files

    def _file(self, data: bytes, path: str, **headers: str) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.site.etags:
            headers["ETag"] = etag
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        fresh = self.headers.get("If-Range", etag) == etag
        if wanted and self.site.ranges and fresh:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                self._say(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        cuts = self.site.cut_after.get(path, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is None and self.site.drip:
            for at in range(0, len(body), self.site.drip):
                self.wfile.write(body[at : at + self.site.drip])
                self.site.never.wait(0.005)
            return
        if cut is None:
            half = 0
            if self.site.hold is not None and self.site.hold_all:
                half = len(body) // 2
                self.wfile.write(body[:half])
                self.wfile.flush()
                self.site.holding.set()
                self.site.hold.wait(60)
            self.wfile.write(body[half:])
            return
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if self.site.hold is not None:
            self.site.holding.set()
            self.site.hold.wait(60)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    _code = ""

    def _json(self, value: Any) -> None:
        self._say(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        if self._code:
            headers["X-Error-Code"] = self._code
            headers["X-Error-Message"] = self._code
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_args: Any) -> None:
        """Cut connections are what these tests are about."""


@contextlib.contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` on a free loopback port until the block ends."""
    answer = type("Answer", (_Answer,), {"site": site})
    with _Server(("127.0.0.1", 0), answer) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            if site.hold is not None:
                site.hold.set()
            server.shutdown()
            thread.join(60)
