"""A GOLIAT dashboard for tests: both protocols of its contract over real HTTP on loopback, and its bad moments.

It does what the real one does, bad habits included: a claim is an unconditional write, each upload deletes what an
earlier one brought, `finished` completes the first that this machine runs, `fatal_error` leaves an assignment as it is,
a machine that was silent for long is a new worker (testing_goliat_rows.py), and who deletes a worker has all of its
assignments done again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import h11
import trio

from supervisor.testing_goliat_files import archive, form, tree
from supervisor.testing_goliat_rows import Part, WorkerRow, Workers

__all__ = ["Answer", "Dashboard", "Part", "Told", "WorkerRow", "open_dashboard"]

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


class Dashboard:
    """See the module.

    Attributes:
        url: where it answers.
        away: connections are closed without an answer.
        studies: id -> (name, its assignments).
        queue: what the planned protocol gives next: the whole reply, in either shape.
        configs: path below /configs/ -> file.
        later_s: how far its clock is ahead of trio's: more, and rows become stale.
        known: its workers, and which of them a machine is.
        told: every gui-update that was acknowledged, in order.
        bodies: what every heartbeat said.
        screenshots: machine -> tab -> picture.
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
        self.later_s = 0.0
        self.known = Workers(lambda: trio.current_time() + self.later_s, lambda id_: bool(self._running(id_)))
        self.told: list[Told] = []
        self.bodies: list[dict[str, Any]] = []
        self.screenshots: dict[str, dict[str, bytes]] = {}
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
        """Put an assignment into the queue of the planned protocol. `flat`: in the shape that knows no id."""
        self.configs[id_] = config
        inner = {"split_index": 0, "config_url": f"{self.url}/configs/{id_}"}
        if flat:
            self.queue.append({**inner, "config": f"{id_}.json"})
        else:
            more = {"id": id_, "super_study_id": "s", "created_at": "2026-01-01T00:00:00Z"}
            self.queue.append({"assigned": True, "assignment": {**inner, **more}})

    @property
    def parts(self) -> list[Part]:
        """The assignments of all studies."""
        return [part for _name, parts in self.studies.values() for part in parts]

    def part(self, id_: str) -> Part | None:
        """An assignment by its id."""
        return next((part for part in self.parts if part.id == id_), None)

    @property
    def workers(self) -> dict[str, WorkerRow]:
        """Machine -> its newest row."""
        return {row.machine: row for row in self.known.rows}

    def messages(self, *types: str) -> list[dict[str, Any]]:
        """What was told, of these types."""
        return [told.message for told in list(self.told) if told.message["type"] in types]

    def ends(self) -> list[str]:
        """The types of all messages that say how a study ended."""
        return [message["type"] for message in self.messages("finished", "fatal_error")]

    def lines(self) -> list[str]:
        """Every log line that was told."""
        return [line["message"] for message in self.messages("log_batch") for line in message["logs"]]

    async def until(self, true: Callable[[], Any], patience_s: float = 60.0) -> Any:
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
        headers = [("content-length", str(len(content))), *answer.headers]
        if "content-type" not in dict(answer.headers):
            headers.append(("content-type", "application/json"))
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
                known = self.known.of(query.get("ipAddress", ""))
                return Answer(200, self.known.shown(known)) if known else _error(404, "NOT_FOUND")
            case "GET", ["api", "assignment"]:
                if "machineId" not in query:
                    return _error(400, "INVALID_REQUEST")
                return Answer(200, self.queue.pop(0) if self.queue else {"assigned": False})
            case "POST", ["api", "gui-update"]:
                return self._update(_json(body))
            case "POST", ["api", "gui-screenshots"]:
                return self._pictures(kind, body)
            case "GET", ["api", "super-studies"]:
                return Answer(200, [self._study(id_) for id_ in reversed(self.studies) if self._named(id_, query)])
            case "POST", ["api", "super-studies"]:
                return self._put_up(_json(body))
            case "GET", ["api", "super-studies", id_, "assignments"]:  # a study that it does not know has none
                return Answer(200, [part.row() for part in self.studies.get(id_, ("", []))[1]])
            case "GET", ["api", "super-studies", id_, "results", what] if id_ in self.studies:
                return self._brought(id_, what, query)
            case _, ["api", "workers", *rest]:
                return self._workers(method, rest, query)
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
        idle = all(part.status == "PENDING" for part in parts)
        return {
            "id": id_,
            "name": name,
            "status": "COMPLETED" if parts and done == len(parts) else "PENDING" if idle else "RUNNING",
            "totalAssignments": len(parts),
            "completedAssignments": done,
            "masterProgress": 100 * done / len(parts) if parts else 0,
            "assignments": [{"id": part.id, "status": part.status, "workerId": part.worker} for part in parts],
        }

    def _put_up(self, body: Any) -> Answer:
        given = body.get("assignments") if isinstance(body, dict) else None
        if not isinstance(given, list) or not body.get("name") or not all(isinstance(each, dict) for each in given):
            return _error(400, "INVALID_REQUEST")
        parts = self.study(body["name"], *(each.get("splitConfig") for each in given))
        for part, each in zip(parts, given, strict=True):
            part.status = each.get("status", "PENDING")
        return Answer(200, self._study(next(reversed(self.studies))))

    def _brought(self, id_: str, what: str, query: dict[str, str]) -> Answer:
        parts = [part for part in self.studies[id_][1] if part.files]
        files = {
            f"{part.relative_path}/{name}".lstrip("/"): data for part in parts for name, data in part.files.items()
        }
        match what:
            case "list" if files:
                return Answer(200, {"tree": tree(files), "totalFiles": len(files)})
            case "download" if files:
                return Answer(200, archive(files), (("content-type", "application/zip"),))
            case "file" if "path" not in query:
                return _error(400, "INVALID_REQUEST")
            case "file" if query["path"] in files:
                return Answer(200, files[query["path"]], (("content-type", "application/octet-stream"),))
            case _:
                return _error(404, "NOT_FOUND")

    def _workers(self, method: str, path: list[str], query: dict[str, str]) -> Answer:
        stale = query.get("includeStale") == "true"
        if method == "GET" and not path:
            rows = sorted(self.known.rows, key=lambda row: row.seen, reverse=True)
            return Answer(200, [self.known.shown(row) for row in rows if stale or not self.known.stale(row)])
        row = next((row for row in self.known.rows if path == [row.id]), None)
        if row is None or method not in ("GET", "DELETE"):
            return _error(404, "NOT_FOUND")
        if method == "GET":
            return Answer(200, {"worker": self.known.shown(row)})
        self.known.rows.remove(row)
        for part in self.parts:
            if part.worker == row.id:  # what was COMPLETED, too
                part.status, part.worker = "PENDING", None
        return Answer(200, {"success": True})

    def _running(self, worker: str) -> list[Part]:
        return [part for part in self.parts if part.worker == worker and part.status == "RUNNING"]

    def _heartbeat(self, body: Any) -> Answer:
        machine = body.get("machineId") or body.get("ipAddress") if isinstance(body, dict) else None
        if not machine:
            return _error(400, "INVALID_REQUEST")
        self.bodies.append(body)
        self.known.meet(machine, body.get("hostname") or "").beats += 1
        return Answer(200, {"success": True, "timestamp": "2026-01-01T00:00:00Z"})

    def _update(self, body: Any) -> Answer:
        message = body.get("message") if isinstance(body, dict) else None
        if not isinstance(message, dict) or not body.get("machineId") or not message.get("type"):
            return _error(400, "INVALID_REQUEST")
        worker = self.known.meet(body["machineId"])
        self.told.append(Told(body["machineId"], message, trio.current_time()))
        if message["type"] == "finished":
            worker.status = "IDLE"
            if mine := self._running(worker.id):  # whichever it finds first: a message names the machine alone
                mine[0].status = "COMPLETED"
        elif message["type"] == "fatal_error":
            worker.status = "ERROR"
        elif message["type"].endswith("_progress"):
            worker.status = "RUNNING"
        return Answer(200, {"success": True})

    def _claim(self, id_: str, body: Any) -> Answer:
        part = self.part(id_)
        if not isinstance(body, dict) or not body.get("machineId"):
            return _error(400, "INVALID_REQUEST")
        if part is None:
            return _error(500, "INTERNAL_ERROR")
        part.status, part.worker = "RUNNING", self.known.meet(body["machineId"]).id
        return Answer(200, part.row())

    def _results(self, id_: str, kind: str, body: bytes) -> Answer:
        part = self.part(id_)
        if part is None:
            return _error(404, "NOT_FOUND")
        fields = form(kind, body)
        files = {field.filename: field.content for field in fields if field.name == "files"}
        part.relative_path = next((each.content.decode() for each in fields if each.name == "relativePath"), "")
        if not files:
            return _error(400, "INVALID_REQUEST")
        part.files, part.uploads = files, part.uploads + 1
        return Answer(200, {"success": True, "filesUploaded": len(files), "files": sorted(files)})

    def _pictures(self, kind: str, body: bytes) -> Answer:
        fields = form(kind, body)
        machine = next((each.content.decode() for each in fields if each.name == "machineId"), "")
        if not machine:
            return _error(400, "INVALID_REQUEST")
        self.known.meet(machine)
        self.screenshots.setdefault(machine, {}).update({each.name: each.content for each in fields if each.filename})
        return Answer(200, {"success": True})


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
