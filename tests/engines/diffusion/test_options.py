"""Load options and the checks of a request that need them."""

from __future__ import annotations

from typing import Any

import pytest

from engines.diffusion.options import NAMES, Options, check_request, guidance_of, read_options, steps_of
from engines.runtime.contract import Model
from engines.runtime.threads import usable_cores
from protocol.faults import FaultError
from protocol.work import ImageParams, VideoParams


def model(**options: Any) -> Model:
    return Model(name="m", options=options)


def test_defaults_and_values() -> None:
    assert read_options(model()) == Options(threads=usable_cores())
    asked = {"threads": 3, "max_pixels": 4096, "max_frames": 7, "default_steps": 9, "default_guidance": 2.5}
    assert read_options(model(**asked)) == Options(**asked)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", -1),
        ("threads", "four"),
        ("max_pixels", 1),
        ("max_pixels", 2**40),
        ("max_frames", 0),
        ("default_steps", 0),
        ("default_steps", 501),
        ("default_guidance", -1),
        ("max_pixel", 4096),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(FaultError) as caught:
        read_options(model(**{name: value}))
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", f"options.{name}")


def test_an_engine_may_have_fewer_options() -> None:
    with pytest.raises(FaultError, match="max_frames"):
        read_options(model(max_frames=2), [name for name in NAMES if name != "max_frames"])


def test_requests_win_over_defaults() -> None:
    options = Options(default_steps=9, default_guidance=2.0)
    assert (steps_of(ImageParams(prompt="a"), options), guidance_of(ImageParams(prompt="a"), options)) == (9, 2.0)
    asked = ImageParams(prompt="a", steps=3, guidance=0.0)
    assert (steps_of(asked, options), guidance_of(asked, options)) == (3, 0.0)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (ImageParams(prompt="a", width=520, height=512), "width"),
        (VideoParams(prompt="a", width=520, height=512), "width"),
        (VideoParams(prompt="a", seconds=1.1, fps=10), "seconds"),
        (ImageParams(prompt="a", steps=101), "steps"),
        (ImageParams(prompt="a", negative_prompt="b", guidance=1.0), "negative_prompt"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_name(params: Any, field: str) -> None:
    options = Options(max_pixels=512 * 512, max_frames=10)
    with pytest.raises(FaultError) as caught:
        check_request(params, options, train_steps=100)
    assert (caught.value.fault.code, caught.value.fault.field) == ("invalid_parameter", field)


def test_the_largest_that_fits_is_served() -> None:
    options = Options(max_pixels=512 * 512, max_frames=10)
    check_request(ImageParams(prompt="a", steps=100, negative_prompt="b", guidance=1.5), options, train_steps=100)
    check_request(VideoParams(prompt="a", width=512, height=512, seconds=1, fps=10), options, train_steps=100)
