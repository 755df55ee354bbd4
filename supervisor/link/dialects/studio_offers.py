"""What a studio's claim means to us, what our result means to a studio, and what we announce to it. Pure.

A claim becomes a native offer with parameters of our own kinds, whose ranges admission judges. What would change the
picture or the text and cannot be done here (a reference picture) refuses the job; what only colours it (the sampling
method) is left to the model, and told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from protocol import link_wire as wire
from protocol import work
from protocol.ids import is_safe_id
from supervisor.intake.observed import Person
from supervisor.link.dialects import studio_frames as frames

# What studios call the programs behind models. Which one it is does not matter here, since a model is served under its
# name or not at all; one that nobody has heard of is refused, because the claim may mean something we do not know.
KNOWN_ENGINES = frozenset({"sd-cpp", "llama-cpp", "onnx", "parakeet", "synthetic"})
NOT_CHOSEN_STEPS = 20  # the default of the wire, which studios take for "the model's own"
DEFAULT_SIDE = 512
# Of a jobId, which is opaque, goes into addresses, and is kept.
MAX_JOB_CHARS = 1000
_HASHED = "studio-"
_LANGUAGE = re.compile(r"([a-z]{2,3})(?:[-_].*)?\Z", re.IGNORECASE)
_GIB = 2**30


class Unfit(Exception):
    """The job cannot be done here, for the reason of this sentence."""


def native_job(job_id: str) -> str:
    """The native job id of a studio's: the same where that can name a folder, a hash of it else."""
    if is_safe_id(job_id) and not job_id.startswith(_HASHED):  # nobody's own word is another's hash
        return job_id
    return f"{_HASHED}{hashlib.sha256(job_id.encode()).hexdigest()[:32]}"


class Slip(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What delivery has to know of a claim. It goes through the journal as the offer's `upload`.

    Attributes:
        job: the native job id.
        job_id: the studio's own word for it, where that is another.
    """

    job: str
    attempt: int
    kind: str
    job_id: str = ""
    model: str
    prompt: str = ""
    ext: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What names the attempt on the link."""
        return self.job, self.attempt

    @property
    def theirs(self) -> str:
        """What the studio calls the job."""
        return self.job_id or self.job

    def text(self) -> str:
        """For `Offer.upload`."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def read(text: str) -> Slip:
        """What `text` made. Raises ValueError: it was something else."""
        try:
            return msgspec.json.decode(text, type=Slip)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no slip of this dialect: {error}") from None


def offer(claim: frames.Claim, attempt: int, engines: Collection[str] = ()) -> tuple[wire.Offer, Slip, list[str]]:
    """The native offer of a claim, its slip, and what of it is left to the model, as sentences.

    Args:
        engines: names of engines that are announced, which count as known besides those of the studio.

    Raises:
        Unfit: it cannot be taken.
    """
    slug = claim.model_source.engine
    if slug not in KNOWN_ENGINES and slug not in engines:
        raise Unfit(f"modelSource.engine: this worker knows no engine {slug[:50]!r}.")
    kind, params, inputs, prompt, ext, left = _task(claim.task)
    job = native_job(claim.job_id)
    theirs = "" if job == claim.job_id else claim.job_id
    slip = Slip(job=job, job_id=theirs, attempt=attempt, kind=kind, model=claim.model, prompt=prompt, ext=ext)
    try:
        packed = msgspec.msgpack.encode({key: value for key, value in params.items() if value is not None})
    except (OverflowError, RecursionError):
        raise Unfit("task: it holds a whole number of more than 64 bits, or is nested too deeply.") from None
    native = wire.Offer(
        kind=kind,
        model=claim.model,
        params=msgspec.Raw(packed),
        inputs=tuple(inputs),
        upload=slip.text(),
        vram_gb_estimate=claim.vram_gb_estimate,
    )
    return native, slip, left


_Task = tuple[str, dict[str, Any], list[wire.FileRef], str, str, list[str]]


def _task(task: object) -> _Task:
    match task:
        case frames.ImageTask():
            return _image(task)
        case frames.LlmTask():
            return _llm(task)
        case frames.SttTask():
            return _stt(task)
        case frames.TtsTask():
            params = {
                "text": task.text,
                "voice": task.voice,
                "speed": task.speed,
                "language": task.language,
                "format": task.ext,
            }
            return "audio_tts", params, [], task.text, task.ext, []
        case frames.VideoTask():
            return _video(task)
    raise AssertionError(task)  # pragma: no cover


def _image(task: frames.ImageTask) -> _Task:
    if task.ref_image_url:
        raise Unfit("refImageUrl: no engine of this worker takes such a picture.")
    inputs = _input("image", "initImageUrl", task.init_image_url)
    if task.mask_url and not inputs:
        raise Unfit("maskUrl: it belongs to an initImageUrl, and none came.")
    inputs += _input("mask", "maskUrl", task.mask_url)
    if task.denoise == 0 and inputs:
        raise Unfit("denoise: 0 would leave the picture as it is; give more than 0, or no initImageUrl.")
    left = []
    if task.sampling_method:
        left.append(f"samplingMethod {task.sampling_method[:50]!r} is left to the model, which has its own.")
    params = {
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "width": task.width or DEFAULT_SIDE,
        "height": task.height or DEFAULT_SIDE,
        "steps": None if task.steps in (0, NOT_CHOSEN_STEPS) else task.steps,
        "guidance": task.cfg_scale,
        # Ours has 63 bits. The same seed still gives the same picture, which is what it is for.
        "seed": None if task.seed is None else task.seed % 2**63,
        "strength": task.denoise if inputs else None,
        "mask_marks": "white" if task.mask_url else None,
        "format": "jpeg" if task.ext == "jpg" else task.ext,
    }
    return "image", params, inputs, task.prompt, task.ext, left


def _llm(task: frames.LlmTask) -> _Task:
    messages = task.messages
    if task.system:
        messages = [{"role": "system", "content": task.system}, *messages]
    template = dict(task.chat_template_kwargs or {})
    left = []
    if isinstance(task.reasoning, bool):
        template.setdefault("enable_thinking", task.reasoning)
    elif task.reasoning is not None:
        left.append("reasoning is left to the model: only true and false are understood here.")
    params = {
        "messages": messages,
        "max_tokens": task.max_tokens,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "stop": task.stop,
        "json_schema": task.json_schema,
        "chat_template_kwargs": template or None,
    }
    prompt = "\n".join(f"{message.get('role', '')}: {_plain(message.get('content'))}" for message in messages)
    return "llm", params, [], prompt, "", left


def _plain(content: object) -> str:
    return content if isinstance(content, str) else msgspec.json.encode(content).decode()


def _stt(task: frames.SttTask) -> _Task:
    params = {
        "task": "translate" if task.translate else "transcribe",
        "language": _language(task.language),
        "prompt": task.prompt,
        "vad": task.vad,
        "word_timestamps": True if task.timestamps == "word" else None,
    }
    return "audio_stt", params, _input("audio", "inputUrl", task.input_url), task.prompt or "", "", []


def _language(text: str | None) -> str | None:
    """ "en-US" is en; "auto" and nothing mean that it is to be found out."""
    if text is None or text.strip().lower() in ("", "auto"):
        return None
    if not (found := _LANGUAGE.match(text.strip())):
        raise Unfit(f"language: {text[:50]!r} is no ISO code.")
    return found[1].lower()


def _video(task: frames.VideoTask) -> _Task:
    params = {
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "width": task.width or DEFAULT_SIDE,
        "height": task.height or DEFAULT_SIDE,
        "seconds": task.seconds,
        "fps": task.fps,
        "format": task.ext,
    }
    return "video", params, _input("image", "initImageUrl", task.init_image_url), task.prompt, task.ext, []


def _input(name: str, field: str, url: str | None) -> list[wire.FileRef]:
    """An input of which only the address is known, which may be its content itself; delivery bounds its size."""
    if not url:
        return []
    scheme = url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) else ""
    if scheme not in ("", "http", "https", "data"):
        raise Unfit(f"{field}: an address with {scheme}: cannot be fetched; give one with https:, http: or data:.")
    return [wire.FileRef(name=name, url=url, size=0, sha256="")]


# ---- results ------------------------------------------------------------------------------------------------


def json_result(slip: Slip, body: bytes, usage: dict[str, float]) -> dict[str, Any]:
    """What `completeJson` carries. Raises msgspec.MsgspecError: the body is not the result of this kind."""
    if slip.kind == "audio_stt":
        return dict(msgspec.to_builtins(msgspec.msgpack.decode(body, type=work.SttResult)))
    result = msgspec.msgpack.decode(body, type=work.LlmResult)
    message: dict[str, Any] = {"role": "assistant", "content": result.content or ""}
    if result.reasoning_content:
        message["reasoning_content"] = result.reasoning_content
    if result.tool_calls:
        message["tool_calls"] = result.tool_calls
    asked, said = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    return {
        "object": "chat.completion",
        "model": slip.model,
        "choices": [{"index": 0, "message": message, "finish_reason": result.finish_reason}],
        "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
        "elapsed_ms": int(usage.get("compute_ms", 0)),
    }


# ---- capabilities -------------------------------------------------------------------------------------------


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What studios want to know besides what natively is announced.

    Attributes:
        threshold_gb: the owner's word for what a job may need. 0 means the largest GPU, which is never exceeded where
            one is found: a model that is said to fit, and does not, fails at its load.
    """

    machine: str
    user: str
    threshold_gb: float = 0.0


def capabilities(
    native: wire.Capabilities, facts: Facts, draining: bool, person: Person | None = None
) -> frames.Capabilities:
    """The announcement in the studio's words. A model has to fit one GPU, so the largest one counts, not the sum.

    `autoEnabled` is off for as long as no job is taken, whoever sits here: older servers know no `onlyWhenIdle`.
    """
    person = person or Person()
    by_kind: dict[str, list[str]] = {}
    for model in native.models:
        for kind in model.kinds:
            if kind in frames.KINDS:
                by_kind.setdefault(kind, []).append(model.name)
    largest = round(max((gpu.vram_bytes for gpu in native.gpus), default=0) / _GIB, 2)
    return frames.Capabilities(
        machine_name=facts.machine,
        username=facts.user,
        agent_version=native.version,
        engine="multi",
        vram_total_gb=largest,
        vram_threshold_gb=min(facts.threshold_gb or largest, largest or facts.threshold_gb),
        auto_enabled=native.accepting and not draining,
        supported_models=sorted({name for names in by_kind.values() for name in names}),
        task_kinds=[kind for kind in frames.KINDS if kind in by_kind],
        supported_models_per_kind=by_kind,
        only_when_idle=person.first,
        user_presence=msgspec.UNSET if person.here is None else "active" if person.here else "idle",
    )


# ---- the log ------------------------------------------------------------------------------------------------

_LEVELS: dict[str, Any] = {"warning": "warn", "error": "error", "critical": "error"}


def log_batch(batch: wire.LogBatch, now: str, names: Mapping[str, str]) -> frames.LogBatch:
    """Our lines in the studio's words; those that were lost become a line of their own, dated `now`.

    Args:
        names: native job id -> the studio's own.
    """
    entries = list(_entries(batch.lines, names))
    if batch.dropped:
        lost = f"{batch.dropped} lines of the log were lost before these"
        entries.insert(0, frames.LogEntry(ts=now, level="warn", category="log", message=lost))
    return frames.LogBatch(entries=entries)


def _entries(lines: Iterable[wire.LogLine], names: Mapping[str, str]) -> Iterable[frames.LogEntry]:
    for line in lines:
        logger, colon, rest = line.message.partition(": ")
        named = bool(colon) and re.fullmatch(r"[\w.]+", logger) is not None
        yield frames.LogEntry(
            ts=line.ts,
            level=_LEVELS.get(line.level, "info"),
            category=logger.rpartition(".")[2] if named else "worker",
            message=rest if named else line.message,
            job_id=names.get(line.job, line.job) or msgspec.UNSET,
        )
