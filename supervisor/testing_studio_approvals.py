"""How workers get into the studio for tests: requests, their approval, and tokens."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import msgspec
import trio

from supervisor.testing_studio_http import Exchange


class Approvals:
    """See the module.

    Attributes:
        requests: by id: what was asked, with `status` and `polls`.
        workers: id -> the token that is good now.
        minted: tokens so far.
        approving: requests are approved as they come.
        create_status: answers the next requests, when it is not 0.
        most_requests: from one address within 60 s.
    """

    def __init__(self, most_requests: int) -> None:
        self.requests: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, str] = {}
        self.minted = 0
        self.approving = False
        self.create_status = 0
        self.most_requests = most_requests
        self._asked: dict[str, list[float]] = {}

    def tell(self) -> None:
        """Something changed."""

    def approve(self, request: str) -> None:
        """Let a worker in."""
        self.requests[request]["status"] = "approved"
        self.tell()

    def reject(self, request: str, reason: str = "") -> None:
        """Do not."""
        self.requests[request] |= {"status": "rejected", "reason": reason}
        self.tell()

    def create(self, asked: Exchange) -> tuple[int, Any]:
        """A request for registration."""
        if self.create_status:
            return self.create_status, {}
        body = msgspec.json.decode(asked.body)
        now = trio.current_time()
        lately = self._asked.setdefault("loopback", [])
        lately[:] = [when for when in lately if now - when < 60] + [now]
        if len(lately) > self.most_requests:
            return 429, {"error": "rate limited"}
        if len(body["registrationSecretHash"]) != 64 or not body["capabilities"]["machineName"]:
            return 400, {"error": "bad request"}
        for request, known in self.requests.items():
            if known["installId"] == body["installId"] and known["status"] == "pending":
                return 200, {"requestId": request, "status": "pending"}
        request = f"rr-{secrets.token_hex(4)}"
        self.requests[request] = {**body, "status": "approved" if self.approving else "pending", "polls": 0}
        self.tell()
        return 201, {"requestId": request, "status": "pending"}

    def poll(self, request: str, secret: str) -> tuple[int, Any]:
        """What became of one."""
        known = self.requests.get(request)
        if known is None:
            return 404, {"error": "unknown request"}
        if hashlib.sha256(secret.encode()).hexdigest() != known["registrationSecretHash"]:
            return 401, {"error": "wrong secret"}
        known["polls"] += 1
        self.tell()
        if known["status"] == "approved":
            worker = known.setdefault("workerId", f"w-{secrets.token_hex(4)}")
            self.minted += 1
            self.workers[worker] = secrets.token_hex(16)  # and the one before is worth nothing any more
            return 200, {"status": "approved", "workerId": worker, "authToken": self.workers[worker]}
        return 200, {key: known[key] for key in ("status", "reason") if key in known}
