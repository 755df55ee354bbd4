"""The makers give the shipped fixtures again, and the libraries load what has random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "engines"

SHIPPED = {
    "tiny-sd-onnx": ENGINES / "image" / "fixture" / "tiny-sd-onnx",
    "hang.onnx": ENGINES / "image" / "fixture" / "hang.onnx",
    "tone-text.onnx": ENGINES / "piper" / "fixture" / "tone-text.onnx",
    "tone-text.onnx.json": ENGINES / "piper" / "fixture" / "tone-text.onnx.json",
    "tone-espeak.onnx": ENGINES / "piper" / "fixture" / "tone-espeak.onnx",
    "tone-espeak.onnx.json": ENGINES / "piper" / "fixture" / "tone-espeak.onnx.json",
    "tiny-embed-onnx": ENGINES / "embed" / "fixture" / "tiny-embed-onnx",
}


def make(out: Path, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-P", "-W", "error", "-m", "make_fixtures", str(out), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("onnx", "gguf", "tokenizers", "ctranslate2"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    out = tmp_path_factory.mktemp("made")
    done = make(out)
    assert done.returncode == 0, done.stderr
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content; of a single file, under the name ""."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.engine
@pytest.mark.parametrize("name", list(SHIPPED))
def test_the_shipped_fixture_is_what_the_maker_writes(made: Path, name: str) -> None:
    found, shipped = files(made / name), files(SHIPPED[name])
    assert found.keys() == shipped.keys()
    for part, content in found.items():
        if (name + part).endswith(".onnx"):
            onnx = pytest.importorskip("onnx")
            assert onnx.load_from_string(content) == onnx.load_from_string(shipped[part]), part
        elif (name + part).endswith(".json"):
            import json

            assert json.loads(content) == json.loads(shipped[part]), part
        else:
            assert content == shipped[part], part


@pytest.mark.engine
def test_the_same_call_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    assert make(tmp_path, "image", "llama", "whisper").returncode == 0
    for name in ("tiny-sd-onnx", "random-q8_0.gguf", "whisper-random"):
        assert files(tmp_path / name) == files(made / name)


@pytest.mark.engine
def test_the_trained_whisper_has_the_makers_tokenizer(made: Path) -> None:
    shipped = ENGINES / "whisper" / "fixture" / "whisper-tiny-test"
    for name in ("tokenizer.json", "vocabulary.json", "preprocessor_config.json"):
        import json

        assert json.loads((made / "whisper-random" / name).read_text()) == json.loads((shipped / name).read_text())


_CHAT = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.hostnames, params.verbosity = 256, 1, [sys.argv[2]], 0
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": "hello", "max_tokens": 5, "temperature": 0})
print("tokens", answer["usage"]["completion_tokens"], flush=True)
import os
os._exit(0)  # dropping a fresh server has been seen to hang
"""


@pytest.mark.engine
def test_the_random_llama_runs_in_llama_cpp(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the llm extra is not installed")
    model = made / "random-q8_0.gguf"
    assert 150_000 < model.stat().st_size < 170_000
    command = [sys.executable, "-c", _CHAT, str(model), "./x.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.startswith("tokens "), done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 0


@pytest.mark.engine
def test_the_broken_llamas_are_broken(made: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = made / "broken-gguf"
    assert len(list(folder.glob("*.gguf"))) == 13
    sound = {"short_vocabulary", "heads_mismatch", "nan", "missing_tensor"}  # wrong in content, not in form
    for path in folder.glob("*.gguf"):
        read: Any = None
        try:
            read = gguf.GGUFReader(path)
        except Exception:
            assert path.stem not in sound
        else:
            assert path.stem in sound
            assert read.tensors


@pytest.mark.engine
def test_the_random_whisper_runs_in_faster_whisper(made: Path) -> None:
    faster_whisper = pytest.importorskip("faster_whisper", reason="the stt extra is not installed")
    np = pytest.importorskip("numpy")
    model = faster_whisper.WhisperModel(str(made / "whisper-random"), device="cpu", local_files_only=True)
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    segments, about = model.transcribe(audio, language="en", beam_size=1, max_new_tokens=8)
    for segment in segments:
        assert isinstance(segment.text, str)
    assert about.duration == pytest.approx(1.0)


@pytest.mark.engine
def test_the_script_names_its_makers_and_refuses_others(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    command = [str(ROOT / "scripts" / "make-fixtures"), str(tmp_path), "hang"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "made hang\n"), done.stderr
    assert (tmp_path / "hang.onnx").is_file()
    refused = make(tmp_path, "hangs")
    assert refused.returncode == 2
    assert "image-hang" in refused.stderr
