"""What the image and the video engine have in common: load, validate, cancel. No heavy import at the top."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engines.diffusion.options import NAMES, Options, check_request, guidance_of, read_options, steps_of
from engines.runtime import ort
from engines.runtime.contract import Claims, Engine, Job, LoadProgress, Model, Ready, main_file
from protocol import work
from protocol.faults import refuse

if TYPE_CHECKING:
    from engines.diffusion.pictures import Pixels
    from engines.diffusion.pipeline import Latents, Pipeline

SEEDS = 2**63
_FRESH_SEEDS = 2**53  # a seed that we choose survives JSON readers that know only doubles


class DiffusionEngine(Engine):
    """Base of the engines that walk from noise to pictures. One run at a time: a run uses every core or the GPU."""

    options: ClassVar[tuple[str, ...]] = tuple(name for name in NAMES if name != "max_frames")

    _pipeline: Pipeline
    _options: Options

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: dict[int, ort.Terminator] = {}

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Import the libraries and say what they claim. Raises ImportError."""
        import numpy
        import PIL
        import tokenizers

        versions = {
            "onnxruntime": ort.version(),
            "numpy": numpy.__version__,
            "tokenizers": tokenizers.__version__,
            "pillow": PIL.__version__,
        }
        return Claims(versions=versions, devices=ort.claimed_devices())

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Open the folder and prove it with one small picture."""
        self._options = read_options(model, self.options)
        folder = main_file(model)
        claims = self.probe(model.backend)
        from engines.diffusion.pipeline import load_pipeline

        def part(done: int, total: int) -> None:
            progress(done, total, "load")

        self._pipeline = load_pipeline(folder, model.device, self._options.threads, part)
        return Ready(
            device=self._pipeline.device,
            slots=1,
            compute_type=self._pipeline.compute_type,
            versions=claims.versions,
            limits=self._limits(),
        )

    def validate(self, kind: str, params: Any) -> None:
        """Sizes against the model, prompts against the text encoder."""
        pipeline, options = self._pipeline, self._options
        check_request(params, options, pipeline.layout.scheduler.num_train_timesteps)
        if pipeline.fixed and (params.width, params.height) != pipeline.fixed:
            width, height = pipeline.fixed
            raise refuse("invalid_parameter", f"width: this model makes {width} x {height} pictures only.", "width")
        pipeline.tokens.ids(params.prompt, "prompt")
        pipeline.tokens.ids(params.negative_prompt, "negative_prompt")

    def cancel(self, job: Job) -> None:
        """End the network run in flight between two of its nodes."""
        with self._lock:
            stop = self._stops.get(id(job))
        if stop is not None:
            stop.terminate()

    @contextlib.contextmanager
    def _stoppable(self, job: Job) -> Iterator[ort.Terminator]:
        """A terminator that `cancel` reaches while the block lasts."""
        stop = ort.Terminator()
        with self._lock:
            self._stops[id(job)] = stop
        try:
            job.check_cancelled()  # after the entry: a cancel is seen here or terminates `stop`
            yield stop
        finally:
            with self._lock:
                del self._stops[id(job)]

    def _start_latents(self, job: Job, stop: ort.Terminator) -> Latents | None:
        """Latents of the input file named "image"; None when there is none."""
        pixels = self._start_pixels(job)
        return None if pixels is None else self._pipeline.encode(pixels, stop)

    def _start_pixels(self, job: Job) -> Pixels | None:
        """The input file named "image" in the size that is asked for; None when there is none."""
        if "image" not in job.inputs:
            return None
        if not self._pipeline.can_start_from_image:
            raise refuse("unsupported", "image: this model has no VAE encoder and cannot begin from an image.", "image")
        from engines.diffusion.pictures import open_start

        return open_start(job.inputs["image"], job.params.width, job.params.height)

    def _limits(self) -> dict[str, Any]:
        scheduler = self._pipeline.layout.scheduler
        sampler = scheduler.sampler
        return {
            "max_pixels": self._options.max_pixels,
            "default_steps": self._options.default_steps,
            "default_guidance": self._options.default_guidance,
            "prompt_tokens": self._pipeline.tokens.length - 2,
            "start_image": self._pipeline.can_start_from_image,
            "scheduler": scheduler.class_name,
            # Samplers that keep a history run as their first-order form: said here, never silently.
            "sampler": sampler.method if sampler.exact else f"{sampler.method}, the first-order form",
            "devices": self._pipeline.devices,
            "safety_checker": "not run" if self._pipeline.layout.safety_checker else "none",
        }

    @staticmethod
    def _counter(job: Job, total: int) -> Callable[[], None]:
        """Counts a unit of work, reports it, and ends the run when it was cancelled."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            job.progress(done, total, "step")
            job.check_cancelled()

        return advance

    def _steps(self, params: work.ImageParams | work.VideoParams) -> int:
        return steps_of(params, self._options)

    def _guidance(self, params: work.ImageParams | work.VideoParams) -> float:
        return guidance_of(params, self._options)


def first_seed(seed: int | None) -> int:
    """The asked seed, or a fresh one that the result names."""
    return secrets.randbelow(_FRESH_SEEDS) if seed is None else seed


def later_seed(seed: int, index: int) -> int:
    """Seed of picture `index`; wraps so that every named seed may be asked for again."""
    return (seed + index) % SEEDS
