"""Reads what feeds this machine: mains or a battery, and its charge.

Linux tells it in /sys/class/power_supply; a machine that has nothing there (a server, a virtual machine) lives on
mains. The batteries of mice and headsets are listed there as well, with the scope "Device", and do not count. An
uninterruptible power supply that the kernel knows counts as a battery. Elsewhere psutil tells.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from supervisor.intake.observed import Power, Unknown
from supervisor.machine.presence import SIMULATED, Simulation

ROOT = Path("/sys/class/power_supply")
_BATTERIES = ("Battery", "UPS")
_PLUGS = ("Mains", "USB", "Wireless")


def power_reader(environ: Mapping[str, str] = os.environ) -> Callable[[], Power | Unknown]:
    """The one for this system; it may block for a moment (batteries answer slowly)."""
    if path := environ.get(SIMULATED):
        return Simulation(Path(path)).power
    return linux_power if sys.platform == "linux" else other_power


def linux_power(root: Path = ROOT) -> Power | Unknown:
    """From /sys, or a recording of it."""
    try:
        supplies = [_attributes(folder) for folder in sorted(root.iterdir())]
    except FileNotFoundError:
        return Power()  # a kernel without the class has nothing that could be a battery
    except OSError as error:
        return Unknown(f"{root} cannot be read: {error.strerror}")
    batteries = [one for one in supplies if one.get("type") in _BATTERIES and one.get("scope") != "Device"]
    batteries = [one for one in batteries if one.get("present") != "0"]
    if not batteries:
        return Power()
    plugs = [one["online"] for one in supplies if one.get("type") in _PLUGS and one.get("online")]
    states = {one.get("status", "Unknown") for one in batteries}
    percent = _percent(batteries)
    if any(plug != "0" for plug in plugs):
        return Power(percent=percent)
    # No plug is in, or none tells: what a battery does is what counts. One of several may rest while another works.
    if "Discharging" in states:
        return Power(on_battery=True, percent=percent)
    if plugs and states == {"Unknown"}:
        return Power(on_battery=True, percent=percent)
    if states & {"Charging", "Full", "Not charging"}:
        return Power(percent=percent)
    return Unknown("the battery does not say whether it is being used")


def _attributes(folder: Path) -> dict[str, str]:
    names = (
        *("type", "scope", "present", "status", "online", "capacity"),
        *("energy_now", "energy_full", "charge_now", "charge_full"),
    )
    found = {}
    for name in names:
        try:
            found[name] = (folder / name).read_text().strip()
        except (OSError, UnicodeDecodeError):  # ENODEV while a battery is taken out; most have only some of them
            continue
    return found


def _percent(batteries: list[dict[str, str]]) -> float | None:
    """Charge of all batteries together; None when they do not tell."""
    for now, full in (("energy_now", "energy_full"), ("charge_now", "charge_full")):
        try:
            held = sum(int(one[now]) for one in batteries)
            room = sum(int(one[full]) for one in batteries)
            return min(100.0, 100.0 * held / room)
        except (KeyError, ValueError, ZeroDivisionError):
            continue
    told = [float(one["capacity"]) for one in batteries if one.get("capacity", "").isdecimal()]
    return min(told) if told else None


def other_power() -> Power | Unknown:
    """Windows and macOS."""
    try:
        found = psutil.sensors_battery()
    except (OSError, AttributeError) as error:
        return Unknown(f"the system does not tell: {error}")
    if found is None:
        return Power()
    if found.power_plugged is None:
        return Unknown("the system does not say whether it is plugged in")
    return Power(on_battery=not found.power_plugged, percent=float(found.percent))
