"""Load options of the diffusion engines, and the checks of a request that need them. No heavy import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from engines.runtime.contract import Model, known_options, option
from engines.runtime.threads import threads_of
from protocol import work
from protocol.faults import refuse

DEFAULT_PIXELS = 1536 * 1536
DEFAULT_FRAMES = 600
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5

_Pixels = Annotated[int, Meta(ge=work.MIN_SIDE**2, le=work.MAX_PIXELS)]
_Frames = Annotated[int, Meta(ge=1, le=work.MAX_VIDEO_FRAMES)]
_Steps = Annotated[int, Meta(ge=1, le=500)]
_Guidance = Annotated[float, Meta(ge=0, le=50)]

NAMES = ("threads", "max_pixels", "max_frames", "default_steps", "default_guidance")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`[models.options]` of an image or video model.

    Attributes:
        threads: CPU threads inside one network, and of the video encoder.
        max_pixels: width x height that a request may ask for; bounds memory.
        max_frames: frames of one video.
        default_steps, default_guidance: for requests that name none.
    """

    threads: int = 1
    max_pixels: int = DEFAULT_PIXELS
    max_frames: int = DEFAULT_FRAMES
    default_steps: int = DEFAULT_STEPS
    default_guidance: float = DEFAULT_GUIDANCE


def read_options(model: Model, names: Sequence[str] = NAMES) -> Options:
    """Check the load options against the `names` that the engine has. Raises FaultError, naming `options.NAME`."""
    known_options(model, names)
    return Options(
        threads=threads_of(model),
        max_pixels=option(model, "max_pixels", _Pixels, DEFAULT_PIXELS),
        max_frames=option(model, "max_frames", _Frames, DEFAULT_FRAMES),
        default_steps=option(model, "default_steps", _Steps, DEFAULT_STEPS),
        default_guidance=option(model, "default_guidance", _Guidance, DEFAULT_GUIDANCE),
    )


def steps_of(params: work.ImageParams | work.VideoParams, options: Options) -> int:
    """Steps of a request."""
    return options.default_steps if params.steps is None else params.steps


def guidance_of(params: work.ImageParams | work.VideoParams, options: Options) -> float:
    """Guidance of a request."""
    return options.default_guidance if params.guidance is None else params.guidance


def check_request(params: work.ImageParams | work.VideoParams, options: Options, train_steps: int) -> None:
    """Refuse what this model cannot serve, apart from the prompt's length.

    Raises:
        FaultError: `invalid_parameter`, naming the field.
    """
    pixels = params.width * params.height
    if pixels > options.max_pixels:
        raise refuse(
            "invalid_parameter",
            f"width: {params.width} x {params.height} exceeds the {options.max_pixels} pixels of this model.",
            "width",
        )
    if isinstance(params, work.VideoParams) and params.frames > options.max_frames:
        raise refuse(
            "invalid_parameter",
            f"seconds: {params.frames} frames exceed the {options.max_frames} of this model.",
            "seconds",
        )
    steps = steps_of(params, options)
    if steps > train_steps:
        raise refuse(
            "invalid_parameter", f"steps: {steps} exceeds the {train_steps} steps this model was trained with.", "steps"
        )
    guidance = guidance_of(params, options)
    if params.negative_prompt and guidance <= 1:
        raise refuse(
            "invalid_parameter",
            f"negative_prompt: it has no effect with a guidance of {guidance:g}; ask for more than 1.",
            "negative_prompt",
        )
