"""A supervisor that serves every real engine, healthy models beside broken ones, for tests that talk HTTP to it.

The broken models are broken in ways that operators meet: a wrong option, a file that was cut
short, a file whose digest is not the configured one, a data folder of another version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ROOT / "engines"
CHAT = ENGINES / "llm/fixture/chat-q8_0.gguf"
EMBED = ENGINES / "embed/fixture/tiny-embed-onnx"
WHISPER = ENGINES / "whisper/fixture/whisper-tiny-test"
VOICE = ENGINES / "piper/fixture/tone-text.onnx"
ESPEAK = ENGINES / "piper/fixture/tone-espeak.onnx"
IMAGE = ENGINES / "image/fixture/tiny-sd-onnx"

READY_S = 240.0
END_S = 60.0
# One run of a hanging engine lasts this long; every real engine here shows progress within milliseconds, but not while
# the machine stands still.
FIRST_OUTPUT_S = 12.0
HAS_LLAMA_CPP_PYTHON = importlib.util.find_spec("llama_cpp") is not None

LIMITS = f"[limits]\nfirst_output_s = {FIRST_OUTPUT_S}\ncancel_grace_s = 0.5\nterm_grace_s = 0.5\ndrain_s = 10"
# Engines that misbehave on demand, one lane each, so that one's pause after a crash does not hold up another.
BAD = ("segv", "exit", "hang", "stream", "retried", "plain")
LLMS = ("chat", "chat-py") if HAS_LLAMA_CPP_PYTHON else ("chat",)


def sha256(path: Path) -> str:
    """Digest of a file, or of a folder as `models pull` writes it: of the listing that sha256sum makes."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    names = sorted(file.relative_to(path).as_posix().encode() for file in path.rglob("*") if file.is_file())
    lines = (f"{sha256(path / name.decode())}  ".encode() + name + b"\n" for name in names)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def copy(source: Path, target: Path) -> Path:
    """Copy a model's file or folder, and a voice's config with it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    if (config := Path(f"{source}.json")).exists():
        shutil.copy(config, f"{target}.json")
    return Path(shutil.copy(source, target))


def cut(path: Path) -> None:
    """Keep the first half, as a download that broke off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    """Flip one bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


class Model:
    """One `[[models]]` entry."""

    def __init__(self, name: str, engine: str, path: Path | None = None, **more: Any) -> None:
        self.name, self.engine, self.path, self.more = name, engine, path, more

    def toml(self) -> str:
        """The entry."""
        values = {"name": self.name, "engine": self.engine, **self.more}
        if self.path is not None:
            values["path"] = str(self.path)
        return "\n".join(["[[models]]", *(f"{key} = {to_toml(value)}" for key, value in values.items())])


def to_toml(value: Any) -> str:
    """JSON's texts, lists and numbers are TOML's as well; tables are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {to_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def healthy() -> list[Model]:
    """Every real engine, both backends of llm where they are installed."""
    program = [sys.executable, "-I", "-c", "import sys; print('hello', sys.argv[1])", "{who}"]
    models = [
        Model("chat", "llm", CHAT),
        Model("embed", "embed", EMBED),
        Model("embed-gguf", "embed", CHAT, backend="gguf"),
        Model("whisper", "whisper", WHISPER),
        Model("voice", "piper", VOICE, options={"voices": {"alloy": "default"}}),
        Model("voice-espeak", "piper", ESPEAK),
        Model("image", "image", IMAGE),
        Model("video", "video", IMAGE),
        Model("greet", "command", options={"argv": program}),
        Model("synthetic-slow", "synthetic", kinds=["llm"], options={"slots": 1, "tokens": 6000, "delay_ms": 10}),
    ]
    if HAS_LLAMA_CPP_PYTHON:
        models.append(Model("chat-py", "llm", CHAT, backend="llama-cpp-python"))
    return models


def broken(folder: Path) -> list[Model]:
    """Models that cannot be loaded. Those of `LATE` are whole until a test damages them."""

    folder.mkdir()

    def damaged(source: Path, name: str, inside: str = "") -> Path:
        path = copy(source, folder / name)
        cut(path / inside if inside else path)
        return path

    def late(source: Path, name: str) -> tuple[Path, dict[str, str]]:
        path = copy(source, folder / name)
        return path, {"model": sha256(path)}

    empty, old = folder / "no-espeak", folder / "old-espeak"
    empty.mkdir()
    old.mkdir()
    for name in ("phontab", "phondata", "phonindex", "intonations"):
        (old / name).write_bytes(bytes(64))
    cut_gguf = damaged(CHAT, "cut.gguf")
    models = [
        Model("huge-chat", "llm", CHAT, options={"n_ctx": 100_000_000}),
        Model("cut-chat", "llm", cut_gguf),
        Model("cut-embed", "embed", damaged(EMBED, "cut-embed", "onnx/model.onnx")),
        Model("cut-whisper", "whisper", damaged(WHISPER, "cut-whisper", "model.bin")),
        Model("cut-voice", "piper", damaged(VOICE, "cut.onnx")),
        Model("cut-image", "image", damaged(IMAGE, "cut-image", "unet/model.onnx")),
        Model("no-espeak", "piper", ESPEAK, options={"espeak_data": str(empty)}),
        Model("old-espeak", "piper", ESPEAK, options={"espeak_data": str(old)}),
        Model(NEVER_ANNOUNCED, "llm", flipped := copy(CHAT, folder / "flipped.gguf"), sha256={"model": sha256(CHAT)}),
    ]
    flip(flipped)
    for name, (engine, source, _inside) in LATE.items():
        path, digest = late(source, name)
        models.append(Model(name, engine, path, sha256=digest))
    if HAS_LLAMA_CPP_PYTHON:
        models.append(Model("huge-chat-py", "llm", CHAT, backend="llama-cpp-python", options={"n_ctx": 100_000_000}))
        models.append(Model("cut-chat-py", "llm", cut_gguf, backend="llama-cpp-python"))
    return models


NEVER_ANNOUNCED = "flipped-chat"
# Whole when they are announced, damaged before their first load: name -> engine, source, file inside it.
LATE = {
    "late-chat": ("llm", CHAT, ""),
    "late-embed": ("embed", EMBED, "onnx/model.onnx"),
    "late-whisper": ("whisper", WHISPER, "model.bin"),
    "late-voice": ("piper", VOICE, ""),
}


def make_hanging(folder: Path) -> Path:
    """The model whose network never returns for pictures higher than 128 pixels."""
    argv = [str(ROOT / "scripts/make-fixtures"), str(folder), "image-hang"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return folder / "tiny-sd-hang"


class Served:
    """A running `supervisor run` with its embedded coordinator.

    Attributes:
        http: a client with the key.
        names: models that are announced at the start.
    """

    def __init__(self, folder: Path, models: list[Model]) -> None:
        """Start it and wait until all of `models` are announced, but the one with a wrong digest."""
        self.folder, self.state, self.log = folder, folder / "state", folder / "supervisor.log"
        self.names = {model.name for model in models} - {NEVER_ANNOUNCED}
        config = folder / "worker.toml"
        config.write_text(
            "\n\n".join(
                [
                    'config_version = 1\n[coordinator]\nurl = "embedded"\nlisten = "127.0.0.1:0"',
                    f'[worker]\nname = "served"\nstate_dir = {json.dumps(str(self.state))}',
                    LIMITS,
                    '[engines.bad]\nmodule = "engines.synthetic.misbehave"',
                    *(model.toml() for model in models),
                ]
            )
        )
        argv = [sys.executable, "-m", "supervisor", "run", "--config", str(config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            self.url, self.key = self._ready()
        except BaseException:
            self._sweep()
            raise
        headers = {"Authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def words(self) -> str:
        """The log."""
        return self.log.read_text(errors="replace")

    def _ready(self) -> tuple[str, str]:
        until, seen = time.monotonic() + READY_S, set[str]()
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
                told = json.loads((self.state / "endpoint.json").read_text())
                key = Path(told["client_key_file"]).read_text().strip()
                answer = httpx.get(
                    f"{told['url']}/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False
                )
                seen = {model["id"] for model in answer.json()["data"]}
                if seen >= self.names:
                    return told["url"], key
            time.sleep(0.05)
        raise AssertionError(f"not announced: {sorted(self.names - seen)}\n{self.words()}")

    def end(self) -> None:
        """SIGTERM, as a service manager would. AssertionError unless it ends well and leaves no process."""
        self.http.close()
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_S)
            _, alive = psutil.wait_procs(family, timeout=END_S)
        finally:
            self._sweep()
        assert code == 0, f"exit code {code}\n{self.words()}"
        assert not alive, f"left behind: {alive}"
        assert "Traceback" not in self.words(), self.words()

    def _sweep(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()
        self.process.wait(END_S)


@contextlib.contextmanager
def serve(folder: Path, models: list[Model]) -> Iterator[Served]:
    """A `Served` for the block, which must end well and leave no process behind."""
    served = Served(folder, models)
    try:
        yield served
    except BaseException:
        served._sweep()
        raise
    served.end()
