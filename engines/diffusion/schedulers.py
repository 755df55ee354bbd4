"""Noise schedules of latent diffusion as plain numpy.

Theory of operation. Training mixes a clean latent x0 with unit noise n; a_t is the share of the signal's variance
left at training step t (the cumulative product of 1 - beta). Two families of samplers walk back from noise:

    DDIM    keeps x_t = sqrt(a_t) x0 + sqrt(1 - a_t) n        (variance preserving)
    Euler   keeps x_t = x0 + s_t n, s_t = sqrt((1 - a_t)/a_t)  (variance exploding; the network gets x / sqrt(s^2 + 1))

Both are deterministic: one seed, one image. Config keys, their defaults and their meaning are those of diffusers'
`scheduler_config.json` (src/diffusers/schedulers/scheduling_ddim.py and scheduling_euler_discrete.py), and the
sums of its full-loop tests are this module's tests. Sampler classes that keep a history (PNDM, LMS, DPM-Solver, …)
are mapped by `SAMPLERS` to their first-order form, which these two are; the choice is reported in `Ready.limits`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from protocol.faults import refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Latents = NDArray[np.float32]  # Python floats keep it so; numpy's float64 scalars would not

_KARRAS_RHO = 7.0  # Karras et al. 2022, equation 5
_TINY_ALPHA = 2.0**-24  # diffusers' stand-in for a_T = 0, where Euler's sigma would be infinite
_FIELD = "files.model"

Spacing = Literal["leading", "linspace", "trailing"]


class Sampler(NamedTuple):
    """What serves a `_class_name` of scheduler_config.json.

    Attributes:
        method: "ddim" or "euler".
        spacing: that class's default for `timestep_spacing`.
        one: its default for `set_alpha_to_one`.
        clip: its default for `clip_sample`.
        exact: whether this is the class itself, and not its first-order form.
    """

    method: Literal["ddim", "euler"]
    spacing: Spacing
    one: bool
    clip: bool
    exact: bool


SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler("ddim", "leading", True, True, True),
    "EulerDiscreteScheduler": Sampler("euler", "linspace", True, False, True),
    "PNDMScheduler": Sampler("ddim", "leading", False, False, False),
    "DPMSolverMultistepScheduler": Sampler("ddim", "linspace", True, False, False),
    "DPMSolverSinglestepScheduler": Sampler("ddim", "linspace", True, False, False),
    "DEISMultistepScheduler": Sampler("ddim", "linspace", True, False, False),
    "UniPCMultistepScheduler": Sampler("ddim", "linspace", True, False, False),
    "LMSDiscreteScheduler": Sampler("euler", "linspace", True, False, False),
    "HeunDiscreteScheduler": Sampler("euler", "linspace", True, False, False),
    "EulerAncestralDiscreteScheduler": Sampler("euler", "linspace", True, False, False),
}


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, rename={"class_name": "_class_name"}):
    """The keys of scheduler_config.json that change what is computed; None means the class's own default."""

    class_name: str
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    beta_start: Annotated[float, Meta(gt=0)] = 0.0001
    beta_end: Annotated[float, Meta(gt=0)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Spacing | None = None
    steps_offset: Annotated[int, Meta(ge=0)] = 0
    set_alpha_to_one: bool | None = None
    clip_sample: bool | None = None
    clip_sample_range: Annotated[float, Meta(gt=0)] = 1.0
    thresholding: bool = False
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool | None = False

    @property
    def sampler(self) -> Sampler:
        """The row of `SAMPLERS`. Raises KeyError for a class that is not served; `parse_config` refuses it."""
        return SAMPLERS[self.class_name]


def parse_config(raw: dict[str, Any]) -> SchedulerConfig:
    """Check a decoded scheduler_config.json.

    Raises:
        FaultError: `load_failed`: an unknown class (the known ones are named), a wrong value, or a feature that would
            change the picture and is not served.
    """
    try:
        config = msgspec.convert(raw, type=SchedulerConfig)
    except msgspec.ValidationError as error:
        raise refuse("load_failed", f"scheduler_config.json: {error}.", _FIELD) from None
    if config.class_name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise refuse("load_failed", f"Scheduler {config.class_name!r} is not served; known are {known}.", _FIELD)
    if config.thresholding:
        raise refuse("load_failed", "scheduler_config.json: thresholding is not served; set it to false.", _FIELD)
    if config.use_karras_sigmas and config.sampler.method == "ddim":
        raise refuse(
            "load_failed",
            f"scheduler_config.json: use_karras_sigmas is served with EulerDiscreteScheduler, not {config.class_name}.",
            _FIELD,
        )
    signal = signal_shares(config)
    if not np.isfinite(signal).all() or signal.min() < 0 or (signal[:-1] <= 0).any():
        raise refuse("load_failed", "scheduler_config.json: these betas leave no signal before the last step.", _FIELD)
    if signal[-1] <= 0 and config.prediction_type == "epsilon":
        raise refuse(
            "load_failed", "scheduler_config.json: rescale_betas_zero_snr needs prediction_type v_prediction.", _FIELD
        )
    return config


def signal_shares(config: SchedulerConfig) -> NDArray[np.float64]:
    """a_t for t = 0 … num_train_timesteps - 1, falling from nearly 1."""
    shares = np.cumprod(1.0 - _betas(config))
    if config.rescale_betas_zero_snr:
        # Lin et al. 2023: shift the roots so that the last is 0, stretch them so that the first stays.
        roots = np.sqrt(shares)
        shares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        if config.sampler.method == "euler":
            shares[-1] = _TINY_ALPHA
    return np.asarray(shares, np.float64)


def _betas(config: SchedulerConfig) -> NDArray[np.float64]:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        if len(config.trained_betas) != count:
            raise refuse(
                "load_failed",
                f"scheduler_config.json: trained_betas holds {len(config.trained_betas)} values for {count} steps.",
                _FIELD,
            )
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        return np.asarray(np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2)
    edges = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1.0 - edges[1:] / edges[:-1], 0.999))


class Schedule(abc.ABC):
    """The way from noise to a clean latent in a fixed number of steps; immutable, usable from any thread.

    Attributes:
        timesteps: training step of each step, falling; what the network is told.
        start_noise: standard deviation of the latent before the first step.
    """

    timesteps: Sequence[float]
    start_noise: float

    def __len__(self) -> int:
        return len(self.timesteps)

    @abc.abstractmethod
    def network_input(self, latents: Latents, index: int) -> Latents:
        """What the network sees at this step."""

    @abc.abstractmethod
    def step(self, latents: Latents, output: Latents, index: int) -> Latents:
        """Latents after this step; `output` is the network's answer to `network_input`."""

    @abc.abstractmethod
    def noised(self, clean: Latents, noise: Latents) -> Latents:
        """A start image's latents as they stand before the first step; `noise` has unit variance."""

    @abc.abstractmethod
    def noised_after(self, clean: Latents, noise: Latents, index: int) -> Latents:
        """The same as they stand after step `index`; after the last one they are clean."""


def make_schedule(config: SchedulerConfig, steps: int, strength: float = 1.0) -> Schedule:
    """Plan `steps` steps.

    Args:
        steps: 1 to `num_train_timesteps`.
        strength: in (0, 1]; below 1 only the last `steps * strength` steps (at least one) are walked, as for a
            start image.
    """
    kind: type[_Ddim | _Euler] = _Ddim if config.sampler.method == "ddim" else _Euler
    # 0.3 * 10 is 3.0000000000000004 and 0.29 * 100 is 28.999…: the epsilon keeps the count that people expect.
    walked = min(steps, max(1, int(steps * strength + 1e-6)))
    return kind(config, steps, steps - walked)


def _timesteps(config: SchedulerConfig, steps: int) -> NDArray[np.float64]:
    """Training steps, falling, within 0 … num_train_timesteps - 1."""
    total = config.num_train_timesteps
    spacing = config.timestep_spacing or config.sampler.spacing
    times: NDArray[Any]
    if spacing == "linspace" and config.class_name.startswith(("DPM", "DEIS", "UniPC")):
        # These classes leave out the end at 0, because they step to the clean latent from there.
        times = np.linspace(0, total - 1, steps + 1).round()[1:]
    elif spacing == "linspace":
        times = np.linspace(0, total - 1, steps)
    elif spacing == "leading":
        times = np.arange(steps) * (total // steps) + float(config.steps_offset)
    else:
        times = np.round(np.arange(total, 0, -total / steps))[:steps][::-1] - 1
    falling = np.clip(times[::-1], 0, total - 1)
    # DDIM looks its times up in a table; Euler interpolates.
    return np.asarray(falling.round() if config.sampler.method == "ddim" else falling, np.float64)


class _Ddim(Schedule):
    """DDIM with eta 0 (Song et al. 2021, equation 12)."""

    def __init__(self, config: SchedulerConfig, steps: int, skipped: int) -> None:
        shares = signal_shares(config)
        times = _timesteps(config, steps).astype(np.int64)
        one = config.sampler.one if config.set_alpha_to_one is None else config.set_alpha_to_one
        now = shares[times]
        after = np.append(now[1:], 1.0 if one else shares[0])
        clip = config.sampler.clip if config.clip_sample is None else config.clip_sample
        self._clip = config.clip_sample_range if clip else None
        self._prediction = config.prediction_type
        # Python floats: a numpy float64 scalar would turn every latent into float64.
        self._now: list[float] = now[skipped:].tolist()
        self._after: list[float] = after[skipped:].tolist()
        self.timesteps = [float(time) for time in times[skipped:]]
        self.start_noise = 1.0

    def network_input(self, latents: Latents, index: int) -> Latents:
        return latents

    def step(self, latents: Latents, output: Latents, index: int) -> Latents:
        share, following = self._now[index], self._after[index]
        signal, noise = sqrt(share), sqrt(1 - share)
        eps: Any
        clean: Any
        if self._prediction == "epsilon":
            eps, clean = output, (latents - noise * output) / signal
        elif self._prediction == "v_prediction":
            eps, clean = signal * output + noise * latents, signal * latents - noise * output
        else:
            eps, clean = (latents - signal * output) / noise, output
        if self._clip is not None:
            clean = np.clip(clean, -self._clip, self._clip)
        found: Latents = sqrt(following) * clean + sqrt(1 - following) * eps
        return found

    def noised(self, clean: Latents, noise: Latents) -> Latents:
        share = self._now[0]
        return sqrt(share) * clean + sqrt(1 - share) * noise

    def noised_after(self, clean: Latents, noise: Latents, index: int) -> Latents:
        if index + 1 == len(self.timesteps):
            return clean
        share = self._after[index]
        return sqrt(share) * clean + sqrt(1 - share) * noise


class _Euler(Schedule):
    """Euler steps over the probability-flow equation (Karras et al. 2022, algorithm 2 without churn)."""

    def __init__(self, config: SchedulerConfig, steps: int, skipped: int) -> None:
        shares = signal_shares(config)
        all_sigmas = np.sqrt((1 - shares) / shares)
        times = _timesteps(config, steps)
        sigmas = np.interp(times, np.arange(len(shares)), all_sigmas)
        if config.use_karras_sigmas:
            low, high = sigmas[-1] ** (1 / _KARRAS_RHO), sigmas[0] ** (1 / _KARRAS_RHO)
            sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** _KARRAS_RHO
            times = np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(shares)))
        leading = (config.timestep_spacing or config.sampler.spacing) == "leading"
        self._prediction = config.prediction_type
        self._sigmas: list[float] = np.append(sigmas, 0.0)[skipped:].tolist()
        self.timesteps = [float(time) for time in times[skipped:]]
        first = self._sigmas[0]
        # "leading" does not start at the last training step, so the latent is noise plus a signal of variance 1.
        self.start_noise = sqrt(first**2 + 1) if leading else first

    def network_input(self, latents: Latents, index: int) -> Latents:
        return latents / sqrt(self._sigmas[index] ** 2 + 1)

    def step(self, latents: Latents, output: Latents, index: int) -> Latents:
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        if self._prediction == "epsilon":
            slope = output
        else:
            clean = output
            if self._prediction == "v_prediction":
                scale = sigma**2 + 1
                clean = latents / scale - output * (sigma / sqrt(scale))
            slope = (latents - clean) / sigma
        return latents + slope * (following - sigma)

    def noised(self, clean: Latents, noise: Latents) -> Latents:
        return clean + self._sigmas[0] * noise

    def noised_after(self, clean: Latents, noise: Latents, index: int) -> Latents:
        return clean + self._sigmas[index + 1] * noise
