"""Schedules against the sums of diffusers' own full-loop tests, and against what the theory promises."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.faults import FaultError

np = pytest.importorskip("numpy", reason="the image extra is not installed")
schedulers = pytest.importorskip("engines.diffusion.schedulers")
SAMPLERS, make_schedule, parse_config = schedulers.SAMPLERS, schedulers.make_schedule, schedulers.parse_config

DDIM = {"_class_name": "DDIMScheduler", "clip_sample": True}
EULER = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1100}


def toy_network(sample: Any, time: float) -> Any:
    """diffusers' `dummy_model`."""
    return sample * time / (time + 1)


def ramp() -> Any:
    """diffusers' `dummy_sample_deter`: 4 x 3 x 8 x 8 values from 0 to 1."""
    count = 4 * 3 * 8 * 8
    return (np.arange(count) / count).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)


def walk(config: dict[str, Any], steps: int = 10, *, feed_scaled: bool = False) -> Any:
    schedule = make_schedule(parse_config(config), steps)
    latents = ramp() * schedule.start_noise
    for index, time in enumerate(schedule.timesteps):
        seen = schedule.network_input(latents, index)
        # diffusers' Euler test steps from the scaled sample; a quirk of that test that its sums depend on.
        latents = schedule.step(seen if feed_scaled else latents, toy_network(seen, time), index)
    return latents


@pytest.mark.parametrize(
    ("extra", "total", "mean"),
    [
        ({}, 172.0067, 0.223967),
        ({"prediction_type": "v_prediction"}, 52.5302, 0.0684),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784, 0.1941),
    ],
)
def test_ddim_gives_the_sums_of_diffusers_tests(extra: dict[str, Any], total: float, mean: float) -> None:
    sample = np.abs(walk({**DDIM, **extra}))
    assert sample.sum() == pytest.approx(total, abs=1e-2)
    assert sample.mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("extra", "total", "mean"),
    [
        ({}, 10.0807, 0.0131),
        ({"prediction_type": "v_prediction"}, 0.0002, 2.2676e-06),
        ({"use_karras_sigmas": True}, 124.52299, 0.162139),
    ],
)
def test_euler_gives_the_sums_of_diffusers_tests(extra: dict[str, Any], total: float, mean: float) -> None:
    sample = np.abs(walk({**EULER, **extra}, feed_scaled=True))
    assert sample.sum() == pytest.approx(total, abs=1e-2)
    assert sample.mean() == pytest.approx(mean, abs=1e-3)


def test_a_start_image_is_noised_as_in_diffusers() -> None:
    """test_full_loop_with_noise of diffusers' test_scheduler_ddim.py: ten steps, the last two walked."""
    schedule = make_schedule(parse_config(DDIM), 10, strength=0.2)
    count = ramp().size
    noise = np.arange(count)[::-1].reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / count
    latents = schedule.noised(ramp(), noise)
    for index, time in enumerate(schedule.timesteps):
        latents = schedule.step(latents, toy_network(latents, time), index)
    assert np.abs(latents).sum() == pytest.approx(354.5418, abs=1e-2)


def test_steps_offset_moves_the_times() -> None:
    schedule = make_schedule(parse_config({**DDIM, "steps_offset": 1}), 5)
    assert list(schedule.timesteps) == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 3, 7, 50, 500])
def test_every_sampler_plans_falling_times_in_range(name: str, spacing: str, steps: int) -> None:
    config = parse_config({"_class_name": name, "timestep_spacing": spacing, "steps_offset": 1})
    times = list(make_schedule(config, steps).timesteps)
    assert len(times) == steps
    assert all(0 <= time <= 999 for time in times)
    assert times == sorted(set(times), reverse=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_perfect_network_leads_to_the_clean_latent(name: str, prediction: str, schedule: str) -> None:
    """Given the exact noise at every step, any sampler must arrive at x0."""
    config = parse_config(
        {
            "_class_name": name,
            "prediction_type": prediction,
            "beta_schedule": schedule,
            "clip_sample": False,
            "set_alpha_to_one": True,
        }
    )
    shares = schedulers.signal_shares(config)
    clean = np.random.default_rng(1).standard_normal((1, 4, 4, 4)).astype(np.float32)
    plan = make_schedule(config, 8)
    latents = plan.start_noise * np.random.default_rng(2).standard_normal(clean.shape).astype(np.float32)
    for index, time in enumerate(plan.timesteps):
        seen = plan.network_input(latents, index)
        share = float(np.interp(time, np.arange(1000), shares))
        if config.sampler.method == "euler":  # sigma is interpolated, not the share
            sigma = float(np.interp(time, np.arange(1000), np.sqrt((1 - shares) / shares)))
            share = 1 / (1 + sigma**2)
        eps = (seen - share**0.5 * clean) / (1 - share) ** 0.5
        answers = {"epsilon": eps, "sample": clean, "v_prediction": share**0.5 * eps - (1 - share) ** 0.5 * clean}
        latents = plan.step(latents, answers[prediction], index)
    assert latents.dtype == np.float32
    assert np.abs(latents - clean).max() < 2e-3


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    base = {**DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    config = parse_config({**base, "prediction_type": "v_prediction"})
    assert schedulers.signal_shares(config)[-1] == 0
    plan = make_schedule(config, 4)
    noise = np.ones((1, 4, 2, 2), np.float32)
    assert np.allclose(plan.noised(5 * noise, noise), noise)
    assert np.isfinite(plan.step(noise, noise, 0)).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "wavy"}, "beta_schedule"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train_timesteps"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2.0}, "betas"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "v_prediction"),
        ({}, "_class_name"),
    ],
)
def test_configs_that_cannot_be_served_are_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(FaultError) as caught:
        parse_config(config)
    assert caught.value.fault.code == "load_failed"
    assert words in caught.value.fault.message


def test_trained_betas_are_used() -> None:
    config = parse_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 2, "trained_betas": [0.5, 0.5]})
    assert schedulers.signal_shares(config).tolist() == [0.5, 0.25]


def test_strength_never_walks_zero_steps() -> None:
    config = parse_config(DDIM)
    assert [len(make_schedule(config, 10, s)) for s in (0.001, 0.1, 0.3, 0.75, 1.0)] == [1, 1, 3, 7, 10]
