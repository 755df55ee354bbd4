"""A GOLIAT dashboard for tests: both protocols of its contract over real HTTP on loopback, and its bad moments.

It does what the real one does, bad habits included: a claim is an unconditional write, each upload deletes what an
earlier one brought, `finished` completes the first that this machine runs, `fatal_error` leaves an assignment as it is.
"""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import itertools
import json
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import h11
import msgspec
import trio

MAX_BODY_BYTES = 256 * 2**20


class Answer(NamedTuple):
    """What goes back. `body`: bytes as they are, anything else as JSON."""

    status: int
    body: object = b""
    headers: tuple[tuple[str, str], ...] = ()


class Told(NamedTuple):
    """One gui-update. `at`: trio time of its arrival."""

    machine: str
    message: dict[str, Any]
    at: float


class Part(msgspec.Struct, kw_only=True):
    """An assignment as the dashboard has it."""

    id: str
    index: int = 0
    config: Any = None
    status: str = "PENDING"
    worker: str | None = None
    files: dict[str, bytes] = {}
    relative_path: str = ""
    uploads: int = 0

    def row(self) -> dict[str, Any]:
        """As it is listed."""
        return {
            "id": self.id,
            "index": self.index,
            "workerId": self.worker,
            "splitConfig": self.config,
            "status": self.status,
            "progress": 100 if self.status == "COMPLETED" else 0,
        }


class Dashboard:
    """See the module.

    Attributes:
        url: where it answers.
        away: connections are closed without an answer.
        studies: id -> (name, its assignments).
        queue: what the planned protocol gives next: the whole reply, in either shape.
        configs: path below /configs/ -> file.
        workers: machine -> {id, status, beats}.
        told: every gui-update that was acknowledged, in order.
        bodies: what every heartbeat said.
        asked: (method, path) of every request that was answered.
        stumbles: path -> answers to give instead, each once; `drop` closes the connection after having acted.
        before: path -> called before a request is acted on.
    """

    def __init__(self) -> None:
        self.url = ""
        self.away = False
        self.studies: dict[str, tuple[str, list[Part]]] = {}
        self.queue: list[Any] = []
        self.configs: dict[str, bytes] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.told: list[Told] = []
        self.bodies: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.stumbles: dict[str, list[Answer | str]] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._changed = trio.Event()

    # ---- for tests

    def study(self, name: str, *configs: Any) -> list[Part]:
        """Put up a super-study; its assignments."""
        number = next(self._numbers)
        parts = [Part(id=f"a{number}-{index}", index=index, config=config) for index, config in enumerate(configs)]
        self.studies[f"s{number}"] = (name, parts)
        return parts

    def give(self, id_: str, config: bytes, *, flat: bool = False) -> None:
        """Put an assignment into the queue of the planned protocol."""
        self.configs[id_] = config
        inner = {"split_index": 0, "config_url": f"{self.url}/configs/{id_}"}
        if flat:
            self.queue.append({**inner, "config": f"{id_}.json", "id": id_})
        else:
            more = {"id": id_, "super_study_id": "s", "created_at": "2026-01-01T00:00:00Z"}
            self.queue.append({"assigned": True, "assignment": {**inner, **more}})

    def part(self, id_: str) -> Part | None:
        """An assignment by its id."""
        return next((part for _name, parts in self.studies.values() for part in parts if part.id == id_), None)

    def messages(self, *types: str) -> list[dict[str, Any]]:
        """What was told, of these types."""
        return [told.message for told in list(self.told) if told.message["type"] in types]

    def ends(self) -> list[str]:
        """The types of all messages that say how a study ended."""
        return [message["type"] for message in self.messages("finished", "fatal_error")]

    def lines(self) -> list[str]:
        """Every log line that was told."""
        return [line["message"] for message in self.messages("log_batch") for line in message["logs"]]

    async def until(self, true: Callable[[], Any], patience_s: float = 30.0) -> Any:
        """Wait for something that a request brings about; returns its value."""
        with trio.fail_after(patience_s):
            while not (value := true()):
                changed = self._changed
                await changed.wait()
        return value

    # ---- HTTP

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        async with stream:
            connection = h11.Connection(h11.SERVER)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                while not self.away and await self._exchange(connection, stream):
                    connection.start_next_cycle()

    async def _exchange(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        request, body = None, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(2**16)))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                assert len(body) < MAX_BODY_BYTES
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        if self.away:
            return False
        answer = self._answer(request, bytes(body))
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        if answer is None:
            return False
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = [("content-length", str(len(content))), ("content-type", "application/json"), *answer.headers]
        data = connection.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        data += connection.send(h11.Data(data=content)) or b""
        await stream.send_all(data + (connection.send(h11.EndOfMessage()) or b""))
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    def _answer(self, request: h11.Request, body: bytes) -> Answer | None:
        """None: the connection is closed instead."""
        method, target = request.method.decode(), request.target.decode()
        path, _, query = target.partition("?")
        self.asked.append((method, path))
        if act := self.before.get(path):
            act()
        stumble = queue.pop(0) if (queue := self.stumbles.get(path)) else None
        if isinstance(stumble, Answer):
            return stumble
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        fields = dict(urllib.parse.parse_qsl(query))
        answer = self._routed(method, path.strip("/").split("/"), fields, headers.get("content-type", ""), body)
        return None if stumble == "drop" else answer

    def _routed(self, method: str, path: list[str], query: dict[str, str], kind: str, body: bytes) -> Answer:
        match method, path:
            case "GET", ["configs", name] if name in self.configs:
                return Answer(200, self.configs[name])
            case "POST", ["api", "heartbeat"]:
                return self._heartbeat(_json(body))
            case "GET", ["api", "heartbeat"]:
                row = self.workers.get(query.get("ipAddress", ""))
                return Answer(200, {**row, "isOffline": False}) if row else _error(404, "NOT_FOUND")
            case "GET", ["api", "assignment"]:
                if "machineId" not in query:
                    return _error(400, "INVALID_REQUEST")
                return Answer(200, self.queue.pop(0) if self.queue else {"assigned": False})
            case "POST", ["api", "gui-update"]:
                return self._update(_json(body))
            case "GET", ["api", "super-studies"]:
                return Answer(200, [self._study(id_) for id_ in reversed(self.studies) if self._named(id_, query)])
            case "GET", ["api", "super-studies", id_, "assignments"] if id_ in self.studies:
                return Answer(200, [part.row() for part in self.studies[id_][1]])
            case "POST", ["api", "assignments", id_, "claim"]:
                return self._claim(id_, _json(body))
            case "POST", ["api", "assignments", id_, "results"]:
                return self._results(id_, kind, body)
            case _:
                return _error(404, "NOT_FOUND")

    # ---- what it does

    def _named(self, id_: str, query: dict[str, str]) -> bool:
        return "name" not in query or query["name"] in self.studies[id_][0]

    def _study(self, id_: str) -> dict[str, Any]:
        name, parts = self.studies[id_]
        done = sum(part.status == "COMPLETED" for part in parts)
        status = "COMPLETED" if parts and done == len(parts) else "RUNNING"
        listed = [{"id": part.id, "status": part.status, "workerId": part.worker} for part in parts]
        return {"id": id_, "name": name, "status": status, "totalAssignments": len(parts), "assignments": listed}

    def _heartbeat(self, body: Any) -> Answer:
        machine = body.get("machineId") or body.get("ipAddress") if isinstance(body, dict) else None
        if not machine:
            return _error(400, "INVALID_REQUEST")
        self.bodies.append(body)
        self._worker(machine)["beats"] += 1
        return Answer(200, {"success": True, "timestamp": "2026-01-01T00:00:00Z"})

    def _worker(self, machine: str) -> dict[str, Any]:
        fresh = {"id": f"w-{len(self.workers) + 1}", "status": "IDLE", "beats": 0}
        return self.workers.setdefault(machine, fresh)

    def _update(self, body: Any) -> Answer:
        message = body.get("message") if isinstance(body, dict) else None
        if not isinstance(message, dict) or not body.get("machineId") or not message.get("type"):
            return _error(400, "INVALID_REQUEST")
        worker = self._worker(body["machineId"])
        self.told.append(Told(body["machineId"], message, trio.current_time()))
        if message["type"] == "finished":
            worker["status"] = "IDLE"
            parts = [part for _name, parts in self.studies.values() for part in parts]
            mine = [part for part in parts if part.worker == worker["id"] and part.status == "RUNNING"]
            if mine:  # whichever it finds first: a message names the machine alone
                mine[0].status = "COMPLETED"
        elif message["type"] == "fatal_error":
            worker["status"] = "ERROR"
        elif message["type"].endswith("_progress"):
            worker["status"] = "RUNNING"
        return Answer(200, {"success": True})

    def _claim(self, id_: str, body: Any) -> Answer:
        part = self.part(id_)
        if not isinstance(body, dict) or not body.get("machineId"):
            return _error(400, "INVALID_REQUEST")
        if part is None:
            return _error(500, "INTERNAL_ERROR")
        part.status, part.worker = "RUNNING", self._worker(body["machineId"])["id"]
        return Answer(200, part.row())

    def _results(self, id_: str, kind: str, body: bytes) -> Answer:
        part = self.part(id_)
        if part is None:
            return _error(404, "NOT_FOUND")
        raw = f"Content-Type: {kind}\r\n\r\n".encode() + body
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(raw)
        files: dict[str, bytes] = {}
        for field in form.iter_parts():
            content = field.get_payload(decode=True)
            assert isinstance(content, bytes)
            match field.get_param("name", header="content-disposition"):
                case "files":
                    files[str(field.get_filename())] = content
                case "relativePath":
                    part.relative_path = content.decode()
        if not files:
            return _error(400, "INVALID_REQUEST")
        part.files, part.uploads = files, part.uploads + 1
        return Answer(200, {"success": True, "filesUploaded": len(files), "files": sorted(files)})


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _error(status: int, code: str) -> Answer:
    return Answer(status, {"error": code.replace("_", " ").lower(), "code": code})


@contextlib.asynccontextmanager
async def open_dashboard(port: int = 0) -> AsyncIterator[Dashboard]:
    """A dashboard on a port of loopback."""
    dashboard = Dashboard()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        dashboard.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, dashboard.serve, listeners)
        yield dashboard
        nursery.cancel_scope.cancel()
