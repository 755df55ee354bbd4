"""Recorded /sys/class/power_supply folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from supervisor.intake.observed import Power, Unknown
from supervisor.machine.power import linux_power, other_power, power_reader

AC = {"type": "Mains", "online": "1"}
NO_AC = {"type": "Mains", "online": "0"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "5"}


def battery(status: str, **more: str) -> dict[str, str]:
    """As a ThinkPad tells it: energy in µWh, and a capacity that is rounded."""
    return {
        "type": "Battery",
        "present": "1",
        "status": status,
        "energy_now": "25000000",
        "energy_full": "50000000",
        "capacity": "49",
        **more,
    }


def usb(online: str) -> dict[str, str]:
    return {"type": "USB", "online": online, "status": "Unknown"}


def record(root: Path, supplies: dict[str, dict[str, str]]) -> Path:
    for name, attributes in supplies.items():
        (root / name).mkdir()
        for key, value in attributes.items():
            (root / name / key).write_text(value + "\n")
    return root


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, Power()),
        ({"AC": AC}, Power()),
        ({"AC": AC, "BAT0": battery("Charging")}, Power(percent=50)),
        ({"AC": AC, "BAT0": battery("Full")}, Power(percent=50)),
        ({"AC": NO_AC, "BAT0": battery("Discharging")}, Power(on_battery=True, percent=50)),
        # plugged in and used up all the same: the plug is too weak, and still no walk in the park
        ({"AC": AC, "BAT0": battery("Discharging")}, Power(percent=50)),
        # a laptop that charges by USB-C has one entry a port
        ({"AC": NO_AC, "u1": usb("0"), "u2": usb("1"), "BAT0": battery("Not charging")}, Power(percent=50)),
        ({"u1": usb("0"), "BAT0": battery("Discharging")}, Power(on_battery=True, percent=50)),
        # two batteries: one rests while the other works; the charge is that of both
        (
            {"AC": NO_AC, "BAT0": battery("Unknown"), "BAT1": battery("Discharging", energy_now="0")},
            Power(on_battery=True, percent=25),
        ),
        # an ARM laptop without a plug's entry
        ({"BAT0": battery("Discharging")}, Power(on_battery=True, percent=50)),
        ({"BAT0": battery("Charging")}, Power(percent=50)),
        ({"AC": NO_AC, "BAT0": battery("Unknown")}, Power(on_battery=True, percent=50)),
        ({"BAT0": battery("Unknown")}, Unknown("the battery does not say whether it is being used")),
        # mice, and an empty bay, are not what the machine lives on
        ({"hidpp_0": MOUSE}, Power()),
        ({"hidpp_0": MOUSE, "AC": NO_AC, "BAT0": battery("Discharging", present="0")}, Power()),
        ({"ups": battery("Discharging", type="UPS")}, Power(on_battery=True, percent=50)),
        # charge instead of energy, only a capacity, and neither
        (
            {"b": {"type": "Battery", "status": "Discharging", "charge_now": "1", "charge_full": "4"}},
            Power(on_battery=True, percent=25),
        ),
        ({"b": {"type": "Battery", "status": "Discharging", "capacity": "7"}}, Power(on_battery=True, percent=7)),
        ({"b": {"type": "Battery", "status": "Discharging"}}, Power(on_battery=True)),
        ({"b": battery("Discharging", energy_full="0")}, Power(on_battery=True, percent=49)),
        ({"b": battery("Full", energy_now="51000000")}, Power(percent=100)),
    ],
)
def test_what_feeds_a_linux_machine(tmp_path, supplies, expected):
    assert linux_power(record(tmp_path, supplies)) == expected


def test_a_kernel_without_the_class_lives_on_mains(tmp_path):
    assert linux_power(tmp_path / "power_supply") == Power()


def test_this_machine_is_read_without_an_error():
    assert isinstance(linux_power(), Power | Unknown)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, Power()),
        (SimpleNamespace(percent=30, power_plugged=False), Power(on_battery=True, percent=30)),
        (SimpleNamespace(percent=30, power_plugged=True), Power(percent=30)),
        (SimpleNamespace(percent=30, power_plugged=None), Unknown("the system does not say whether it is plugged in")),
    ],
)
def test_other_systems(monkeypatch, found, expected):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: found, raising=False)
    assert other_power() == expected


def test_a_simulated_battery(tmp_path):
    path = tmp_path / "scene.json"
    read = power_reader({"BULKHEAD_SIMULATED_PRESENCE": str(path)})
    assert isinstance(read(), Unknown)
    path.write_text(json.dumps({"battery": 12}))
    assert read() == Power(on_battery=True, percent=12)
    path.write_text(json.dumps({"battery": None}))
    assert read() == Power()
