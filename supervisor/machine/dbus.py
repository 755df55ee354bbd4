"""A small D-Bus client: method calls with plain arguments, on trio, without a library.

Enough to ask the system what it knows of sessions, inhibitors and the network, and no more: no signals, no objects
of our own, no descriptors. The format is that of the D-Bus specification, "Message Protocol"; every value lies at a
multiple of its size, counted from the beginning of the message, and structs and dict entries at multiples of eight.

One task uses a `Bus`. It connects at its first call and again after an error, because a bus may be restarted. What
comes from a bus is judged before it is believed: lengths against what is there, nesting against a bound.
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple
from urllib.parse import unquote

import trio

SYSTEM = "unix:path=/run/dbus/system_bus_socket"
CALL_S = 2.0  # these are questions to services on this machine; presence is asked for every other second
MAX_MESSAGE_BYTES = 2**20  # the specification allows 128 MiB; a list of inhibitors has a few KiB
_MAX_DEPTH = 32
_NO_AUTO_START = 0x2  # asking whether somebody plays must not start the service that knows
_CALL, _RETURN, _ERROR = 1, 2, 3
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_FIXED = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
_ALIGNMENT = {"b": 4, "s": 4, "o": 4, "g": 1, "v": 1, "a": 4, "(": 8, "{": 8}
_ALIGNMENT |= {code: struct.calcsize(form) for code, form in _FIXED.items()}


class DbusError(Exception):
    """No answer, or an error for one. `name`: of the error, when the other side named it."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text)
        self.name = name


class Method(NamedTuple):
    """What to call."""

    service: str
    path: str
    interface: str
    member: str


class Bus:
    """See the module. `address`: as in DBUS_SYSTEM_BUS_ADDRESS; of several, the first of a socket counts."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stream: trio.SocketStream | None = None
        self._buffer = b""
        self._serial = 0

    async def call(self, method: Method, signature: str = "", *arguments: Any) -> tuple[Any, ...]:
        """Call a method that is running already.

        Returns:
            The values of the answer: structs as tuples, dicts as dicts, variants as what is in them.

        Raises:
            DbusError: there is no bus, no answer within `CALL_S`, or the answer is an error.

        Cancellation: the connection is closed.
        """
        keep = False
        try:
            with trio.fail_after(CALL_S):
                if self._stream is None:
                    await self._connect()
                    await self._ask(_HELLO, "", ())
                answer = await self._ask(method, signature, arguments)
            keep = True
            return answer
        except trio.TooSlowError:
            raise DbusError(f"{method.service} did not answer within {CALL_S:g} s") from None
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise DbusError(f"the bus at {self._address} cannot be used: {error}") from None
        except DbusError as error:
            keep = bool(error.name)  # an error that was answered is an answer
            raise
        finally:
            if not keep:
                self.close()

    async def get(self, service: str, path: str, interface: str, name: str) -> Any:
        """One property. Raises and cancellation: as `call`."""
        (value,) = await self.call(Method(service, path, _PROPERTIES, "Get"), "ss", interface, name)
        return value

    async def get_all(self, service: str, path: str, interface: str) -> dict[str, Any]:
        """All properties of an interface. Raises and cancellation: as `call`."""
        (found,) = await self.call(Method(service, path, _PROPERTIES, "GetAll"), "s", interface)
        return dict(found)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._stream is not None:
            self._stream.socket.close()
        self._stream, self._buffer = None, b""

    async def _connect(self) -> None:
        stream = self._stream = await trio.open_unix_socket(socket_of(self._address))
        user = str(os.getuid()).encode().hex()
        await stream.send_all(b"\0AUTH EXTERNAL " + user.encode() + b"\r\n")
        while b"\r\n" not in self._buffer:
            await self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        if not line.startswith(b"OK "):
            raise DbusError(f"the bus at {self._address} does not let us in: {line[:100]!r}")
        await stream.send_all(b"BEGIN\r\n")

    async def _ask(self, method: Method, signature: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._stream is not None
        self._serial += 1
        await self._stream.send_all(encode_call(self._serial, method, signature, arguments))
        while True:
            message = decode(await self._message())
            if message.reply_to == self._serial and message.kind in (_RETURN, _ERROR):
                break
        if message.kind == _ERROR:
            text = message.body[0] if message.body and isinstance(message.body[0], str) else message.error
            raise DbusError(f"{method.service}: {text}", message.error or "unnamed")
        return message.body

    async def _message(self) -> bytes:
        while (size := message_size(self._buffer)) is None or len(self._buffer) < size:
            await self._more()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    async def _more(self) -> None:
        assert self._stream is not None
        data = await self._stream.receive_some(65_536)
        if not data:
            raise DbusError(f"the bus at {self._address} closed the connection")
        self._buffer += data


_PROPERTIES = "org.freedesktop.DBus.Properties"
_HELLO = Method("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")


def socket_of(address: str) -> str:
    """The socket of a bus address, for `connect`. Raises DbusError when it has none."""
    for part in address.split(";"):
        kind, _, rest = part.partition(":")
        values = dict(item.partition("=")[::2] for item in rest.split(","))
        if kind == "unix" and values.get("path"):
            return unquote(values["path"])
        if kind == "unix" and values.get("abstract"):
            return "\0" + unquote(values["abstract"])
    raise DbusError(f'"{address}" is not the address of a socket')


# ---- the format, pure


class Message(NamedTuple):
    """What matters of a message that came in."""

    kind: int
    reply_to: int
    error: str
    body: tuple[Any, ...]


def encode_call(serial: int, method: Method, signature: str, arguments: tuple[Any, ...]) -> bytes:
    """A method call with strings (s, o) and 32-bit numbers (u) as arguments."""
    body = bytearray()
    for code, value in zip(signature, arguments, strict=True):
        _put(body, code, value)
    fields = [
        (_PATH, "o", method.path),
        (_INTERFACE, "s", method.interface),
        (_MEMBER, "s", method.member),
        (_DESTINATION, "s", method.service),
    ]
    if signature:
        fields.append((_SIGNATURE, "g", signature))
    head = bytearray(struct.pack("<cBBBIII", b"l", _CALL, _NO_AUTO_START, 1, len(body), serial, 0))
    for number, code, text in fields:
        _pad(head, 8)
        head.append(number)
        _put(head, "g", code)
        _put(head, code, text)
    struct.pack_into("<I", head, 12, len(head) - 16)
    _pad(head, 8)
    return bytes(head + body)


def _pad(data: bytearray, size: int) -> None:
    data.extend(b"\0" * (-len(data) % size))


def _put(data: bytearray, code: str, value: Any) -> None:
    if code == "u":
        _pad(data, 4)
        data += struct.pack("<I", value)
    elif code == "g":
        data += bytes([len(value)]) + value.encode() + b"\0"
    else:
        raw = value.encode()
        _pad(data, 4)
        data += struct.pack("<I", len(raw)) + raw + b"\0"


def message_size(data: bytes) -> int | None:
    """Bytes of the message that begins here; None when that cannot be told yet. Raises DbusError."""
    if len(data) < 16:
        return None
    order = _order(data)
    body, _serial, fields = struct.unpack_from(order + "III", data, 4)
    size = 16 + fields + (-fields % 8) + body
    if size > MAX_MESSAGE_BYTES:
        raise DbusError(f"the bus sent a message of {size} bytes")
    return int(size)


def _order(data: bytes) -> str:
    try:
        return {b"l": "<", b"B": ">"}[data[:1]]
    except KeyError:
        raise DbusError("the bus sent what is no message") from None


def decode(data: bytes) -> Message:
    """One whole message. Raises DbusError for anything else."""
    try:
        order = _order(data)
        body_bytes, _serial, field_bytes = struct.unpack_from(order + "III", data, 4)
        reader = _Reader(data[: 16 + field_bytes], order, 12)
        fields = dict(reader.value("a(yv)", 0)[0])
        start = 16 + field_bytes + (-field_bytes % 8)
        # The body counts its alignment from its own beginning, which is a multiple of eight of the whole.
        body = _Reader(data[start : start + body_bytes], order, 0).values(str(fields.get(_SIGNATURE, "")))
        return Message(data[1], int(fields.get(_REPLY_SERIAL, 0)), str(fields.get(_ERROR_NAME, "")), body)
    except (struct.error, LookupError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise DbusError(f"the bus sent a message that cannot be read: {error}") from None


class _Reader:
    """Reads values one after the other. Raises what `decode` turns into a DbusError."""

    def __init__(self, data: bytes, order: str, at: int) -> None:
        self._data, self._order, self._at = data, order, at

    def values(self, signature: str) -> tuple[Any, ...]:
        found = []
        while signature:
            value, signature = self.value(signature, 0)
            found.append(value)
        return tuple(found)

    def value(self, signature: str, depth: int) -> tuple[Any, str]:
        """The value of the first type of a signature, and what is left of the signature."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        code, rest = signature[0], signature[1:]
        self._at += -self._at % _ALIGNMENT.get(code, 1)
        if code in _FIXED:
            return self._number(_FIXED[code]), rest
        if code == "b":
            return bool(self._number("I")), rest
        if code in "so":
            return self._text(self._number("I")), rest
        if code == "g":
            return self._text(self._number("B")), rest
        if code == "v":
            inner = self._text(self._number("B"))
            return self.value(inner, depth + 1)[0], rest
        if code == "a":
            return self._array(rest, depth)
        if code in "({":
            return self._struct(rest, ")" if code == "(" else "}", depth)
        raise ValueError(f"unknown type {code!r}")

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(self._order + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self, size: int) -> str:
        raw = self._data[self._at : self._at + size]
        if len(raw) != size:
            raise ValueError("a text is cut off")
        self._at += size + 1  # the closing zero
        return raw.decode()

    def _array(self, rest: str, depth: int) -> tuple[Any, str]:
        size = self._number("I")
        element, left = split(rest)
        self._at += -self._at % _ALIGNMENT[element[0]]
        end = self._at + size
        if end > len(self._data):
            raise ValueError("an array is cut off")
        found = []
        while self._at < end:
            before = self._at
            found.append(self.value(element, depth + 1)[0])
            if self._at == before:
                raise ValueError("an array of nothing")
        return (dict(found) if element.startswith("{") else found), left

    def _struct(self, rest: str, close: str, depth: int) -> tuple[Any, str]:
        found = []
        while not rest.startswith(close):
            value, rest = self.value(rest, depth + 1)
            found.append(value)
        return tuple(found), rest[1:]


def split(signature: str) -> tuple[str, str]:
    """The first complete type of a signature, and the rest. Raises ValueError."""
    if not signature:
        raise ValueError("a signature ends too early")
    if signature[0] == "a":
        element, rest = split(signature[1:])
        return "a" + element, rest
    if signature[0] not in "({":
        return signature[0], signature[1:]
    depth = 0
    for number, code in enumerate(signature):
        depth += (code in "({") - (code in ")}")
        if depth == 0:
            return signature[: number + 1], signature[number + 1 :]
    raise ValueError("a bracket is not closed")
