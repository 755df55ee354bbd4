"""What is kept of a bad end: readable, bounded, for the owner alone, and never a reason to fail."""

from __future__ import annotations

import errno
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest

from supervisor.host import incidents
from supervisor.host.incidents import MAX_BYTES, Incident, Incidents, now_utc, stack_dump, without_stacks

# As Python 3.11 writes it on SIGUSR2, between other lines.
DUMP_311 = """\
llama_context: n_ctx = 4096
Thread 0x00007f2b5d7fe6c0 (most recent call first):
  File "/x/engines/llm/engine.py", line 80 in run
  File "/usr/lib/python3.11/threading.py", line 982 in run
  ...

Current thread 0x00007f2b6b8c5740 (most recent call first):
  File "/x/engines/runtime/serve.py", line 71 in loop
  <no Python frame>
a line after it
  File "of no stack", line 1
"""
# As Python 3.14 writes it on a crash.
DUMP_314 = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f9a4e8d1740 [python3.14] (most recent call first):
  File "<string>", line 1 in <module>

Current thread's C stack trace (most recent call first):
  Binary file "python3.14", at _Py_DumpStack+0x2e [0x6f0c9e]
  <truncated rest of calls>

Extension modules: numpy._core._multiarray_umath (total: 1)
"""


def test_a_stack_dump_is_told_from_what_else_was_said():
    assert stack_dump(DUMP_311.splitlines()) == [
        "Thread 0x00007f2b5d7fe6c0 (most recent call first):",
        '  File "/x/engines/llm/engine.py", line 80 in run',
        '  File "/usr/lib/python3.11/threading.py", line 982 in run',
        "  ...",
        "Current thread 0x00007f2b6b8c5740 (most recent call first):",
        '  File "/x/engines/runtime/serve.py", line 71 in loop',
        "  <no Python frame>",
    ]
    rest = [line for line in without_stacks(DUMP_311.splitlines()) if line]
    assert rest == ["llama_context: n_ctx = 4096", "a line after it", '  File "of no stack", line 1']


def test_newer_pythons_say_it_in_more_words():
    dump = stack_dump(DUMP_314.splitlines())
    assert len(dump) == 6
    assert dump[0] == "Fatal Python error: Segmentation fault"
    assert dump[-1] == "  <truncated rest of calls>"


def test_a_traceback_is_no_dump():
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "ValueError: Thread 0x1"]
    assert stack_dump(lines) == []
    assert without_stacks(lines) == lines


def test_what_faulthandler_really_writes_is_recognised():
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        said = [line for line in file.read().decode().splitlines() if line]
    assert stack_dump(["before", *said, "after"]) == said
    code = "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)"
    crashed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    dump = stack_dump(crashed.stderr.splitlines())
    assert dump[0].startswith("Fatal Python error: Segmentation fault")
    assert any("in string_at" in line for line in dump)


FULL = Incident(
    model="chat",
    engine="llm",
    pid=77,
    how="killed by SIGSEGV",
    diagnosis="busy-in-C",
    facts={"beat_s": 12.5, "state": "R"},
    code="engine_crashed",
    message="Engine llm was killed by SIGSEGV while it ran a job.",
    stacks=("Thread 0x1 (most recent call first):",),
    stderr=("CUDA error",),
    runs=("job-1#2", "job-7#1"),
    sandbox={"landlock": "verified"},
    gpus=({"uuid": "GPU-1", "used_bytes": 5},),
)


def test_an_incident_is_kept_for_the_owner_alone(tmp_path: Path):
    kept = Incidents(tmp_path / "incidents")
    before = now_utc()
    path = kept.keep(FULL)
    assert path is not None
    (found,) = kept.recent()
    assert before <= found.time <= now_utc()
    assert msgspec.structs.replace(found, time="") == FULL
    assert path.read_text().startswith("{\n")  # a person may read it
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_newest_are_kept_and_come_first(tmp_path: Path):
    kept = Incidents(tmp_path, kept=5)
    for number in range(12):
        time_ = f"2026-03-04T05:06:{number:02}.000+00:00"
        kept.keep(Incident(model=str(number), engine="e", time=time_))
    assert [incident.model for incident in kept.recent(3)] == ["11", "10", "9"]
    assert [incident.model for incident in kept.recent(50)] == ["11", "10", "9", "8", "7"]
    assert len(list(tmp_path.iterdir())) == 5


def test_what_lies_there_broken_is_left_out(tmp_path: Path):
    kept = Incidents(tmp_path)
    kept.keep(FULL)
    (tmp_path / "99999999T-x.json").write_text("{half")
    (tmp_path / "note.txt").write_text("mine")
    assert [incident.model for incident in kept.recent()] == ["chat"]
    assert (tmp_path / "note.txt").exists()


def test_half_written_ones_of_an_earlier_life_go(tmp_path: Path):
    old, new = tmp_path / "a.partial", tmp_path / "b.partial"
    old.write_text("{")
    new.write_text("{")
    os.utime(old, (time.time() - 3600,) * 2)
    Incidents(tmp_path).keep(FULL)
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


@pytest.mark.parametrize(
    "flood",
    [
        {"stderr": tuple("x" * 8000 for _ in range(5000))},
        {"stderr": tuple("\0\x1b" * 4000 for _ in range(5000))},  # each byte takes six in JSON
        {"stacks": tuple("y" * 600 for _ in range(5000))},
        {"message": "z" * 2**20, "how": "h" * 2**20},
        {"facts": {"f" * 1000 + str(n): n for n in range(500)}},
        {"gpus": tuple({"xid": "g" * 5000} for _ in range(500)), "runs": ("r" * 9000,) * 500},
    ],
)
def test_however_much_an_engine_says_a_file_is_bounded(tmp_path: Path, flood):
    kept = Incidents(tmp_path)
    path = kept.keep(msgspec.structs.replace(FULL, **flood))
    assert path is not None
    assert path.stat().st_size <= MAX_BYTES
    (found,) = kept.recent()
    assert (found.model, found.pid, found.diagnosis) == ("chat", 77, "busy-in-C")


def test_a_flood_keeps_the_last_words_and_the_first_stacks(tmp_path: Path):
    kept = Incidents(tmp_path)
    lines = tuple(f"{number} " + "x" * 400 for number in range(5000))
    kept.keep(msgspec.structs.replace(FULL, stderr=lines, stacks=lines))
    (found,) = kept.recent()
    assert found.stderr[-1] == lines[-1]
    assert found.stacks[0] == lines[0]


def test_a_full_disk_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def full(*_args: object):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(incidents.os, "open", full)
    assert Incidents(tmp_path).keep(FULL) is None
    assert "No space left" in caplog.text
    assert Incidents(tmp_path).recent() == []


def test_a_folder_that_cannot_be_made_is_none_either(tmp_path: Path):
    (tmp_path / "file").write_text("")
    kept = Incidents(tmp_path / "file" / "below")
    assert kept.keep(FULL) is None
    assert kept.recent() == []
