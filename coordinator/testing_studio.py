"""A shipped fake: a studio worker whose every frame a test writes, over real HTTP and a real WebSocket.

It keeps no rule of the contract by itself, so that a test can break each. Needs the extra `coordinator`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import socket
import time
from types import TracebackType
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from coordinator.studio.wire import SUBPROTOCOL

PATIENCE_S = 60.0
BASE = "/graphics/api"


def capabilities(tag: str = "a", **more: Any) -> dict[str, Any]:
    """Of a worker that serves one model of each kind, `{tag}-{kind}`."""
    kinds = ("image", "llm", "audio_stt", "audio_tts", "video")
    return {
        "machineName": "studio-box",
        "username": "someone",
        "agentVersion": "0.4.5",
        "engine": "multi",
        "vramTotalGb": 24,
        "vramThresholdGb": 16,
        "autoEnabled": True,
        "autoStart": False,
        "supportedModels": [f"{tag}-{kind}" for kind in kinds],
        "taskKinds": list(kinds),
        "supportedModelsPerKind": {kind: [f"{tag}-{kind}"] for kind in kinds},
        **more,
    }


class Admitted:
    """A worker that an admin has let in: its id and its token of now."""

    def __init__(self, url: str, admin_key: str, base: str = BASE, **said: Any) -> None:
        """Register, be approved, poll. `url` is the coordinator's, `base` what stands before `/workers`."""
        self.url, self.base, self.said = url, base, capabilities(**said)
        self.secret = secrets.token_hex(32)
        self.install = f"install-{secrets.token_hex(8)}"
        self.request = register(url, self.install, self.secret, self.said, base).json()["requestId"]
        admin = {"authorization": f"Bearer {admin_key}"}
        httpx.post(
            f"{url}/v1/registrations/{self.request}/approve", headers=admin, timeout=PATIENCE_S
        ).raise_for_status()
        self.poll()

    def poll(self) -> None:
        """Get another token; the one before is good no more."""
        polled = poll(self.url, self.request, self.secret, self.base).json()
        self.id, self.token = polled["workerId"], polled["authToken"]

    @property
    def headers(self) -> dict[str, str]:
        """What it proves itself by."""
        return {"authorization": f"Bearer {self.token}"}

    def upload(
        self,
        job: str,
        data: bytes,
        *,
        ext: str = "png",
        fields: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Deliver a file as the contract says."""
        texts = {"prompt": "a prompt", "ext": ext} if fields is None else fields
        files = {"image": (f"{job}.{ext}", data, "application/octet-stream")}
        return self.post(job, data=texts, files=files, headers=headers or self.headers)

    def post(self, job: str, **request: Any) -> httpx.Response:
        """POST anything to where files go."""
        url = f"{self.url}{self.base}/workers/{self.id}/jobs/{job}/complete"
        return httpx.post(url, timeout=PATIENCE_S, **{"headers": self.headers, **request})

    def open(self, **options: Any) -> StudioSocket:
        """A socket, not greeted yet."""
        return StudioSocket(self, **options)

    def session(self, **said: Any) -> StudioSocket:
        """A socket on which welcome was said."""
        opened = self.open()
        opened.hello(**said)
        return opened


def register(url: str, install: str, secret: str, said: dict[str, Any], base: str = BASE) -> httpx.Response:
    """Ask to be admitted."""
    body = {
        "installId": install,
        "registrationSecretHash": hashlib.sha256(secret.encode()).hexdigest(),
        "capabilities": said,
        "userAgent": "studio-worker/0.4.5",
    }
    return httpx.post(f"{url}{base}/workers/register-request", json=body, timeout=PATIENCE_S)


def poll(url: str, request: str, secret: str, base: str = BASE) -> httpx.Response:
    """Ask how a request stands."""
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.get(f"{url}{base}/workers/register-requests/{request}", headers=headers, timeout=PATIENCE_S)


class StudioSocket:
    """The worker's end of a session. Every wait is bounded by `PATIENCE_S`; use it as a context manager."""

    def __init__(self, worker: Admitted, *, token: str | None = None, subprotocol: str | None = SUBPROTOCOL) -> None:
        """Connect. Raises websockets' InvalidStatus when the upgrade is refused."""
        self.worker = worker
        headers = {"authorization": f"Bearer {worker.token if token is None else token}"}
        self._exits = contextlib.ExitStack()
        self.socket: ClientConnection = self._exits.enter_context(
            connect(
                f"{worker.url.replace('http', 'ws', 1)}{worker.base}/workers/{worker.id}/connect",
                subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
                additional_headers=headers,
                compression=None,
                proxy=None,
                open_timeout=PATIENCE_S,
                close_timeout=1,
            )
        )

    def hello(self, **said: Any) -> dict[str, Any]:
        """Greet, and return the welcome."""
        self.send("hello", authToken=self.worker.token, capabilities={**self.worker.said, **said})
        return self.expect("welcome")

    def send(self, type_: str, **fields: Any) -> None:
        """Send one frame."""
        self.socket.send(json.dumps({"type": type_, **fields}))

    def beat(self, **said: Any) -> dict[str, Any]:
        """One heartbeat and its acknowledgement; `currentJobId` may be among the words."""
        fields = {"currentJobId": said.pop("currentJobId")} if "currentJobId" in said else {}
        self.send("heartbeat", capabilities={**self.worker.said, **said}, **fields)
        return self.expect("heartbeatAck")

    def receive(self, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Next frame. Raises TimeoutError, ConnectionClosed."""
        frame: dict[str, Any] = json.loads(self.socket.recv(timeout))
        return frame

    def expect(self, type_: str) -> dict[str, Any]:
        """Next frame, which must be of this type."""
        frame = self.receive()
        if frame["type"] != type_:
            raise AssertionError(f"expected {type_}, got {frame}")
        return frame

    def claim(self, *, accept: bool = True) -> dict[str, Any]:
        """The next offer's claim, accepted."""
        claim: dict[str, Any] = self.expect("offer")["claim"]
        if accept:
            self.send("accept", jobId=claim["jobId"])
        return claim

    def quiet(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes for so long."""
        try:
            self.receive(seconds)
        except TimeoutError:
            return True
        return False

    def ending(self) -> tuple[str | None, int]:
        """Read to the end: the last error's code, and the close code."""
        error, until = None, time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                frame = self.receive()
            except ConnectionClosed as closed:
                return error, closed.rcvd.code if closed.rcvd else 1006
            if frame["type"] == "error":
                error = frame["code"]
        raise TimeoutError("the session did not end")

    def drop(self) -> None:
        """Lose the connection without a word."""
        with contextlib.suppress(OSError):
            self.socket.socket.shutdown(socket.SHUT_RDWR)
        self._exits.close()

    def __enter__(self) -> StudioSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
