"""`supervisor models`: the real child, real HTTP, a real worker.toml."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supervisor.config import load
from supervisor.errors import ExitCode

ENGINES = Path(__file__).parents[2] / "engines"
CHAT = ENGINES / "llm" / "fixture" / "chat-q8_0.gguf"
WHISPER = ENGINES / "whisper" / "fixture" / "whisper-tiny-test"
VOICE = ENGINES / "piper" / "fixture" / "tone-text.onnx"
COMMAND = [sys.executable, "-m", "supervisor", "models"]


@pytest.fixture
def box(models_box: Any) -> Any:
    """`conftest.ModelsBox`."""
    return models_box


# ---- from nothing --------------------------------------------------------------------------------------------


def test_a_newcomers_first_command(box: Any):
    shutil.copy(CHAT, box.folder / "work" / "my.gguf")
    assert box.run("pull", "./my.gguf") == 0, box.err
    (entry,) = box.entries()
    assert entry["name"] == "my"
    assert entry["engine"] == "llm"
    assert entry["sha256"]["model"] == hashlib.sha256(CHAT.read_bytes()).hexdigest()
    assert Path(entry["path"]) == box.models / "my" / "my.gguf"
    assert "`supervisor run`" in box.out
    box.check()
    assert load(box.toml).coordinator.url == "embedded"


def test_a_local_file_costs_no_second_copy_and_stays(box: Any):
    source = box.folder / "work" / "my.gguf"
    shutil.copy(CHAT, source)
    box.run("pull", str(source))
    assert (box.models / "my" / "my.gguf").samefile(source)
    assert box.run("remove", "my") == 0
    assert source.read_bytes() == CHAT.read_bytes()


def test_another_file_system_gets_a_copy(box: Any, monkeypatch, tmp_path: Path):
    shutil.copy(CHAT, box.folder / "work" / "my.gguf")
    if os.stat("/dev/shm").st_dev == os.stat(box.folder).st_dev:
        pytest.skip("/dev/shm is no other file system here")
    elsewhere = Path("/dev/shm") / f"bulkhead-test-{os.getpid()}"
    try:
        assert box.run("pull", "my.gguf", "--models-dir", str(elsewhere)) == 0, box.err
        assert (elsewhere / "my" / "my.gguf").read_bytes() == CHAT.read_bytes()
        box.check()
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_folders_and_voices(box: Any):
    assert box.run("pull", str(WHISPER)) == 0, box.err
    assert box.run("pull", str(VOICE), "--name", "org/tone") == 0, box.err
    folder, voice = box.entries()
    assert folder["engine"] == "whisper"
    assert Path(folder["path"]).is_dir()
    assert voice["name"] == "org/tone"
    assert voice["engine"] == "piper"
    assert set(voice["sha256"]) == {"model", "config"}
    box.check()


def test_a_damaged_file_is_noticed_before_its_load(box: Any):
    shutil.copy(CHAT, "my.gguf")
    box.run("pull", "my.gguf")
    model = box.models / "my" / "my.gguf"
    data = bytearray(model.read_bytes())
    data[1000] ^= 1
    model.write_bytes(data)
    with pytest.raises(Exception, match="damaged"):
        box.check()


# ---- what is refused -------------------------------------------------------------------------------------------


def test_a_second_model_of_the_same_name_wants_force(box: Any):
    shutil.copy(CHAT, "my.gguf")
    box.run("pull", "my.gguf")
    assert box.run("pull", "my.gguf") == ExitCode.FAILED
    assert "--name" in box.err
    assert "--force" in box.err
    assert box.run("pull", "my.gguf", "--name", "other") == 0
    assert box.run("pull", str(WHISPER), "--name", "my", "--force") == 0, box.err
    assert [(entry["name"], entry["engine"]) for entry in box.entries()] == [("my", "whisper"), ("other", "llm")]
    assert not (box.models / "my" / "my.gguf").exists()
    box.check()


def test_a_wrong_digest_leaves_nothing(box: Any):
    shutil.copy(CHAT, "my.gguf")
    assert box.run("pull", "my.gguf", "--sha256", "0" * 64) == ExitCode.FAILED
    assert "0" * 64 in box.err
    assert not box.toml.exists()
    assert [path.name for path in box.models.iterdir()] == [".store"]


def test_files_of_no_known_kind_want_an_engine_and_are_kept(box: Any):
    Path("net.onnx").write_bytes(b"onnx")
    assert box.run("pull", "net.onnx") == ExitCode.FAILED
    assert "--engine" in box.err
    assert "is kept" in box.err
    assert box.run("pull", "net.onnx", "--engine", "piper") == 0, box.err
    assert box.entries()[0]["path"] == str(box.models / "net" / "net.onnx")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["./absent.gguf"], "no such file"),
        (["x", "--sha256", "abc"], "64 hexadecimal"),
        (["http://models.example/m.gguf", "--sha256", "0" * 64], "not encrypted"),
        (["http://127.0.0.1:9/m.gguf"], "needs --sha256"),
        (["a b c"], "no such file or folder"),
        ([str(CHAT), "--engine", "lmm"], "there is no engine 'lmm'"),
        ([str(CHAT), "--name", ".."], "cannot name a folder"),
    ],
)
def test_bad_asks_are_one_sentence(box: Any, argv: list[str], said: str):
    assert box.run("pull", *argv) == ExitCode.FAILED
    assert said in box.err
    assert box.err.count("\n") == 1
    assert not box.toml.exists()


def test_a_broken_configuration_stops_before_the_download(box: Any):
    Path("worker.toml").write_text("[[models]]\n")
    assert box.run("pull", str(CHAT)) == ExitCode.BAD_CONFIG
    assert "worker.toml:1" in box.err
    assert not box.models.exists()


def test_an_empty_folder_is_told(box: Any):
    Path("empty").mkdir()
    assert box.run("pull", "empty") == ExitCode.FAILED
    assert "holds no file" in box.err


# ---- over HTTP -------------------------------------------------------------------------------------------------


def test_a_url_resumed_over_cut_connections(box: Any, site):
    data = CHAT.read_bytes()
    site.files["/m.gguf"] = data
    site.cut_after["/m.gguf"] = [100_000]
    digest = hashlib.sha256(data).hexdigest()
    assert box.run("pull", f"{site.url}/m.gguf?key=secret", "--sha256", digest.upper()) == 0, box.err
    assert site.ranges_asked() == ["", "bytes=100000-"]
    assert "resuming at 100000 bytes" in box.err
    assert "secret" not in box.toml.read_text()
    box.check()


def test_a_hub_repository(box: Any, site, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.repos["owner/Chat-GGUF"] = {"README.md": b"#", "chat-Q8_0.gguf": CHAT.read_bytes()}
    path = "/owner/Chat-GGUF/resolve/0123456789abcdef0123456789abcdef01234567/chat-Q8_0.gguf"
    site.cut_after[path] = [200_000]
    assert box.run("pull", "owner/Chat-GGUF") == 0, box.err
    (entry,) = box.entries()
    assert entry["name"] == "Chat-GGUF"
    assert entry["engine"] == "llm"
    assert "hf:owner/Chat-GGUF@0123456789abcdef" in box.toml.read_text()
    assert "bytes=200000-" in site.ranges_asked()
    box.check()


def test_a_hub_folder_keeps_its_layout(box: Any, site, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    root = ENGINES / "image" / "fixture" / "tiny-sd-onnx"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    site.repos["owner/sd"] = files | {"unet/model.safetensors": b"not wanted", "README.md": b"#"}
    assert box.run("pull", "hf:owner/sd", "--name", "pictures") == 0, box.err
    (entry,) = box.entries()
    assert entry["engine"] == "image"
    folder = Path(entry["path"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(files)
    box.check()


def test_the_hubs_refusals_reach_the_user(box: Any, site, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    assert box.run("pull", "owner/none") == ExitCode.FAILED
    assert "no public repository owner/none" in box.err
    site.repos["owner/gated"] = {"m.gguf": b"GGUF"}
    site.gated.add("owner/gated")
    assert box.run("pull", "owner/gated") == ExitCode.FAILED
    assert "accept its terms" in box.err


def test_ctrl_c_keeps_what_was_fetched_and_the_same_command_goes_on(box: Any, site, tmp_path: Path):
    data = os.urandom(500_000)
    site.files["/m.bin"] = data
    site.cut_after["/m.bin"] = [300_000]
    site.hold = threading.Event()
    digest = hashlib.sha256(data).hexdigest()
    argv = ["pull", f"{site.url}/m.bin", "--sha256", digest, "--engine", "piper", "--config", str(box.toml)]
    with subprocess.Popen([*COMMAND, *argv], stderr=subprocess.PIPE, text=True) as process:
        assert site.holding.wait(30)
        part = box.models / ".pulling-m" / "m.bin.part"
        _until(lambda: part.exists() and part.stat().st_size == 300_000)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert part.stat().st_size == 300_000
    assert not box.toml.exists()
    site.hold.set()
    assert box.run(*argv) == 0, box.err
    assert site.ranges_asked() == ["", "bytes=300000-"]
    assert (box.models / "m" / "m.bin").read_bytes() == data


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until, "it did not happen within 20 s"
        os.sched_yield()


# ---- list, remove ----------------------------------------------------------------------------------------------


def test_listing_and_removing(box: Any):
    assert box.run("list") == 0
    assert "models pull" in box.out
    shutil.copy(CHAT, "my.gguf")
    box.run("pull", "my.gguf")
    box.run("pull", str(WHISPER))
    assert box.run("list") == 0
    assert "my " in box.out
    assert "KiB" in box.out
    assert box.run("list", "--json") == 0
    first = json.loads(box.out)[0]
    assert (first["name"], first["bytes"]) == ("my", CHAT.stat().st_size)
    assert box.run("remove", "my") == 0
    assert not (box.models / "my").exists()
    assert [entry["name"] for entry in box.entries()] == ["whisper-tiny-test"]
    assert box.run("remove", "whisper-tiny-test", "--keep-files") == 0
    assert (box.models / "whisper-tiny-test").is_dir()
    assert box.run("remove", "my") == ExitCode.FAILED
    assert "has no model named my" in box.err


def test_removing_never_touches_files_that_were_not_pulled(box: Any):
    own = box.folder / "own.gguf"
    shutil.copy(CHAT, own)
    Path("worker.toml").write_text(f'[[models]]\nname = "own"\nengine = "llm"\npath = "{own}"\n')
    assert box.run("remove", "own") == 0
    assert own.exists()


def test_files_that_another_entry_uses_stay(box: Any):
    shutil.copy(CHAT, "my.gguf")
    box.run("pull", "my.gguf")
    path = box.entries()[0]["path"]
    with box.toml.open("a") as file:
        file.write(f'\n[[models]]\nname = "twin"\nengine = "llm"\npath = "{path}"\n')
    assert box.run("remove", "my") == 0
    assert Path(path).exists()


# ---- for deployments ------------------------------------------------------------------------------------------


def test_load_options_come_into_the_entry(box: Any):
    assert box.run("pull", str(CHAT), "--name", "my", "--options", '{"n_ctx": 512}') == 0, box.err
    (entry,) = box.entries()
    assert entry["options"] == {"n_ctx": 512}
    box.check()


@pytest.mark.parametrize("options", ["{", "[1]", '"n_ctx"'])
def test_load_options_that_are_no_object_are_refused_before_anything_is_fetched(box: Any, options: str):
    assert box.run("pull", str(CHAT), "--name", "my", "--options", options) == ExitCode.FAILED
    assert "--options" in box.err
    assert not (box.models / "my").exists()


def test_no_more_is_fetched_than_is_allowed(box: Any):
    assert box.run("pull", str(CHAT), "--name", "my", "--max-gb", "0.00001") == ExitCode.FAILED
    assert "at most" in box.err
    assert not (box.models / "my").exists()
    assert box.run("pull", str(CHAT), "--name", "my", "--max-gb", "nan") == ExitCode.FAILED
    assert "--max-gb" in box.err
    assert box.run("pull", str(CHAT), "--name", "my", "--max-gb", "1") == 0, box.err
