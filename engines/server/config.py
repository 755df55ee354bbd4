"""Load options of the server engine, checked before anything is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from engines.runtime.contract import Model, main_file, refuse
from engines.runtime.options import options_as

KINDS = ("llm", "embedding", "rerank", "audio_tts", "image")
# Sent only when the operator says that the server honours them: most servers ignore unknown fields in silence.
FEATURES = ("tools", "json_schema", "json_object", "logprobs", "top_k", "min_p", "template", "grammar", "vision")
_USUAL_FEATURES = ("tools", "json_schema", "json_object", "logprobs", "top_k", "min_p", "template")
ROUTES = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "rerank": "/rerank",
    "speech": "/audio/speech",
    "images": "/images/generations",
    "models": "/models",
}
IMAGE_FIELDS = {
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
# Below sun_path's 108 bytes on Linux and 104 on macOS.
MAX_SOCKET_PATH = 103
_PLACE = re.compile(r"\{(socket|port|key|model|cache|scratch|name)\}")
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Gradio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a Gradio app makes an image.

    Attributes:
        endpoint: name of the API endpoint (`call`), without a slash.
        protocol: "call" (Gradio 4 and 5: POST, then events) or "predict" (older: one POST).
        prefix: "/gradio_api" since Gradio 5, "" before.
        fn_index: number of the function, for "predict" apps that need it.
        data: the inputs in order. "{steps}" alone becomes a number, inside a text it becomes text; places are
            prompt, negative_prompt, width, height, steps, guidance, seed.
        output: which of the outputs holds the image.
        defaults: values of places that the caller may leave out.
    """

    endpoint: str = "predict"
    protocol: Literal["call", "predict"] = "call"
    prefix: str = "/gradio_api"
    fn_index: int | None = None
    data: tuple[Any, ...] = ("{prompt}",)
    output: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    defaults: dict[str, float] = {}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Load options.

    Attributes:
        argv: a server to start as our child. Places: {socket} or {port} (exactly one of the two, here or in
            `env`), {key}, {model}, {cache}, {scratch}, {name}.
        url: a server that already runs, instead of `argv`.
        api: what it speaks.
        env: more environment for the child; places as in `argv`.
        health: path that answers 2xx when the server can serve; "" asks for the list of models.
        start_s: how long it may take to become healthy.
        vram_gb: GPU memory that the server will take, as the operator declares it.
        device: where the server runs, as the operator declares it ("cuda:0"); the engine cannot see it.
        slots: requests at once.
        base: path before the OpenAI routes.
        routes: other paths for single routes: chat, completions, embeddings, rerank, speech, images, models.
        served_model: name of the model inside the server; "" means the public name.
        cache_dir: absolute folder that the server keeps between its lives (weights, compiled kernels).
        grace_s: SIGTERM to SIGKILL at the end.
        key_env: environment variable that holds the API key of a running server.
        features: optional parameters that the server honours (`FEATURES`); others are refused, not ignored.
        image_fields: our name of an image parameter -> the server's field; what is missing is refused.
        gradio: for api = "gradio".
    """

    argv: list[str] = []
    url: str = ""
    api: Literal["openai", "gradio"] = "openai"
    env: dict[str, str] = {}
    health: str = "/health"
    start_s: _Seconds = 600.0
    vram_gb: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 0.0
    device: str = ""
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    base: str = "/v1"
    routes: dict[str, str] = {}
    served_model: str = ""
    cache_dir: str = ""
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 5.0
    key_env: str = ""
    features: tuple[str, ...] = _USUAL_FEATURES
    image_fields: dict[str, str] = msgspec.field(default_factory=lambda: dict(IMAGE_FIELDS))
    gradio: Gradio = Gradio()

    def route(self, name: str) -> str:
        """Path of an OpenAI route."""
        return self.routes.get(name, self.base.rstrip("/") + ROUTES[name])

    @property
    def health_path(self) -> str:
        """Path to ask whether the server can serve."""
        return self.health or self.route("models")


def read(model: Model) -> Config:
    """Check the load options. Raises FaultError `load_failed`, naming the option."""
    config = options_as(model, Config)
    if bool(config.argv) == bool(config.url):
        raise refuse("load_failed", "Give exactly one of options.argv and options.url.", "options.argv")
    if config.url and not re.match(r"https?://[^/\s]+", config.url):
        raise refuse("load_failed", "options.url must start with http:// or https://.", "options.url")
    for name in config.routes:
        if name not in ROUTES:
            raise refuse(
                "load_failed", f"options.routes: no route {name!r}; known: {', '.join(ROUTES)}.", "options.routes"
            )
    for name in config.features:
        if name not in FEATURES:
            sentence = f"options.features: no feature {name!r}; known: {', '.join(FEATURES)}."
            raise refuse("load_failed", sentence, "options.features")
    if config.argv and reached_by(config) is None:
        raise refuse(
            "load_failed",
            "options.argv must tell the server where to listen: use exactly one of {socket} and {port}.",
            "options.argv",
        )
    if config.cache_dir and not Path(config.cache_dir).is_absolute():
        raise refuse("load_failed", "options.cache_dir must be an absolute path.", "options.cache_dir")
    return config


def reached_by(config: Config) -> str | None:
    """ "socket" or "port"; None when the places say neither or both."""
    used = {match[1] for text in [*config.argv, *config.env.values()] for match in _PLACE.finditer(text)}
    found = used & {"socket", "port"}
    return found.pop() if len(found) == 1 else None


def fill(text: str, places: dict[str, str]) -> str:
    """Fill the known places; every other brace stays, since servers take JSON as arguments."""
    return _PLACE.sub(lambda match: places[match[1]], text)


def model_path(model: Model) -> str:
    """Path for {model}; "" when the model names no files."""
    return str(main_file(model)) if model.files else ""


def kinds_of(model: Model, config: Config) -> tuple[str, ...]:
    """Kinds that this model serves."""
    able = ("image",) if config.api == "gradio" else KINDS
    return tuple(kind for kind in (model.kinds or able) if kind in able)
