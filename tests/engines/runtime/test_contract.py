"""The contract's own small parts."""

from __future__ import annotations

import hashlib

import pytest

from engines.runtime.contract import CancelledRun, Job, known_options, main_file, option
from protocol.engine_wire import Model, OutputFile
from protocol.faults import FaultError


def test_chunks_go_out_only_when_a_stream_is_wanted():
    seen = []
    Job("llm", None, stream=False, emit=seen.append).emit("x")
    assert seen == []
    Job("llm", None, stream=True, emit=seen.append).emit("x")
    assert seen == ["x"]


def test_progress_is_passed_on():
    seen = []
    Job("llm", None, report=lambda *args: seen.append(args)).progress(3, 9, "step", "text")
    assert seen == [(3, 9, "step", "text")]


def test_a_cancelled_job_raises():
    job = Job("llm", None)
    job.check_cancelled()
    job.cancelled.set()
    with pytest.raises(CancelledRun):
        job.check_cancelled()


def test_saved_and_adopted_files_are_recorded_with_their_digest(tmp_path):
    job = Job("image", None, folder=tmp_path)
    digest = hashlib.sha256(b"data").hexdigest()
    assert job.save("a.bin", "x/y", b"data") == OutputFile("a.bin", "x/y", 4, digest)
    (tmp_path / "b.bin").write_bytes(b"data")
    assert job.adopt("b.bin", "x/y") == OutputFile("b.bin", "x/y", 4, digest)
    assert [file.name for file in job.files] == ["a.bin", "b.bin"]


def test_options_are_typed_and_known():
    model = Model(name="m", options={"n": 3, "text": "x"})
    assert option(model, "n", int, 1) == 3
    assert option(model, "absent", int, 1) == 1
    with pytest.raises(FaultError) as caught:
        option(model, "text", int, 1)
    assert caught.value.fault.field == "options.text"
    known_options(model, ("n", "text"))
    with pytest.raises(FaultError, match="known options: text"):
        known_options(model, ("text",))


def test_the_main_file_must_be_named_and_there(tmp_path):
    with pytest.raises(FaultError, match="names no file"):
        main_file(Model(name="m"))
    with pytest.raises(FaultError, match="does not exist"):
        main_file(Model(name="m", files={"model": str(tmp_path / "x")}))
    assert main_file(Model(name="m", files={"model": str(tmp_path)})) == tmp_path
