"""The image engine: n pictures of one prompt, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engines.diffusion.base import DiffusionEngine, first_seed, later_seed
from engines.diffusion.checks import wrong_file
from engines.runtime.contract import Case, Fixture, Job, Model, Outcome
from protocol import work
from protocol.faults import refuse

if TYPE_CHECKING:
    from engines.diffusion.pictures import Mask

FIXTURE = Path(__file__).parent / "fixture" / "tiny-sd-onnx"


class ImageEngine(DiffusionEngine):
    """Serves kind `image`."""

    name = "image"
    kinds = ("image",)

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """A model that paints the colour and shape that its prompt names."""
        return Fixture(
            model=Model(name="tiny-sd", kinds=cls.kinds, files={"model": str(FIXTURE)}, options={"threads": 1}),
            cases=(
                _case("a red circle", "red", "circle", width=256, height=256, steps=10, seed=1),
                _case("a photo of the blue square", "blue", "square", width=128, height=192, steps=5, format="webp"),
                _case("green", "green", "", width=64, height=64, steps=4, guidance=1.0, format="jpeg"),
                _case("a yellow circle", "yellow", "circle", width=64, height=64, steps=4, n=2, negative_prompt="red"),
            ),
            endless=_case("a red circle", "red", "circle", width=1024, height=1024, steps=500, n=16),
            refused=(
                ("image", {"prompt": "red " * 100}),
                ("image", {"prompt": "red", "negative_prompt": "blue " * 100}),
                ("image", {"prompt": "red", "negative_prompt": "blue", "guidance": 1.0}),
                ("image", {"prompt": "red", "width": 4096, "height": 4096}),
            ),
        )

    def run(self, job: Job) -> Outcome:
        """One picture after the other; progress and cancel per step."""
        from engines.diffusion.pictures import encode, latent_mask
        from engines.diffusion.schedulers import make_schedule

        params: work.ImageParams = job.params
        pipeline = self._pipeline
        seed = first_seed(params.seed)
        seeds = [later_seed(seed, index) for index in range(params.n)]
        with self._stoppable(job) as stop:
            original = self._start_pixels(job)
            mask = self._mask(job)
            start = None if original is None else pipeline.encode(original, stop)
            edited = None if mask is None else latent_mask(mask)
            strength = 1.0 if start is None else params.strength
            schedule = make_schedule(pipeline.layout.scheduler, self._steps(params), strength)
            steer = pipeline.embed(params.prompt, params.negative_prompt, self._guidance(params), stop)
            advance = self._counter(job, params.n * (len(schedule) + 1))
            for index, own in enumerate(seeds):
                noise = pipeline.noise(own, params.width, params.height)
                latents = pipeline.denoise(
                    steer, schedule, noise, start=start, edited=edited, on_step=advance, stop=stop
                )
                pixels = pipeline.decode(latents, stop)
                if original is not None and mask is not None:
                    pixels[~mask] = original[~mask]  # to the pixel: the VAE alone would change it
                data = encode(pixels, params.format, params.quality)
                job.save(f"image-{index}.{params.format}", work.IMAGE_MIME[params.format], data)
                advance()
        body = work.ImageResult(width=params.width, height=params.height, format=params.format, seeds=seeds)
        return Outcome(body=body, usage={"images": params.n})

    @staticmethod
    def _mask(job: Job) -> Mask | None:
        """Where the input file named "mask" lets the start image change; None when there is none."""
        asked = job.params
        if "mask" not in job.inputs:
            return None
        if "image" not in job.inputs:
            raise refuse("invalid_parameter", "mask: it belongs to an image, and none came.", "mask")
        from engines.diffusion.pictures import open_mask

        white = asked.mask_marks == "white"
        return open_mask(job.inputs["mask"], job.inputs["image"], asked.width, asked.height, white=white)


def _case(prompt: str, colour: str, shape: str, **params: Any) -> Case:
    asked = msgspec.convert({"prompt": prompt, **params}, type=work.ImageParams)

    def check(body: work.ImageResult, files: Sequence[Path]) -> str:
        if len(files) != asked.n or len(body.seeds) != asked.n:
            return f"{len(files)} files and {len(body.seeds)} seeds instead of {asked.n}"
        found = (wrong_file(path, colour, shape, (asked.width, asked.height), asked.format) for path in files)
        return next(filter(None, found), "")

    return Case(kind="image", params={"prompt": prompt, **params}, check=check)


ENGINE = ImageEngine
