"""A server that we start: as our child on a leash, on a Unix socket or a private loopback port."""

from __future__ import annotations

import collections
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engines.runtime.contract import FaultError, LoadProgress, Model, refuse
from engines.runtime.program import Program, describe, inherited
from engines.server import config as configuration
from engines.server.calls import Call, Origin
from engines.server.config import MAX_SOCKET_PATH, Config
from protocol.faults import Fault

TAIL_LINES = 40
HEALTH_TIMEOUT_S = 5.0
HEALTH_EVERY_S = 0.1
# Where common servers keep what is worth keeping; they all end up below the one cache folder.
_CACHES = {
    "XDG_CACHE_HOME": "",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
}


class OwnServer:
    """The child server.

    A thread reads its output, which goes to our stderr, and learns of its end first. `on_death` is called on that
    thread with a sentence when it ends without being asked to.
    """

    def __init__(self, config: Config, model: Model, scratch: Path, on_death: Callable[[str], None]) -> None:
        self._config = config
        self._on_death = on_death
        self._ended = threading.Event()
        self._stopping = False
        self._healthy = False
        self._end = ""
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        places, self.origin = _places(config, model, scratch)
        argv = [configuration.fill(item, places) for item in config.argv]
        asked = {name: configuration.fill(value, places) for name, value in config.env.items()}
        env = {**inherited(), **_cache_env(config), **_device_env(model), **asked}
        self._program = Program(argv, env=env, cwd=scratch, grace_s=config.grace_s)
        threading.Thread(target=self._attend, daemon=True).start()

    def _attend(self) -> None:
        for line in self._program.lines():
            self.tail.append(line)
            sys.stderr.write(line + "\n")
        self._end = f"The server {describe(self._program.wait())}."
        self._ended.set()
        if self._healthy and not self._stopping:
            self._on_death(self._end)

    def wait_healthy(self, progress: LoadProgress) -> None:
        """Until the health path answers 2xx, at most `start_s`; every question is progress.

        Raises:
            FaultError: `load_failed`: it ended, or it was not healthy in time; its last lines are in the detail.
        """
        wait_healthy(self._config, self.origin, progress, self._ended)
        if self._ended.is_set():
            raise self._failed(self._end)
        self._healthy = True

    def died(self, wait_s: float) -> FaultError | None:
        """The fault of runs whose connection broke because the server died; waits a moment to learn of it."""
        if not self._ended.wait(wait_s):
            return None
        return FaultError(Fault("engine_crashed", self._end, detail={"stderr_tail": list(self.tail)}))

    def stop(self) -> None:
        """End it, with its grace period. Does not block."""
        self._stopping = True
        self._program.terminate()

    def failed(self, error: FaultError) -> FaultError:
        """The same load fault with the server's last lines as evidence."""
        return self._failed(error.fault.message)

    def _failed(self, sentence: str) -> FaultError:
        return FaultError(Fault("load_failed", sentence, detail={"stderr_tail": list(self.tail)}))


def wait_healthy(config: Config, origin: Origin, progress: LoadProgress, ended: threading.Event) -> None:
    """Ask the health path until it answers 2xx or `ended` is set. Raises FaultError after `start_s`."""
    until = time.monotonic() + config.start_s
    said = "it does not answer"
    for number in range(1, 2**31):
        if ended.is_set():
            return
        try:
            with Call(origin).open("GET", config.health_path, timeout_s=HEALTH_TIMEOUT_S) as response:
                if response.is_success:
                    return
                said = f"{config.health_path} answers {response.status_code}"
        except FaultError as error:
            said = error.fault.message
        if time.monotonic() >= until:
            break
        progress(number, None, "start")
        ended.wait(HEALTH_EVERY_S)
    raise refuse("load_failed", f"The server is not healthy after {config.start_s:g} s: {said}.", "options.start_s")


def _places(config: Config, model: Model, scratch: Path) -> tuple[dict[str, str], Origin]:
    key = secrets.token_urlsafe(24)
    places = {
        "key": key,
        "model": configuration.model_path(model),
        "cache": config.cache_dir,
        "scratch": str(scratch),
        "name": config.served_model or model.name,
        "socket": "",
        "port": "",
    }
    if configuration.reached_by(config) == "socket":
        places["socket"] = path = str(scratch / "s.sock")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise refuse("load_failed", f"{path} is too long for a Unix socket; use {{port}}.", "options.argv")
        Path(path).unlink(missing_ok=True)
        return places, Origin.at("http://server", socket_path=path, key=key)
    places["port"] = port = str(_free_port())
    return places, Origin.at(f"http://127.0.0.1:{port}", key=key)


def _free_port() -> int:
    """A loopback port that was free a moment ago; nobody can promise more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cache_env(config: Config) -> dict[str, str]:
    if not config.cache_dir:
        return {}
    root = Path(config.cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise refuse("load_failed", f"options.cache_dir: {error.strerror}.", "options.cache_dir") from None
    return {name: str(root / folder) for name, folder in _CACHES.items()}


def _device_env(model: Model) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(model.devices)} if model.devices else {}
