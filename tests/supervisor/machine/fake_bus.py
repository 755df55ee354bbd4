"""A private bus (the real dbus-daemon) with services on it that answer from a table.

Its marshalling is written apart from that of `supervisor.machine.dbus`, so that a mistake of one is no habit of both;
and the daemon in between judges every message by the book.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>
"""

# (interface, member, first arguments…) -> signature and values of the answer, or an Error.
Table = Mapping[tuple[str, ...], Any]


class Error(str):
    """Answers with an error of this text."""

    __slots__ = ()


@contextlib.contextmanager
def private_bus(folder: Path) -> Iterator[str]:
    """The address of a bus of our own; skips the test where there is no daemon."""
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.skip("dbus-daemon is not installed")
    config = folder / "bus.conf"
    config.write_text(CONFIG.format(socket=folder / "bus"))
    argv = [program, f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            yield daemon.stdout.readline().strip()
        finally:
            daemon.terminate()


def align(size: int, data: bytes) -> bytes:
    return data + bytes(-len(data) % size)


def first_type(signature: str) -> tuple[str, str]:
    if signature[0] == "a":
        inner, rest = first_type(signature[1:])
        return f"a{inner}", rest
    if signature[0] in "({":
        level = 0
        for number, letter in enumerate(signature, 1):
            level += {"(": 1, "{": 1, ")": -1, "}": -1}.get(letter, 0)
            if not level:
                return signature[:number], signature[number:]
    return signature[0], signature[1:]


def pack(signature: str, values: tuple[Any, ...], data: bytes = b"") -> bytes:
    """Append values to what is there (alignment counts from its beginning)."""
    for value in values:
        kind, signature = first_type(signature)
        data = pack_one(kind, value, data)
    assert not signature
    return data


def pack_one(kind: str, value: Any, data: bytes) -> bytes:
    if kind in "so":
        raw = value.encode()
        return align(4, data) + struct.pack("<I", len(raw)) + raw + b"\0"
    if kind == "g":
        return data + bytes([len(value)]) + value.encode() + b"\0"
    if kind == "v":
        return pack(value[0], (value[1],), pack_one("g", value[0], data))
    if kind[0] == "a":
        start = align(4, data) + bytes(4)
        first = align(8 if kind[1] in "({xtd" else 4 if kind[1] in "suioba" else 1, start)
        whole = first
        for item in value.items() if isinstance(value, dict) else value:
            whole = pack_one(kind[1:], item, whole)
        return whole[: len(start) - 4] + struct.pack("<I", len(whole) - len(first)) + whole[len(start) :]
    if kind[0] in "({":
        return pack(kind[1:-1], tuple(value), align(8, data))
    form = {"b": "I", "y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}[kind]
    size = struct.calcsize(form)
    return align(size, data) + struct.pack(f"<{form}", value)


def message(
    kind: int, serial: int, fields: list[tuple[int, str, Any]], signature: str, values: tuple[Any, ...]
) -> bytes:
    body = pack(signature, values)
    if signature:
        fields = [*fields, (8, "g", signature)]
    listed = [(number, (code, value)) for number, code, value in fields]
    head = pack("yyyyuua(yv)", (ord("l"), kind, 1, 1, len(body), serial, listed))
    return align(8, head) + body


class Service:
    """Owns names on a bus and answers calls from a table that the test may change at any time."""

    def __init__(self, address: str, *names: str) -> None:
        self._path = address.split("path=")[1].split(",")[0]
        self._names = names
        self.table: dict[tuple[str, ...], Any] = {}
        self.calls: list[tuple[str, ...]] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        stream = await trio.open_unix_socket(self._path)
        async with stream:
            await stream.send_all(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
            assert (await stream.receive_some(4096)).startswith(b"OK")
            bus = "org.freedesktop.DBus"
            to_bus = [(1, "o", "/org/freedesktop/DBus"), (2, "s", bus), (6, "s", bus)]
            hello = message(1, 1, [*to_bus, (3, "s", "Hello")], "", ())
            own = [
                message(1, 2 + number, [*to_bus, (3, "s", "RequestName")], "su", (name, 0))
                for number, name in enumerate(self._names)
            ]
            await stream.send_all(b"BEGIN\r\n" + hello + b"".join(own))
            buffer, answered, serial = b"", 0, 100
            while True:
                buffer += await stream.receive_some(65536)
                while len(buffer) >= 16:
                    body, _, fields = struct.unpack_from("<III", buffer, 4)
                    size = 16 + fields + -fields % 8 + body
                    if len(buffer) < size:
                        break
                    found, buffer = buffer[:size], buffer[size:]
                    if found[1] == 2:
                        answered += 1
                        if answered == 1 + len(own):
                            task_status.started()
                    if found[1] == 1:
                        serial += 1
                        await stream.send_all(self._answer(found, serial))

    def _answer(self, found: bytes, serial: int) -> bytes:
        call = _strings(found)
        to = [(5, "u", struct.unpack_from("<I", found, 8)[0]), (6, "s", call["sender"])]
        key = (call["path"], call["interface"], call["member"], *call["arguments"])
        self.calls.append(key)
        value = self.table.get(key, self.table.get(key[1:], Error("there is no such method")))
        if isinstance(value, Error):
            name = "org.freedesktop.DBus.Error.UnknownMethod"
            return message(3, serial, [*to, (4, "s", name)], "s", (str(value),))
        signature, values = value
        return message(2, serial, to, signature, values)


def _strings(data: bytes) -> dict[str, Any]:
    """Header fields and arguments of a call whose arguments are strings and numbers."""
    (length,) = struct.unpack_from("<I", data, 12)
    at, fields = 16, {}
    while at < 16 + length:
        at += -at % 8
        number, size = data[at], data[at + 1]
        code = data[at + 2 : at + 2 + size].decode()
        at += 3 + size
        if code == "g":
            fields[number] = data[at + 1 : at + 1 + data[at]].decode()
            at += data[at] + 2
        else:
            at += -at % 4
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
            if code != "u":
                fields[number] = data[at : at + size].decode()
                at += size + 1
    at += -at % 8
    arguments = []
    for code in fields.get(8, ""):
        at += -at % 4
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if code == "u":
            arguments.append(str(size))
        else:
            arguments.append(data[at : at + size].decode())
            at += size + 1
    names = {1: "path", 2: "interface", 3: "member", 7: "sender"}
    return {names[number]: value for number, value in fields.items() if number in names} | {"arguments": arguments}


@contextlib.contextmanager
def deaf_socket(path: Path) -> Iterator[str]:
    """The address of a socket that accepts connections and never says a word."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"unix:path={path}"
