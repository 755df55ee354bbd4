"""Load options of the server engine: what is wrong is named before anything starts."""

from __future__ import annotations

import pytest

from engines.server import config
from protocol.engine_wire import Model
from protocol.faults import FaultError

URL = {"url": "http://x"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "options.argv"),
        ({"argv": ["x", "{port}"], "url": "http://x"}, "options.argv"),
        ({"argv": ["x"]}, "options.argv"),
        ({"argv": ["x", "{port}", "{socket}"]}, "options.argv"),
        ({"url": "ftp://x"}, "options.url"),
        ({"url": "http://"}, "options.url"),
        ({**URL, "api": "soap"}, "options.api"),
        ({**URL, "routes": {"nope": "/"}}, "options.routes"),
        ({**URL, "features": ["nope"]}, "options.features"),
        ({**URL, "slots": 0}, "options.slots"),
        ({**URL, "vram_gb": -1}, "options.vram_gb"),
        ({**URL, "gradio": {"protocol": "x"}}, "options.gradio.protocol"),
        ({**URL, "cache_dir": "relative"}, "options.cache_dir"),
        ({**URL, "timeout": 5}, "options.timeout"),
    ],
)
def test_bad_options_are_named(options, field):
    with pytest.raises(FaultError) as caught:
        config.read(Model(name="x", options=options))
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", field)


def test_routes_follow_the_base_unless_given():
    read = config.read(Model(name="x", options={**URL, "base": "/openai/v1/", "routes": {"rerank": "/rerank"}}))
    assert read.route("chat") == "/openai/v1/chat/completions"
    assert read.route("rerank") == "/rerank"
    assert read.health_path == "/health"
    assert config.read(Model(name="x", options={**URL, "health": ""})).health_path == "/v1/models"


def test_only_known_places_are_filled():
    text = config.fill('{"level": {x}} {port}', {"port": "1"})
    assert text == '{"level": {x}} 1'


def test_the_place_may_be_in_the_environment():
    read = config.read(Model(name="x", options={"argv": ["x"], "env": {"PORT": "{port}"}}))
    assert config.reached_by(read) == "port"


@pytest.mark.parametrize(
    ("kinds", "options", "found"),
    [
        ((), URL, config.KINDS),
        (("llm", "video"), URL, ("llm",)),
        ((), {**URL, "api": "gradio"}, ("image",)),
    ],
)
def test_which_kinds_a_model_serves(kinds, options, found):
    model = Model(name="x", kinds=kinds, options=options)
    assert config.kinds_of(model, config.read(model)) == found
