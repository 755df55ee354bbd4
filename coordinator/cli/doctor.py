"""`coordinator doctor`: examine a coordinator's configuration, store and machine; 0 when nothing is bad, else 1."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from coordinator import config as configuration
from coordinator.doctor import box as doctor_box
from coordinator.doctor import store as doctor_store
from coordinator.doctor.examine import Check, Patient, examine, plain, render

CHECKS = (
    Check("store", doctor_store.store, within_s=30.0),
    Check("state", doctor_box.state),
    Check("disk", doctor_box.disk),
    Check("blobs", doctor_box.blobs, within_s=40.0),
    Check("port", doctor_box.port),
    Check("certificate", doctor_box.tls),
    Check("limits", doctor_box.limits),
)


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `coordinator`."""
    doctor = commands.add_parser("doctor", parents=[shared], help="look for what keeps the coordinator from working")
    doctor.add_argument("--listen", metavar="HOST:PORT", help="the address to look at; default: the configuration's")
    doctor.add_argument("--store", metavar="URL", help="postgres://… or sqlite:PATH; default: as the coordinator's")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found. Raises Refusal for a configuration that cannot be read."""
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    patient = Patient(settings, configuration.store_address(settings), configuration.state_dir(settings))
    found = plain(examine(patient, CHECKS))
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else render(found["checks"])) + "\n")
    return 0 if found["ok"] else 1
