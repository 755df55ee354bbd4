"""Whether the network is metered: NetworkManager on a private bus, and the others as far as they can be tried."""

from __future__ import annotations

import sys

import pytest

from supervisor.intake.observed import Network, Unknown
from supervisor.machine import network
from supervisor.machine.network import LinuxNetwork, UntoldNetwork, WindowsNetwork, network_reader
from tests.supervisor.machine.fake_bus import Service, private_bus

SERVICE = "org.freedesktop.NetworkManager"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (("u", 0), Unknown("NetworkManager does not know")),
        (("u", 1), Network(metered=True)),
        (("u", 2), Network(metered=False)),
        (("u", 3), Network(metered=True, guessed=True)),
        (("u", 4), Network(metered=False, guessed=True)),
        (("u", 99), Unknown("NetworkManager does not know")),
        (("as", ["yes"]), Unknown("NetworkManager does not know")),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="D-Bus is spoken over Unix sockets")
async def test_networkmanager(tmp_path, nursery, value, expected):
    with private_bus(tmp_path) as address:
        service = Service(address, SERVICE)
        service.table["org.freedesktop.DBus.Properties", "Get", SERVICE, "Metered"] = "v", (value,)
        await nursery.start(service.run)
        reader = LinuxNetwork(address)
        assert await reader.read() == expected
        reader.close()
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform == "win32", reason="D-Bus is spoken over Unix sockets")
async def test_without_networkmanager_it_is_unknown(tmp_path):
    with private_bus(tmp_path) as address:
        reader = LinuxNetwork(address)
        found = await reader.read()
        reader.close()
        assert isinstance(found, Unknown)
        assert SERVICE in found.reason


async def test_a_system_that_does_not_tell():
    assert isinstance(await UntoldNetwork().read(), Unknown)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (1, Network()),
        (2, Network(metered=True)),
        (4, Network(metered=True)),
        (1 | 0x40000, Network(metered=True)),
        (0, Unknown("Windows does not know the cost of the network")),
    ],
)
async def test_what_the_costs_of_windows_mean(monkeypatch, cost, expected):
    monkeypatch.setattr(network, "windows_cost", lambda: cost)
    assert await WindowsNetwork().read() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="that is where it works")
async def test_another_system_has_no_windows_costs():
    assert isinstance(await WindowsNetwork().read(), Unknown)


@pytest.mark.skipif(sys.platform != "win32", reason="Windows only")
def test_windows_tells():  # pragma: no cover
    assert network.windows_cost() >= 0


async def test_a_simulated_network(tmp_path):
    path = tmp_path / "scene.json"
    path.write_text('{"metered": true}')
    assert await network_reader({"BULKHEAD_SIMULATED_PRESENCE": str(path)}).read() == Network(metered=True)
