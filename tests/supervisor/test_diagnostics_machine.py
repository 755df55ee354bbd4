"""Facts of the machine: read from files alone, whatever is missing there."""

from __future__ import annotations

import os
import sys

from supervisor.diagnostics_machine import machine, packages, read_text


def test_the_machine_is_told_without_the_values_of_its_environment(tmp_path):
    found = machine(tmp_path, {"HOME": "/secret/home", "LANG": "C.UTF-8"})
    assert found["environment"] == {"names": ["HOME", "LANG"], "values": {"LANG": "C.UTF-8"}}
    assert found["python"]["executable"] == sys.executable
    assert found["disk"]["free_bytes"] > 0
    if sys.platform.startswith("linux"):
        assert found["files"]["own_limits"]
        assert all(line.startswith(("Mem", "Swap", "Huge")) for line in found["files"]["memory"])
        assert found["user"]["euid"] == os.geteuid()


def test_a_folder_that_is_gone_costs_only_itself(tmp_path):
    assert machine(tmp_path / "gone", {})["disk"]["problem"] == "No such file or directory"


def test_packages_are_listed_with_their_versions():
    assert packages()["trio"].startswith("0.")


def test_a_file_that_cannot_be_read_is_empty(tmp_path):
    assert read_text(tmp_path) == ""
    (tmp_path / "x").write_bytes(b" \xff text\n")
    assert read_text(tmp_path / "x") == "\ufffd text"
