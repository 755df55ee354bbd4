"""The D-Bus client: its format against one written apart, and its calls over a real dbus-daemon."""

from __future__ import annotations

import os
import random
import sys

import pytest
import trio

from supervisor.machine import dbus
from supervisor.machine.dbus import Bus, DbusError, Method, decode, message_size, socket_of
from tests.supervisor.machine.fake_bus import Error, Service, deaf_socket, message, private_bus

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="D-Bus is spoken over Unix sockets")

DAEMON = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")

VALUES = [
    ("s", ("Grüezi",)),
    ("b", (True,)),
    ("yib", (7, -5, False)),
    ("yxt", (7, -(2**60), 2**60)),
    ("qnd", (65535, -1, 0.5)),
    ("as", (["a", "", "ccc"],)),
    ("as", ([],)),
    ("at", ([1, 2],)),
    ("a(susso)", ([("1", 1000, "anna", "seat0", "/a"), ("2", 0, "root", "", "/b")],)),
    ("a{sv}", ({"Idle": ("b", True), "Since": ("t", 12), "Who": ("(so)", ("x", "/y"))},)),
    ("ya{sv}u", (1, {}, 3)),
    ("aai", ([[1, 2], [], [3]],)),
    ("v", (("v", ("s", "inside")),)),
    ("(yv)s", ((1, ("u", 2)), "end")),
]


@pytest.mark.parametrize(("signature", "values"), VALUES)
def test_every_type_is_read(signature, values):
    data = message(2, 9, [(5, "u", 4)], signature, values)
    assert message_size(data) == len(data)
    assert message_size(data[:15]) is None
    found = decode(data)
    assert (found.kind, found.reply_to) == (2, 4)
    expected = {
        "a{sv}": ({"Idle": True, "Since": 12, "Who": ("x", "/y")},),
        "v": ("inside",),
        "(yv)s": ((1, 2), "end"),
    }
    assert found.body == expected.get(signature, values)


def test_what_is_no_message_is_an_error_and_nothing_else():
    """Cut off and changed at random: a bus may say anything, and must end nobody."""
    for seed in range(2000):
        dice = random.Random(seed)
        signature, values = dice.choice(VALUES)
        data = bytearray(message(2, 9, [(5, "u", 4)], signature, values))
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            decode(bytes(data[: dice.randrange(16, len(data) + 1)]))
        except DbusError:
            continue


def test_a_message_that_is_too_large_is_refused():
    with pytest.raises(DbusError, match="bytes"):
        message_size(b"l\2\0\1" + b"\xff" * 12)
    with pytest.raises(DbusError, match="no message"):
        message_size(b"HTTP/1.1 400 Bad")


def test_an_array_of_nothing_ends():
    data = message(2, 9, [(5, "u", 4), (8, "g", "a()")], "", ())
    body = b"\x08\0\0\0" + bytes(12)
    with pytest.raises(DbusError, match="nothing"):
        decode(data[:4] + len(body).to_bytes(4, "little") + data[8:] + body)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("unix:path=/run/dbus/system_bus_socket", "/run/dbus/system_bus_socket"),
        ("unix:path=/run/user/1/bus,guid=ab", "/run/user/1/bus"),
        ("unix:path=/tmp/a%20b", "/tmp/a b"),
        ("unix:abstract=/tmp/dbus-x,guid=1", "\0/tmp/dbus-x"),
        ("tcp:host=x;unix:path=/a", "/a"),
    ],
)
def test_addresses(address, expected):
    assert socket_of(address) == expected


@pytest.mark.parametrize("address", ["", "tcp:host=localhost,port=1", "unix:tmpdir=/tmp", "nonsense"])
def test_addresses_without_a_socket(address):
    with pytest.raises(DbusError, match="not the address of a socket"):
        socket_of(address)


async def test_a_real_bus_answers(tmp_path):
    with private_bus(tmp_path) as address:
        bus = Bus(address)
        (names,) = await bus.call(Method(*DAEMON, "ListNames"))
        assert "org.freedesktop.DBus" in names
        (me,) = [name for name in names if name.startswith(":")]
        assert await bus.call(Method(*DAEMON, "GetConnectionUnixProcessID"), "s", me) == (os.getpid(),)
        (credentials,) = await bus.call(Method(*DAEMON, "GetConnectionCredentials"), "s", me)
        assert credentials["UnixUserID"] == os.getuid()
        features = await bus.get(*DAEMON, "Features")
        assert isinstance(features, list)
        everything = await bus.get_all(*DAEMON)
        assert everything["Features"] == features
        bus.close()


async def test_an_error_is_an_answer_and_the_connection_stays(tmp_path):
    with private_bus(tmp_path) as address:
        bus = Bus(address)
        with pytest.raises(DbusError, match=r"org\.nobody") as caught:
            await bus.call(Method("org.nobody", "/", "org.nobody", "X"))
        assert caught.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"
        first = bus._stream
        await bus.call(Method(*DAEMON, "ListNames"))
        assert bus._stream is first
        bus.close()


async def test_a_bus_that_was_restarted_is_found_again(tmp_path, nursery):
    with private_bus(tmp_path) as address:
        bus = Bus(address)
        await bus.call(Method(*DAEMON, "ListNames"))
    with pytest.raises(DbusError, match="bus at"):
        await bus.call(Method(*DAEMON, "ListNames"))
    (tmp_path / "bus").unlink(missing_ok=True)
    with private_bus(tmp_path) as address:
        await bus.call(Method(*DAEMON, "ListNames"))
        bus.close()


async def test_a_service_answers_strings_numbers_and_errors(tmp_path, nursery):
    with private_bus(tmp_path) as address:
        service = Service(address, "org.test")
        service.table = {
            ("org.test", "Echo", "Grüezi", "8"): ("s", ("ja",)),
            ("org.test", "Bad"): Error("it is closed today"),
        }
        await nursery.start(service.run)
        bus = Bus(address)
        assert await bus.call(Method("org.test", "/a", "org.test", "Echo"), "su", "Grüezi", 8) == ("ja",)
        with pytest.raises(DbusError, match="closed today"):
            await bus.call(Method("org.test", "/a", "org.test", "Bad"))
        bus.close()
        nursery.cancel_scope.cancel()


async def test_a_bus_that_says_nothing_costs_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(dbus, "CALL_S", 0.1)
    with deaf_socket(tmp_path / "deaf") as address:
        bus = Bus(address)
        with pytest.raises(DbusError, match=r"did not answer within 0\.1 s"):
            await bus.call(Method(*DAEMON, "ListNames"))
        assert bus._stream is None


async def test_there_is_no_bus(tmp_path):
    with pytest.raises(DbusError, match="cannot be used"):
        await Bus(f"unix:path={tmp_path}/none").call(Method(*DAEMON, "ListNames"))


async def test_a_cancelled_call_leaves_no_connection(tmp_path):
    with deaf_socket(tmp_path / "deaf") as address:
        bus = Bus(address)
        with trio.move_on_after(0.05):
            await bus.call(Method(*DAEMON, "ListNames"))
        assert bus._stream is None
