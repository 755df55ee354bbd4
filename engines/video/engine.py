"""The video engine: a clip made picture by picture with an image model.

What it is, honestly: each frame is denoised on its own, by the same networks as a still picture. What holds the clip
together is the noise: it turns on a sphere from that of `seed` (first frame) to that of `seed + 1` (last frame), so
neighbouring frames start nearly equal and the picture glides from one to the other; a clip with the next seed goes on
where this one ended. With a start image, the strength rises over the clip from the least (one step) to `strength`:
the clip begins at the image and leaves it. A model that knows motion would do better; this one needs no other files
than an image model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engines.diffusion.base import DiffusionEngine, first_seed, later_seed
from engines.diffusion.checks import wrong_picture
from engines.diffusion.options import NAMES
from engines.runtime.contract import Case, Claims, Fixture, Job, Model, Outcome, Ready
from engines.video.encode import CODECS, VideoWriter
from protocol import work

if TYPE_CHECKING:
    from engines.runtime.contract import LoadProgress

FIXTURE = Path(__file__).parents[1] / "image" / "fixture" / "tiny-sd-onnx"


class VideoEngine(DiffusionEngine):
    """Serves kind `video`."""

    name = "video"
    kinds = ("video",)
    licence = "PyAV is BSD-3-Clause; its wheel bundles an FFmpeg with GPL x264 and x265"
    options = NAMES

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Also PyAV, and which of our encoders its FFmpeg has. Raises ImportError."""
        import av

        claims = super().probe(backend)
        versions = {**claims.versions, "av": av.__version__}
        missing = [codec.encoder for codec in CODECS.values() if codec.encoder not in av.codecs_available]
        notes = tuple(f"this FFmpeg has no {name}" for name in missing)
        return msgspec.structs.replace(claims, versions=versions, notes=(*claims.notes, *notes))

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """The image engine's model, which paints the colour and shape that its prompt names."""
        return Fixture(
            model=Model(name="tiny-video", kinds=cls.kinds, files={"model": str(FIXTURE)}, options={"threads": 1}),
            cases=(
                _case("a red circle", "red", "circle", width=160, height=120, seconds=2.0, fps=12, steps=4, seed=1),
                _case(
                    "a blue square", "blue", "square", width=64, height=64, seconds=0.5, fps=10, steps=3, format="mp4"
                ),
                _case("green", "green", "", width=64, height=64, seconds=0.05, fps=20, steps=2),
            ),
            endless=_case("a red circle", "red", "circle", width=1024, height=1024, seconds=20.0, fps=30, steps=100),
            refused=(
                ("video", {"prompt": "red " * 100}),
                ("video", {"prompt": "red", "negative_prompt": "blue", "guidance": 0.5}),
                ("video", {"prompt": "red", "width": 4096, "height": 4096}),
                ("video", {"prompt": "red", "seconds": 600, "fps": 6}),
            ),
        )

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """As for images; `limits` also has `max_frames`."""
        ready = super().load(model, scratch, progress)
        return msgspec.structs.replace(ready, limits={**ready.limits, "max_frames": self._options.max_frames})

    def run(self, job: Job) -> Outcome:
        """One frame after the other into the encoder; progress per step and frame, cancel between steps."""
        from engines.diffusion.pipeline import between

        params: work.VideoParams = job.params
        pipeline, codec = self._pipeline, CODECS[params.format]
        seed = first_seed(params.seed)
        name = f"video.{params.format}"
        with self._stoppable(job) as stop:
            start = self._start_latents(job, stop)
            steer = pipeline.embed(params.prompt, params.negative_prompt, self._guidance(params), stop)
            first, last = (pipeline.noise(own, params.width, params.height) for own in (seed, later_seed(seed, 1)))
            plans = self._plans(params, start is not None)
            advance = self._counter(job, sum(len(plan) + 1 for plan in plans))
            path = job.folder / name
            with VideoWriter(
                path, params.format, params.width, params.height, params.fps, self._options.threads
            ) as video:
                for index, plan in enumerate(plans):
                    noise = between(first, last, index / max(1, params.frames - 1))
                    latents = pipeline.denoise(steer, plan, noise, start=start, on_step=advance, stop=stop)
                    video.write(pipeline.decode(latents, stop))
                    advance()
        job.adopt(name, work.VIDEO_MIME[params.format])
        body = work.VideoResult(
            width=params.width,
            height=params.height,
            frames=video.frames,
            fps=params.fps,
            format=params.format,
            codec=codec.name,
            seed=seed,
        )
        return Outcome(body=body, usage={"frames": video.frames})

    def _plans(self, params: work.VideoParams, from_image: bool) -> list[Any]:
        """One schedule per frame; with a start image, of rising strength."""
        from engines.diffusion.schedulers import make_schedule

        config, steps = self._pipeline.layout.scheduler, self._steps(params)
        if not from_image:
            return [make_schedule(config, steps)] * params.frames
        shares = [(index + 1) / params.frames for index in range(params.frames)]
        return [make_schedule(config, steps, params.strength * share) for share in shares]


def _case(prompt: str, colour: str, shape: str, **params: Any) -> Case:
    asked = msgspec.convert({"prompt": prompt, **params}, type=work.VideoParams)

    def check(body: work.VideoResult, files: Sequence[Path]) -> str:
        if len(files) != 1 or body.frames != asked.frames:
            return f"{len(files)} files and {body.frames} frames instead of 1 and {asked.frames}"
        return wrong_video(files[0], colour, shape, asked)

    return Case(kind="video", params={"prompt": prompt, **params}, check=check)


def wrong_video(path: Path, colour: str, shape: str, asked: work.VideoParams) -> str:
    """Decode every frame; what is wrong as a sentence, or ""."""
    import av

    count = 0
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        found = (stream.codec_context.name, stream.average_rate)
        if found[0] != CODECS[asked.format].name or abs(float(found[1]) - asked.fps) > 0.01:
            return f"the stream is {found[0]} with {found[1]} frames a second"
        for frame in container.decode(stream):
            count += 1
            pixels = frame.to_ndarray(format="rgb24")
            if wrong := wrong_picture(pixels, colour, shape, (asked.width, asked.height)):
                return f"frame {count}: {wrong}"
    return "" if count == asked.frames else f"{count} frames decode instead of {asked.frames}"


ENGINE = VideoEngine
