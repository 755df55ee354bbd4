"""The load options of the engines that ship, as data: what `[[models]] options` and `[engines.NAME] options` may hold.

The supervisor reads this to find a misspelt option before anything is started; the engine checks again, and against
the model, too. tests/engines/test_catalog_options.py holds both to the same names, types and ranges. Fields without a
default are required.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.catalog import CATALOG
from protocol.ranges import MAX_PIXELS, MAX_VIDEO_FRAMES, MIN_SIDE

_Threads = Annotated[int, Meta(ge=0, le=1024)]
_Slots = Annotated[int, Meta(ge=1, le=64)]
_Batch = Annotated[int, Meta(ge=1, le=65_536)]
_Feature = Literal["tools", "json_schema", "json_object", "logprobs", "top_k", "min_p", "template", "grammar", "vision"]
_USUAL_FEATURES: tuple[_Feature, ...] = (
    "tools",
    "json_schema",
    "json_object",
    "logprobs",
    "top_k",
    "min_p",
    "template",
)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all. UNSET says that the engine or the model chooses."""


class Llm(Options, frozen=True):
    """Load options of the engine `llm`.

    Attributes:
        n_ctx: tokens of one slot, prompt and answer together.
        slots: runs at once, batched together.
        threads: CPU threads, shared by the slots; 0 takes the cores that there are.
        n_gpu_layers: layers to put on the GPU; -1 means as many as fit.
        n_batch, n_ubatch: tokens of a prompt per call of the library, and per step inside it.
        flash_attn: on or off; without it, where it helps.
        chat_template: Jinja text that replaces the model's own.
        cache_type: element type of the context memory.
        use_mmap: map the file instead of reading it.
        main_gpu: the GPU that has what is not split, by its place among the model's.
        tensor_split: how much of the model each of its GPUs takes, in proportion; the worker sets it for `split`.
        prompt_cache_mib: host memory for prompts of earlier requests, in MiB (xllamacpp only).
    """

    n_ctx: Annotated[int, Meta(ge=16, le=2**31 - 1)] | msgspec.UnsetType = msgspec.UNSET
    slots: Annotated[int, Meta(ge=1, le=256)] | msgspec.UnsetType = msgspec.UNSET
    threads: _Threads = 0
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=10_000)] = -1
    n_batch: _Batch = 2048
    n_ubatch: _Batch = 512
    flash_attn: bool | msgspec.UnsetType = msgspec.UNSET
    chat_template: Annotated[str, Meta(max_length=1_000_000)] = ""
    cache_type: Literal["f16", "bf16", "q8_0", "q4_0"] = "f16"
    use_mmap: bool = True
    main_gpu: Annotated[int, Meta(ge=0, le=63)] = 0
    tensor_split: Annotated[list[Annotated[float, Meta(ge=0, le=1e15)]], Meta(max_length=16)] = []
    prompt_cache_mib: Annotated[int, Meta(ge=0, le=2**20)] = 0


class LlmOneByOne(Llm, frozen=True):
    """Load options of the engine `llm` with the backend `llama-cpp-python`, which has one slot."""

    slots: Annotated[int, Meta(ge=1, le=1)] | msgspec.UnsetType = msgspec.UNSET


class Embed(Options, frozen=True):
    """Load options of the engine `embed`.

    Attributes:
        batch_size: most texts per call of the library.
        matryoshka: the model was trained so that the first components of a vector stand alone.
        threads: CPU threads; 0 takes the cores that there are.
        max_tokens: longest text; without it, what the model says.
        pooling: without it, what the model says, else the mean.
    """

    batch_size: Annotated[int, Meta(ge=1, le=2048)] = 32
    matryoshka: bool = False
    threads: _Threads = 0
    max_tokens: Annotated[int, Meta(ge=8, le=2**24)] | msgspec.UnsetType = msgspec.UNSET
    pooling: Literal["mean", "cls", "last"] | msgspec.UnsetType = msgspec.UNSET


class EmbedGguf(Embed, frozen=True):
    """Load options of the engine `embed` with the backend `gguf`.

    Attributes:
        n_gpu_layers: layers to put on the GPU; -1 means as many as fit.
        slots: runs at once.
    """

    n_gpu_layers: Annotated[int, Meta(ge=-1, le=10_000)] = -1
    slots: _Slots = 1


class Whisper(Options, frozen=True):
    """Load options of the engine `whisper`.

    Attributes:
        compute_type: "default" keeps the stored type where the device can: int8, int8_float16, float16, float32, …
        threads: CPU threads of a run; 0 means up to 4, as there are cores.
        slots: runs that really go on side by side, each with its own memory.
        max_audio_s: longest audio taken, in seconds.
    """

    compute_type: str = "default"
    threads: _Threads = 0
    slots: _Slots = 1
    max_audio_s: Annotated[float, Meta(gt=0, le=24 * 3600)] = 4 * 3600.0


class Piper(Options, frozen=True):
    """Load options of the engine `piper`.

    Attributes:
        voices: names of your own for callers: { alloy = "default", echo = "a speaker" }.
        slots: runs at once.
        threads: CPU threads, shared by the slots; 0 takes the cores that there are.
        espeak_data: folder of espeak-ng data; the one inside piper-tts when not named.
    """

    voices: dict[str, str | int] = {}
    slots: _Slots = 1
    threads: _Threads = 0
    espeak_data: str = ""


class Image(Options, frozen=True):
    """Load options of the engine `image`.

    Attributes:
        threads: CPU threads inside one network; 0 takes the cores that there are.
        max_pixels: width x height that a request may ask for; bounds memory.
        default_steps, default_guidance: for requests that name none.
    """

    threads: _Threads = 0
    max_pixels: Annotated[int, Meta(ge=MIN_SIDE**2, le=MAX_PIXELS)] = 1536 * 1536
    default_steps: Annotated[int, Meta(ge=1, le=500)] = 25
    default_guidance: Annotated[float, Meta(ge=0, le=50)] = 7.5


class Video(Image, frozen=True):
    """Load options of the engine `video`.

    Attributes:
        max_frames: frames of one video.
    """

    max_frames: Annotated[int, Meta(ge=1, le=MAX_VIDEO_FRAMES)] = 600


class Command(Options, frozen=True):
    """Load options of the engine `command`.

    Attributes:
        argv: the program and its arguments, with places.
        args: argument -> regular expression that its whole text must match.
        env: environment of the program, besides PATH, HOME and what the engine itself was given.
        env_allow: names that callers may set.
        cwd: working folder; "" means the attempt's folder.
        config_name: name of the job config file in the attempt's folder; "" means that there is none.
        exit_codes: exit code -> fault code, besides 42 -> out_of_memory.
        grace_s: SIGTERM to SIGKILL when a job is cancelled.
        slots: jobs at once.
    """

    argv: list[str]
    args: dict[str, str] = {}
    env: dict[str, str] = {}
    env_allow: list[str] = []
    cwd: str = ""
    config_name: str = ""
    exit_codes: dict[str, str] = {}
    grace_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    slots: Annotated[int, Meta(ge=1, le=1024)] = 1


class Gradio(Options, frozen=True):
    """How a Gradio app makes an image: `options.gradio` of the engine `server`.

    Attributes:
        endpoint: name of the API endpoint, without a slash.
        protocol: "call" (Gradio 4 and 5: POST, then events) or "predict" (older: one POST).
        prefix: "/gradio_api" since Gradio 5, "" before.
        fn_index: number of the function, for "predict" apps that need it.
        data: the inputs in order, with places.
        output: which of the outputs holds the image.
        defaults: values of places that the caller may leave out.
    """

    endpoint: str = "predict"
    protocol: Literal["call", "predict"] = "call"
    prefix: str = "/gradio_api"
    fn_index: int | msgspec.UnsetType = msgspec.UNSET
    data: list[Any] = msgspec.field(default_factory=lambda: ["{prompt}"])
    output: Annotated[int, Meta(ge=0, le=100)] = 0
    defaults: dict[str, float] = {}


class Server(Options, frozen=True):
    """Load options of the engine `server`.

    Attributes:
        argv: a server to start as our child, with places; {socket} or {port} says where it listens.
        url: a server that already runs, instead of `argv`.
        api: what it speaks.
        env: more environment for the child; places as in `argv`.
        health: path that answers 2xx when the server can serve; "" asks for the list of models.
        start_s: how long it may take to become healthy.
        vram_gb: GPU memory that the server will take, in GiB.
        device: where the server runs ("cuda:0"); the engine cannot see it.
        slots: requests at once.
        base: path before the OpenAI routes.
        routes: other paths for single routes.
        served_model: name of the model inside the server; "" means the public name.
        cache_dir: absolute folder that the server keeps between its lives.
        grace_s: SIGTERM to SIGKILL at the end.
        key_env: environment variable that holds the API key of a running server.
        features: optional parameters that the server honours; others are refused, not ignored.
        image_fields: our name of an image parameter -> the server's field.
        gradio: for api = "gradio".
    """

    argv: list[str] = []
    url: str = ""
    api: Literal["openai", "gradio"] = "openai"
    env: dict[str, str] = {}
    health: str = "/health"
    start_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    vram_gb: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    device: str = ""
    slots: Annotated[int, Meta(ge=1, le=4096)] = 1
    base: str = "/v1"
    routes: dict[
        Literal["chat", "completions", "embeddings", "rerank", "speech", "images", "models"],
        str,
    ] = {}
    served_model: str = ""
    cache_dir: str = ""
    grace_s: Annotated[float, Meta(ge=0, le=600)] = 5.0
    key_env: str = ""
    features: list[_Feature] = msgspec.field(default_factory=lambda: list(_USUAL_FEATURES))
    image_fields: dict[str, str] = {}
    gradio: Gradio = Gradio()


class Synthetic(Options, frozen=True):
    """Load options of the engine `synthetic`, whose answers are made up.

    Attributes:
        slots: runs at once.
        load_s: how long the load takes.
        tokens: length of answers; 0 says the prompt back once.
        delay_ms: per token.
        dimensions: of vectors.
        gpu, vram_bytes: pretend to take so much memory of the GPU with this UUID.
    """

    slots: Annotated[int, Meta(ge=1, le=1024)] = 4
    load_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    tokens: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    delay_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] = 64
    gpu: str = ""
    vram_bytes: Annotated[int, Meta(ge=0)] = 0


# Engine -> its backends' options, in the catalogue's order of the backends.
OPTIONS: dict[str, tuple[type[Options], ...]] = {
    "llm": (Llm, LlmOneByOne),
    "embed": (Embed, EmbedGguf),
    "whisper": (Whisper,),
    "piper": (Piper,),
    "image": (Image,),
    "video": (Video,),
    "command": (Command,),
    "server": (Server,),
    "synthetic": (Synthetic,),
}
# Engine -> options that any of its backends takes.
WIDEST: dict[str, type[Options]] = {"llm": Llm, "embed": EmbedGguf}


def options_of(engine: str, backend: str = "") -> type[Options]:
    """The options of an engine of the catalogue, with one backend or, for "", with any. Raises KeyError, ValueError."""
    if not backend:
        return WIDEST.get(engine, OPTIONS[engine][0])
    return OPTIONS[engine][CATALOG[engine].backends.index(backend)]
