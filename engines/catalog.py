"""The engines that ship, as data. The supervisor reads this table; it never imports an engine.

An engine of another repository needs no row: `[engines.NAME] module = "their_pkg.engine"` in worker.toml.
"""

from __future__ import annotations

import msgspec


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine needs of the sandbox besides its libraries, its model, and its own folder.

    Attributes:
        network: "none", "unix" (streams to itself, through its own folder), "loopback" (of its own, shared with
            nobody) or "host".
        spawns: runs programs of the operator.
    """

    network: str = "none"
    spawns: bool = False


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        module: importable module that names its class as `ENGINE`.
        kinds: task kinds it can serve.
        backends: names for `[[models]] backend`; the first is the default.
        extra: backend -> extra of this distribution that installs its library; "" when none is needed.
        devices: devices that `engine-probe` tries.
        licence: of the library, where it is not permissive, in words for people.
        needs_model: whether `[[models]]` must name files.
        profile: what the sandbox grants it.
        silent: its runs may show no progress for hours; only the job's deadline ends them.
    """

    module: str
    kinds: tuple[str, ...]
    backends: tuple[str, ...] = ("",)
    extra: dict[str, str] = {}
    devices: tuple[str, ...] = ("cpu", "cuda")
    licence: str = ""
    needs_model: bool = True
    silent: bool = False
    profile: Profile = Profile()


CATALOG: dict[str, Entry] = {
    "llm": Entry(
        module="engines.llm.engine",
        kinds=("llm",),
        backends=("xllamacpp", "llama-cpp-python"),
        extra={"xllamacpp": "llm", "llama-cpp-python": "llm-llamacpp"},
        profile=Profile(network="unix"),
    ),
    "embed": Entry(
        module="engines.embed.engine",
        kinds=("embedding",),
        backends=("onnx", "gguf"),
        extra={"onnx": "embed", "gguf": "embed"},
        profile=Profile(network="unix"),
    ),
    "whisper": Entry(module="engines.whisper.engine", kinds=("audio_stt",), extra={"": "stt"}),
    "piper": Entry(
        module="engines.piper.engine",
        kinds=("audio_tts",),
        extra={"": "tts"},
        licence="piper-tts is GPL-3.0-or-later; it runs in a process of its own",
    ),
    "image": Entry(module="engines.image.engine", kinds=("image",), extra={"": "image"}),
    "video": Entry(module="engines.video.engine", kinds=("video",), extra={"": "video"}),
    "command": Entry(
        module="engines.command.engine",
        kinds=("command",),
        devices=("cpu",),
        needs_model=False,
        silent=True,
        profile=Profile(spawns=True),
    ),
    "server": Entry(
        module="engines.server.engine",
        kinds=("llm", "embedding", "rerank", "audio_tts", "image"),
        devices=("cpu",),
        needs_model=False,
        profile=Profile(network="loopback", spawns=True),
    ),
    "synthetic": Entry(
        module="engines.synthetic.engine",
        kinds=("llm", "embedding", "rerank", "audio_stt", "audio_tts", "image", "video", "command"),
        devices=("cpu",),
        needs_model=False,
    ),
}
