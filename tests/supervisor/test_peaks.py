"""What models took of the GPU earlier."""

from __future__ import annotations

import threading

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from supervisor import peaks
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake.placement import CONTEXT_BYTES
from supervisor.peaks import Peaks, facts_of, read_facts, whole_need

GIB = 2**30


def spec(**model: object) -> ModelSpec:
    engine = EngineSpec(name="llm", module="none", python="none")
    return ModelSpec(name="m", engine=engine, model=wire.Model(name="m", **model))


def test_what_is_learned_outlives_the_process(tmp_path):
    path = tmp_path / "vram.json"
    Peaks(path).learn("k", {"GPU-1": 100, "GPU-2": 50})
    again = Peaks(path)
    assert again.most("k", ["GPU-2"]) == 50
    assert again.most("k", ["GPU-2", "GPU-1"]) == 100
    assert again.most("k", ["GPU-3"]) is None
    assert again.most("k", []) == 100
    assert again.most("other", ["GPU-1"]) is None


def test_what_lay_on_several_gpus_is_learned_as_if_it_lay_on_one(tmp_path):
    path = tmp_path / "vram.json"
    held = {"GPU-1": 5 * GIB, "GPU-2": 6 * GIB}
    Peaks(path).learn("k", whole_need(held))
    assert Peaks(path).most("k", ["GPU-1"]) == 11 * GIB - CONTEXT_BYTES
    assert whole_need({"GPU-1": 5}) == {"GPU-1": 5}


def test_one_small_peak_does_not_undo_a_large_one(tmp_path):
    known = Peaks(tmp_path / "vram.json")
    known.learn("k", {"GPU-1": 1000})
    known.learn("k", {"GPU-1": 10})
    assert known.most("k", ["GPU-1"]) == 750
    known.learn("k", {"GPU-1": 2000})
    assert known.most("k", ["GPU-1"]) == 2000


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"k": 5}', b"\xff"])
def test_a_broken_file_costs_only_estimates(tmp_path, caplog, data):
    path = tmp_path / "vram.json"
    path.write_bytes(data)
    known = Peaks(path)
    assert known.most("k", ["GPU-1"]) is None
    assert "is lost" in caplog.text
    known.learn("k", {"GPU-1": 1})
    assert Peaks(path).most("k", ["GPU-1"]) == 1


def test_a_first_life_says_nothing(tmp_path, caplog):
    Peaks(tmp_path / "vram.json")
    assert caplog.text == ""


def test_a_full_disk_is_said_and_not_fatal(tmp_path, caplog):
    known = Peaks(tmp_path / "no such folder" / "vram.json")
    known.learn("k", {"GPU-1": 1})
    assert known.most("k", ["GPU-1"]) == 1
    assert "cannot be kept" in caplog.text


def test_the_file_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "MOST", 3)
    path = tmp_path / "vram.json"
    known = Peaks(path)
    for number in range(5):
        known.learn(f"k{number}", {"GPU-1": number + 1})
    assert list(msgspec.json.decode(path.read_bytes())) == ["k2", "k3", "k4"]


async def test_facts_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "part").write_bytes(b"x" * 10)
    (tmp_path / "folder" / "part").write_bytes(b"x" * 20)
    (tmp_path / "one").write_bytes(b"x" * 5)
    files = {"model": str(tmp_path / "folder"), "vae": str(tmp_path / "one"), "gone": str(tmp_path / "gone")}
    facts = await facts_of(spec(files=files))
    assert facts.file_bytes == 35
    assert facts.kv_tokens == 0


def test_the_context_of_an_llm_counts():
    assert read_facts(spec(kinds=("llm",), options={"n_ctx": 1000, "slots": 4})).kv_tokens == 4000
    assert read_facts(spec(kinds=("llm",))).kv_tokens == peaks.DEFAULT_TOKENS
    assert read_facts(spec(kinds=("llm",), options={"n_ctx": "many"})).kv_tokens == peaks.DEFAULT_TOKENS


def test_another_file_configuration_or_device_is_another_key(tmp_path):
    path = tmp_path / "one"
    path.write_bytes(b"x")
    plain = spec(files={"model": str(path)}, options={"n_ctx": 1, "slots": 2})
    same = spec(files={"model": str(path)}, options={"slots": 2, "n_ctx": 1})
    key = read_facts(plain).key
    assert read_facts(same).key == key
    assert read_facts(spec(files={"model": str(path)}, options={"n_ctx": 2})).key != key
    assert read_facts(spec(files={"model": str(path)}, device="cuda")).key != key
    path.write_bytes(b"xy")
    assert read_facts(plain).key != key
    known = spec(files={"model": str(path)}, revision="abc")
    before = read_facts(known).key
    path.write_bytes(b"xyz")
    assert read_facts(known).key == before


async def test_a_disk_that_is_gone_holds_nobody_up(monkeypatch):
    back = threading.Event()
    monkeypatch.setattr(peaks, "read_facts", lambda _spec: back.wait(120))
    try:
        with trio.fail_after(60), trio.move_on_after(0.05) as patience:
            await facts_of(spec())
        assert patience.cancelled_caught
    finally:
        back.set()
