"""A Gradio app's image endpoint, spoken by a real HTTP server, in every shape of answer."""

from __future__ import annotations

import pytest

from engines.server.gradio import references
from protocol.engine_wire import Model, Ready

NEW = {
    "endpoint": "infer",
    "data": ["a photo of {prompt}", "{prompt}", "{steps}", "{seed}", True, "{width}"],
    "output": 1,
    "defaults": {"steps": 4},
}


@pytest.fixture
def load(spawn, standin):
    def start(**gradio):  # noqa: ANN003
        child = spawn("server")
        options = {"url": standin.url, "api": "gradio", "gradio": gradio}
        ready = child.load(Model(name="app", options=options))
        assert isinstance(ready, Ready), ready
        assert ready.limits["kinds"] == ["image"]
        return child

    return start


@pytest.mark.parametrize(
    "shape", ["data", "relative", "absolute", "object", "behind-proxy", "path", "gallery", "pairs", "old"]
)
def test_every_shape_of_answer(load, standin, shape):
    standin.shape = shape
    answer = load(**NEW).run("image", {"prompt": "a cat", "seed": 3, "width": 64})
    assert answer.files[0].read_bytes() == standin.picture
    assert (answer.body.width, answer.body.height, answer.body.seeds) == (32, 16, [3])
    assert standin.body_of("/gradio_api/call/infer") == {"data": ["a photo of a cat", "a cat", 4, 3, True, 64]}
    assert "generating" in [report.phase for report in answer.progress]


def test_n_pictures_are_as_many_calls_with_seeds_of_their_own(load, standin):
    answer = load(**NEW).run("image", {"prompt": "x", "seed": 3, "n": 2, "steps": 9})
    assert answer.body.seeds == [3, 4]
    sent = [body["data"][2:4] for _, path, _, body in standin.seen if path == "/gradio_api/call/infer"]
    assert sent == [[9, 3], [9, 4]]


def test_a_gallery_may_answer_several_at_once(load, standin):
    standin.shape = "gallery"
    answer = load(**NEW).run("image", {"prompt": "x", "n": 2})
    assert len(answer.files) == 2
    assert answer.body.seeds == []  # one seed made both: neither can be repeated alone


def test_an_old_app(load, standin):
    standin.shape = "old"
    answer = load(protocol="predict", prefix="", fn_index=2).run("image", {"prompt": "a cat"})
    assert answer.files[0].read_bytes() == standin.picture
    sent = standin.body_of("/run/predict")
    assert (sent["data"], sent["fn_index"]) == (["a cat"], 2)
    assert answer.body.seeds == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("error", "out of cheese"),
        ("cut", "ended before"),
        ("elsewhere", "another server"),
        ("nothing", "no picture"),
        ("text", "no route /just%20words"),
    ],
)
def test_bad_answers_are_faults(load, standin, shape, words):
    standin.shape = shape
    fault = load(**NEW).run("image", {"prompt": "x"}).fault
    assert fault.code == "engine_failed"
    assert words in fault.message


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({"prompt": "x", "guidance": 3}, "unsupported", "guidance"),
        ({"prompt": "x", "negative_prompt": "y"}, "unsupported", "negative_prompt"),
        ({"prompt": "x"}, "invalid_parameter", "steps"),
    ],
)
def test_what_the_app_has_no_input_for_is_refused(load, params, code, field):
    child = load(**{**NEW, "defaults": {}})
    answer = child.run("image", params)
    assert not answer.started
    assert (answer.fault.code, answer.fault.field) == (code, field)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, []),
        ("", []),
        (5, []),
        ({}, []),
        ([], []),
        ([[]], []),
        ({"image": None}, []),
        ({"url": None, "path": "/a"}, [("path", "/a")]),
        ({"url": "/u"}, [("url", "/u")]),
    ],
)
def test_shapes_without_a_picture_and_odd_ones(value, found):
    assert references(value) == found
