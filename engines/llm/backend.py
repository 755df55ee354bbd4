"""What the engine asks of a library, and what every library is asked for in the same way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from engines.llm.answer import Answer
from engines.runtime.contract import Job, Model, Ready, known_options, option, refuse
from engines.runtime.gguf import Header
from engines.runtime.threads import threads_of
from protocol.work import LlmParams

DEFAULT_CTX = 8192  # tokens per slot when the model was trained for more: most answers fit, most GPUs take it
DEFAULT_SLOTS = 4
_CACHE_BYTES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}

# llama.cpp's own defaults, said aloud because its two bindings differ.
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 40, 0.95, 0.05


class Backend(Protocol):
    """One loaded model behind one library.

    Attributes:
        ready: what the host is told.
        n_ctx: tokens of one slot, prompt and answer together.
    """

    ready: Ready
    n_ctx: int

    def check(self, params: LlmParams) -> None:
        """Refuse what this library or model cannot do. Raises FaultError naming the field."""

    def count(self, params: LlmParams) -> int:
        """Tokens of the prompt as the model will see it. Raises FaultError when its template refuses it."""

    def answer(self, params: LlmParams, job: Job) -> Answer:
        """An empty answer for this request."""

    def run(self, params: LlmParams, job: Job, answer: Answer) -> dict[str, float]:
        """Generate into `answer` and return the usage. Raises CancelledRun, FaultError."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Load options: `[models.options]`. None leaves the choice to llama.cpp.

    Attributes:
        n_ctx: tokens of one slot.
        slots: runs at once, batched together.
        threads: CPU threads, shared by the slots.
        n_gpu_layers: layers to put on the GPU; -1 means as many as fit.
        flash_attn: on, off, or where it helps.
        chat_template: Jinja text that replaces the model's own.
        cache_type: element type of the context memory.
        tensor_split: how much of the model each visible GPU takes, in proportion; empty leaves it to the library.
        prompt_cache_mib: host memory for prompts of earlier requests (xllamacpp only).
    """

    n_ctx: int
    slots: int
    threads: int
    n_gpu_layers: int = -1
    n_batch: int = 2048
    n_ubatch: int = 512
    flash_attn: bool | None = None
    chat_template: str = ""
    cache_type: str = "f16"
    use_mmap: bool = True
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    prompt_cache_mib: int = 0


_TensorSplit = Annotated[list[Annotated[float, Meta(ge=0, le=1e15)]], Meta(max_length=16)]


def read_options(model: Model, header: Header, *, slots: int) -> Options:
    """Check the load options against their ranges and the model.

    Args:
        slots: default for the option; 1 for a library that runs one at a time, which then refuses more.

    Raises:
        FaultError: `load_failed`, naming `options.NAME`.
    """
    known_options(model, Options.__struct_fields__)
    trained = header.n_ctx_train
    n_ctx = option(model, "n_ctx", Annotated[int, Meta(ge=16, le=2**31 - 1)], min(trained or DEFAULT_CTX, DEFAULT_CTX))
    if trained and n_ctx > trained:
        raise refuse(
            "load_failed",
            f"options.n_ctx: {n_ctx} tokens exceed the {trained} that this model was trained for.",
            "options.n_ctx",
        )
    batch = Annotated[int, Meta(ge=1, le=65_536)]
    found = Options(
        n_ctx=n_ctx,
        slots=option(model, "slots", Annotated[int, Meta(ge=1, le=256)], slots),
        threads=threads_of(model),
        n_gpu_layers=option(model, "n_gpu_layers", Annotated[int, Meta(ge=-1, le=10_000)], -1),
        n_batch=option(model, "n_batch", batch, 2048),
        n_ubatch=option(model, "n_ubatch", batch, 512),
        flash_attn=option(model, "flash_attn", bool | None, None),
        chat_template=option(model, "chat_template", Annotated[str, Meta(max_length=1_000_000)], ""),
        cache_type=_cache_type(model),
        use_mmap=option(model, "use_mmap", bool, True),
        main_gpu=option(model, "main_gpu", Annotated[int, Meta(ge=0, le=63)], 0),
        tensor_split=tuple(option(model, "tensor_split", _TensorSplit, [])),
        prompt_cache_mib=option(model, "prompt_cache_mib", Annotated[int, Meta(ge=0, le=2**20)], 0),
    )
    if slots == 1 and found.slots > 1:
        sentence = "options.slots: llama-cpp-python runs one request at a time; use the backend xllamacpp."
        raise refuse("load_failed", sentence, "options.slots")
    return found


def _cache_type(model: Model) -> str:
    found: str = option(model, "cache_type", str, "f16")
    if found not in _CACHE_BYTES:
        sentence = f"options.cache_type: expected one of {', '.join(_CACHE_BYTES)}."
        raise refuse("load_failed", sentence, "options.cache_type")
    return found


def check_memory(options: Options, header: Header, memory_bytes: int) -> None:
    """Refuse a context whose memory alone exceeds all that the machine has. Raises FaultError.

    A context that merely does not fit beside other programs is the library's to refuse: only it knows.
    """
    per_token = header.kv_bytes_per_token(_CACHE_BYTES[options.cache_type])
    needed = per_token * options.n_ctx * options.slots
    if needed > memory_bytes:
        raise refuse(
            "load_failed",
            f"options.n_ctx: {options.slots} x {options.n_ctx} tokens of context need {needed / 2**30:.1f} GiB, "
            f"this machine has {memory_bytes / 2**30:.1f} GiB.",
            "options.n_ctx",
        )


def host_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fit(prompt_tokens: int, params: LlmParams, n_ctx: int) -> None:
    """Refuse what does not fit the context, as OpenAI's servers do: nothing is ever cut off.

    `max_tokens` that was asked for must fit beside the prompt; when it was not, the answer may fill what is left.

    Raises:
        FaultError: `context_length_exceeded`, with the counts.
    """
    field = field_name(params)
    wanted = params.max_tokens if params.max_tokens is not None else 1
    if prompt_tokens + wanted <= n_ctx:
        return
    if prompt_tokens + 1 <= n_ctx:
        field = "max_tokens"
    asked = f" ({prompt_tokens} in the {field_name(params)}, {wanted} in the completion)"
    raise refuse(
        "context_length_exceeded",
        f"{field}: this model's maximum context length is {n_ctx} tokens, but {prompt_tokens + wanted} were "
        f"requested{asked}. Shorten the {'completion' if field == 'max_tokens' else field}.",
        field,
        n_prompt_tokens=prompt_tokens,
        n_ctx=n_ctx,
    )


def field_name(params: LlmParams) -> str:
    """The field that holds the prompt."""
    return "messages" if params.messages is not None else "prompt"


def ready(header: Header, n_ctx: int, **fields: Any) -> Ready:
    """`Ready` with what every backend says alike."""
    limits = {"n_ctx": n_ctx, "n_ctx_train": header.n_ctx_train, **fields.pop("limits", {})}
    return Ready(compute_type=header.compute_type, limits=limits, **fields)


def model_path(model: Model, path: Path) -> Path:
    """The file to load; a folder is accepted when it holds exactly one GGUF model."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    first = [file for file in found if "-00001-of-" in file.name] or found
    if len(first) != 1:
        raise refuse("load_failed", f"{path} holds {len(first)} GGUF models; name one file.", "files.model")
    return first[0]
