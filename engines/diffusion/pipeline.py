"""Prompt and noise to pixels: the three or four networks of a latent diffusion model on onnxruntime.

Latents are float32 (1, channels, height / 8, width / 8) between the networks, whatever the networks compute in; each
array is cast to the type that the graph's input states. Guidance runs the unet on [empty prompt, prompt] as one batch
of two where the graph's batch size is free, else as two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engines.diffusion.layout import LATENT_FACTOR, Layout, read_layout
from engines.diffusion.schedulers import Schedule, make_schedule
from engines.diffusion.tokens import PromptTokens
from engines.runtime.ort import Session, Terminator, open_session
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Latents = NDArray[np.float32]
    Pixels = NDArray[np.uint8]

OnStep = Callable[[], None]  # called after each step; raise to end the work
_PROOF_SIDE = 64  # pixels: the smallest side that every Stable Diffusion unet can halve three times
_FIELD = "files.model"


class Conditioning(msgspec.Struct, frozen=True, kw_only=True):
    """What steers the denoising: text embeddings (1, tokens, width), and how strongly.

    Attributes:
        empty: embedding of the negative (or empty) prompt; None when guidance is 1 or less, where it has no effect.
    """

    prompt: Any
    empty: Any = None
    guidance: float = 1.0


class Pipeline:
    """A loaded model. Every method may be called from several threads at once.

    Attributes:
        device: "cpu" when any of the networks runs there, else the GPU.
        devices: network -> where it runs.
        channels: channels of the latent.
        fixed: (width, height) in pixels when the graph takes one size only.
    """

    def __init__(self, layout: Layout, open_graph: Callable[[Path], Session], progress: OnStep = lambda: None) -> None:
        self.layout = layout
        paths = {"text_encoder": layout.text_encoder, "unet": layout.unet, "vae_decoder": layout.vae_decoder}
        if layout.vae_encoder is not None:
            paths["vae_encoder"] = layout.vae_encoder
        self._graphs: dict[str, Session] = {}
        for name, path in paths.items():
            self._graphs[name] = open_graph(path)
            progress()
        self.devices = {name: graph.device for name, graph in self._graphs.items()}
        self.device = next((device for device in self.devices.values() if device == "cpu"), self.devices["unet"])
        self._check_inputs()
        self.channels = self._latent_channels()
        shape = self._graphs["unet"].inputs["sample"].shape
        self.fixed = _fixed_size(shape)
        self._pairs = not isinstance(shape[0], int) or shape[0] == 2
        self.compute_type = self._graphs["unet"].inputs["sample"].dtype
        length = self._graphs["text_encoder"].inputs["input_ids"].shape[-1]
        self.tokens = PromptTokens(layout.tokenizer, length if isinstance(length, int) else None)

    @property
    def can_start_from_image(self) -> bool:
        """Whether the model has a VAE encoder."""
        return "vae_encoder" in self._graphs

    def noise(self, seed: int, width: int, height: int) -> Latents:
        """Unit noise of a seed; the same on every machine."""
        shape = (1, self.channels, height // LATENT_FACTOR, width // LATENT_FACTOR)
        return np.random.default_rng(seed).standard_normal(shape, np.float32)

    def embed(self, prompt: str, negative: str, guidance: float, stop: Terminator | None = None) -> Conditioning:
        """Encode the prompts.

        Raises:
            FaultError: `context_length_exceeded`, naming `prompt` or `negative_prompt`.
            CancelledRun: `stop` was used.
        """
        wanted = self._text(self.tokens.ids(prompt, "prompt"), stop)
        if guidance <= 1:
            return Conditioning(prompt=wanted, guidance=guidance)
        empty = self._text(self.tokens.ids(negative, "negative_prompt"), stop)
        return Conditioning(prompt=wanted, empty=empty, guidance=guidance)

    def denoise(
        self,
        conditioning: Conditioning,
        schedule: Schedule,
        noise: Latents,
        *,
        start: Latents | None = None,
        edited: Latents | None = None,
        on_step: OnStep = lambda: None,
        stop: Terminator | None = None,
    ) -> Latents:
        """Walk the schedule.

        Args:
            noise: unit noise, from `noise`.
            start: latents of a start image, from `encode`; the schedule's strength says how much of it stays.
            edited: with `start`: 1 where the picture may change and 0 where it stays, (1, 1, height / 8, width / 8).
            on_step: called after each step.
            stop: ends the network run in flight, between two of its nodes.

        Raises:
            CancelledRun: `stop` was used.
            FaultError: `out_of_memory` or `engine_failed`.
        """
        latents = noise * schedule.start_noise if start is None else schedule.noised(start, noise)
        for index, time in enumerate(schedule.timesteps):
            seen = schedule.network_input(latents, index)
            latents = schedule.step(latents, self._guided(seen, time, conditioning, stop), index)
            if start is not None and edited is not None:
                kept = schedule.noised_after(start, noise, index)
                latents = np.asarray(edited * latents + (1 - edited) * kept, np.float32)
            on_step()
        return latents

    def decode(self, latents: Latents, stop: Terminator | None = None) -> Pixels:
        """Latents to pixels (height, width, 3). Raises like `denoise`; values that are no numbers are a fault."""
        graph = self._graphs["vae_decoder"]
        raw = latents / self.layout.scaling + self.layout.shift
        found = _run(graph, {_only(graph): raw}, stop)
        expected = (1, 3, latents.shape[2] * LATENT_FACTOR, latents.shape[3] * LATENT_FACTOR)
        if found.shape != expected:
            raise refuse("engine_failed", f"The VAE decoder answers {found.shape} instead of {expected}.")
        if not np.isfinite(found).all():
            raise refuse("engine_failed", "The model computed values that are not numbers.")
        levels = (found[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255
        return np.asarray(levels.round(), np.uint8)

    def encode(self, pixels: Pixels, stop: Terminator | None = None) -> Latents:
        """Pixels (height, width, 3) to latents. Only where `can_start_from_image`. Raises like `denoise`."""
        graph = self._graphs["vae_encoder"]
        sample = (pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
        found = _run(graph, {_only(graph): sample}, stop)
        # Some exports answer with mean and log variance side by side; the mean is the deterministic choice.
        raw = found[:, : self.channels]
        return np.asarray((raw - self.layout.shift) * self.layout.scaling, np.float32)

    def prove(self) -> None:
        """Run one small step through every network, so that a model that cannot work fails its load.

        Raises:
            FaultError: `load_failed` or `out_of_memory`.
        """
        width, height = self.fixed or (_PROOF_SIDE, _PROOF_SIDE)
        try:
            schedule = make_schedule(self.layout.scheduler, 1)
            steer = self.embed("", "", 2.0)
            pixels = self.decode(self.denoise(steer, schedule, self.noise(0, width, height)))
            if self.can_start_from_image and self.encode(pixels).shape != self.noise(0, width, height).shape:
                raise refuse("load_failed", "The VAE encoder answers with latents of another shape.", _FIELD)
        except FaultError as error:
            if error.fault.code != "engine_failed":
                raise
            raise refuse("load_failed", f"The model loads but does not work: {error.fault.message}", _FIELD) from error

    # ---- inside

    def _text(self, ids: list[int], stop: Terminator | None) -> Any:
        graph = self._graphs["text_encoder"]
        feeds = {"input_ids": np.array([ids])}
        if "attention_mask" in graph.inputs:
            feeds["attention_mask"] = np.ones((1, len(ids)))
        return _run(graph, feeds, stop)

    def _guided(self, seen: Latents, time: float, steer: Conditioning, stop: Terminator | None) -> Latents:
        if steer.empty is None:
            return self._unet(seen, time, steer.prompt, stop)
        if self._pairs:
            both = self._unet(np.repeat(seen, 2, 0), time, np.concatenate([steer.empty, steer.prompt]), stop)
            empty, wanted = both[:1], both[1:]
        else:
            empty, wanted = self._unet(seen, time, steer.empty, stop), self._unet(seen, time, steer.prompt, stop)
        return np.asarray(empty + steer.guidance * (wanted - empty), np.float32)

    def _unet(self, seen: Latents, time: float, text: Any, stop: Terminator | None) -> Latents:
        graph = self._graphs["unet"]
        if graph.inputs["sample"].shape[0] == 2 and len(seen) == 1:  # a graph that only takes pairs
            seen, text = np.repeat(seen, 2, 0), np.repeat(text, 2, 0)
            first: Latents = self._unet(seen, time, text, stop)[:1]
            return first
        port = graph.inputs["timestep"]
        count = len(seen) if port.shape and port.shape[0] == graph.inputs["sample"].shape[0] else 1
        when = np.full([count] if port.shape else [], time)
        found: Latents = _run(graph, {"sample": seen, "timestep": when, "encoder_hidden_states": text}, stop)
        return found

    def _check_inputs(self) -> None:
        fed = {
            "text_encoder": ({"input_ids"}, {"attention_mask"}),
            "unet": ({"sample", "timestep", "encoder_hidden_states"}, set()),
        }
        for name, (needed, possible) in fed.items():
            found = set(self._graphs[name].inputs)
            if missing := needed - found:
                raise _bad(f"{name} has no input {', '.join(sorted(missing))}.")
            if strange := found - needed - possible:
                raise _bad(f"{name} wants the input {', '.join(sorted(strange))}, which this engine does not know.")
        for name in ("vae_decoder", "vae_encoder"):
            if name in self._graphs and len(self._graphs[name].inputs) != 1:
                raise _bad(f"{name} has {len(self._graphs[name].inputs)} inputs instead of one.")

    def _latent_channels(self) -> int:
        shape = self._graphs["unet"].inputs["sample"].shape
        if len(shape) != 4 or not isinstance(shape[1], int):
            raise _bad(f"unet: its input `sample` has the shape {shape} instead of (batch, channels, height, width).")
        decoder = self._graphs["vae_decoder"].inputs[_only(self._graphs["vae_decoder"])].shape
        if len(decoder) == 4 and isinstance(decoder[1], int) and decoder[1] != shape[1]:
            # Inpainting and depth models take more channels than a latent has.
            raise _bad(f"unet takes {shape[1]} channels but a latent of the VAE decoder has {decoder[1]}.")
        return shape[1]


def load_pipeline(folder: Path, device: str, threads: int, progress: Callable[[int, int], None]) -> Pipeline:
    """Read, open and prove a model folder.

    Args:
        device: "cpu", "cuda" or "auto".
        threads: CPU threads inside one network.
        progress: (parts done, parts in all).

    Raises:
        FaultError: `load_failed` or `out_of_memory`.
        ImportError: onnxruntime or tokenizers is not installed.
    """
    layout = read_layout(folder)
    total, done = (5 if layout.vae_encoder else 4), 0

    def part() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    pipeline = Pipeline(layout, lambda path: open_session(path, device, threads=threads), part)
    pipeline.prove()
    part()
    return pipeline


def between(first: Latents, last: Latents, share: float) -> Latents:
    """Spherical interpolation of two noises: stays unit noise on the way, which a straight line does not."""
    if share <= 0 or share >= 1:
        return first if share <= 0 else last
    cosine = float(np.vdot(first, last) / (np.linalg.norm(first) * np.linalg.norm(last)))
    angle = float(np.arccos(np.clip(cosine, -1, 1)))
    if np.sin(angle) < 1e-6:  # parallel: only the same seed twice
        return first
    mixed = np.sin((1 - share) * angle) * first + np.sin(share * angle) * last
    return np.asarray(mixed / np.sin(angle), np.float32)


def _run(graph: Session, feeds: dict[str, Any], stop: Terminator | None) -> Any:
    cast = {name: np.ascontiguousarray(value, graph.inputs[name].dtype) for name, value in feeds.items()}
    # The first output is the one meant: text encoders add a pooled one behind it.
    return np.asarray(graph.run([next(iter(graph.outputs))], cast, stop)[0], np.float32)


def _only(graph: Session) -> str:
    return next(iter(graph.inputs))


def _fixed_size(shape: tuple[int | str | None, ...]) -> tuple[int, int] | None:
    height, width = shape[2], shape[3]
    if isinstance(height, int) and isinstance(width, int):
        return width * LATENT_FACTOR, height * LATENT_FACTOR
    return None


def _bad(sentence: str) -> FaultError:
    return refuse("load_failed", sentence, _FIELD)
