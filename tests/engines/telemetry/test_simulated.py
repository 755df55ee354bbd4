"""The simulated reader's arithmetic; that it keeps the readers' contract is in tests/supervisor/machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engines.telemetry.simulated import ALLOCATION, Allocations, Script, reading

GIB = 2**30


def allocate(folder: Path, **held: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ALLOCATION).write_text(json.dumps(held))
    return folder / ALLOCATION


def test_a_gpu_of_a_script_has_what_the_script_says_and_sums():
    script = {
        "gpus": [
            {
                "uuid": "GPU-a",
                "memory_total_bytes": 10 * GIB,
                "memory_reserved_bytes": GIB,
                "memory_used_bytes": 2 * GIB,
                "processes": [{"pid": 41, "bytes": GIB}],
                "temperature_c": 80.0,
            }
        ]
    }
    (gpu,) = reading(script, [{"uuid": "GPU-a", "bytes": 3 * GIB, "pid": 42}, {"uuid": "GPU-b", "bytes": GIB}])
    assert gpu["memory_used_bytes"] == 6 * GIB
    assert gpu["memory_free_bytes"] == 3 * GIB
    assert gpu["temperature_c"] == 80.0
    assert [(one["pid"], one["bytes"]) for one in gpu["processes"]] == [(41, GIB), (42, 3 * GIB)]


def test_more_than_there_is_leaves_nothing_free():
    (gpu,) = reading({"gpus": [{"memory_total_bytes": GIB}]}, [{"bytes": 5 * GIB}])
    assert (gpu["memory_used_bytes"], gpu["memory_free_bytes"]) == (GIB, 0)
    assert gpu["processes"] == []  # its pid is hidden, its memory is not


def test_an_allocation_without_a_uuid_is_on_the_first_gpu():
    first, second = reading({"gpus": [{}, {}]}, [{"bytes": GIB}])
    assert first["memory_used_bytes"] == GIB
    assert second["memory_used_bytes"] == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_allocations_are_found_in_the_folders_of_instances(tmp_path, depth):
    allocate(tmp_path.joinpath(*"abcd"[:depth]), bytes=GIB)
    assert [held["bytes"] for held in Allocations(str(tmp_path)).look(0.0)] == [GIB]


def test_memory_comes_back_when_the_file_goes(tmp_path):
    file = allocate(tmp_path / "m0" / "i1", bytes=GIB)
    allocations = Allocations(str(tmp_path))
    assert allocations.look(0.0)
    file.unlink()
    assert allocations.look(0.1) == []


def test_memory_may_come_back_late(tmp_path):
    file = allocate(tmp_path / "m0", bytes=GIB, delay_s=2.0)
    allocations = Allocations(str(tmp_path))
    allocations.look(0.0)
    file.unlink()
    assert [held["bytes"] for held in allocations.look(1.0)] == [GIB]
    assert [held["bytes"] for held in allocations.look(2.9)] == [GIB]
    assert allocations.look(3.1) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bytes": "many"}', '{"uuid": "GPU-a"}'])
def test_a_broken_allocation_holds_nothing(tmp_path, text):
    (tmp_path / ALLOCATION).write_text(text)
    assert Allocations(str(tmp_path)).look(0.0) == []


def test_the_process_is_the_one_that_works_there(tmp_path, monkeypatch):
    file = allocate(tmp_path / "m0", bytes=GIB)
    monkeypatch.chdir(file.parent)
    (held,) = Allocations(str(tmp_path)).look(0.0)
    assert held["pid"] == os.getpid()


def test_a_script_is_read_again_when_it_changes_and_kept_when_it_breaks(tmp_path):
    file = tmp_path / "script"
    script = Script(str(file))
    assert not script.changed()
    file.write_text('{"gpus": [{}]}')
    assert script.changed()
    assert not script.changed()
    file.write_text('{"gpus": [{}')
    assert not script.changed()
    assert script.now == {"gpus": [{}]}
    file.write_text('{"gpus": [{}], "mood": "die"}')
    assert script.changed()


def test_events_are_sent_once(tmp_path):
    script = Script(str(tmp_path / "none"))
    script.now = {"events": [{"kind": "xid", "xid": 13}]}
    assert script.new_events() == [{"kind": "xid", "xid": 13}]
    assert script.new_events() == []
    script.now = {"events": [{"kind": "xid", "xid": 13}, {"kind": "xid", "xid": 79}]}
    assert script.new_events() == [{"kind": "xid", "xid": 79}]
    script.now = {"events": [{"kind": "xid", "xid": 31}]}
    assert script.new_events() == [{"kind": "xid", "xid": 31}]
