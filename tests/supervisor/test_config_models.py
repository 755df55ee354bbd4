"""Checks of models: load options are known before anything is started, and a missing file is one model's matter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from engines.catalog_options import options_of
from supervisor.config import build_models, load, read
from supervisor.errors import ConfigError
from supervisor.known_models import known_models

LLM = '[[models]]\nname = "chat"\nengine = "llm"\npath = "."\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "worker.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), environ)
    return [line.replace(str(folder) + "/", "") for line in caught.value.problems]


# ---- load options


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            LLM + "options = { n_ctxx = 4096 }",
            'worker.toml:5: models[0].options.n_ctxx: engine "llm" has no such load option (did you mean "n_ctx"?)',
        ),
        (
            LLM + 'options = { n_ctx = "4096" }',
            "worker.toml:5: models[0].options.n_ctx: expected int, got str; write 4096 without quotes",
        ),
        (LLM + "options = { n_ctx = 1 }", "worker.toml:5: models[0].options.n_ctx: expected int >= 16"),
        (
            LLM + '[models.options]\ncache_type = "q8"',
            'worker.toml:6: models[0].options.cache_type: "q8" is not one of',
        ),
        (
            LLM + 'backend = "llama-cpp-python"\noptions = { slots = 2 }',
            "worker.toml:6: models[0].options.slots: expected int <= 1",
        ),
        (
            '[[models]]\nname = "e"\nengine = "embed"\npath = "."\noptions = { n_gpu_layers = 1 }',
            'models[0].options.n_gpu_layers: engine "embed" has no such load option',
        ),
        (
            "[engines.llm]\noptions = { thread = 1 }",
            'worker.toml:2: engines.llm.options.thread: engine "llm" has no such load option (did you mean "threads"?)',
        ),
        ('[[models]]\nname = "c"\nengine = "command"', "worker.toml:1: models[0].options.argv: is missing"),
        (
            '[[models]]\nname = "s"\nengine = "server"\n[models.options.routes]\nchatt = "/x"',
            'models[0].options.routes.chatt: engine "server" has no such load option (did you mean "chat"?)',
        ),
        (
            '[[models]]\nname = "p"\nengine = "piper"\npath = "."\n[models.options.voices]\nalloy = 1.5',
            "expected int | str",
        ),
        (
            '[[models]]\nname = "e"\nengine = "embed"\npath = "."\nsplit = true',
            'worker.toml:5: models[0].split: engine "embed" cannot spread a model over several GPUs; leave it out',
        ),
        (LLM + "copies = 0", "worker.toml:5: models[0].copies: expected int >= 1"),
    ],
)
def test_an_option_that_the_engine_would_refuse_is_found_before_the_start(tmp_path, text, sentence):
    (found,) = problems(tmp_path, text)
    assert sentence in found


def test_what_the_scheduler_is_told_of_a_model(tmp_path):
    text = LLM + 'pin = true\ngroup = "big"\ncopies = 8\nsplit = true\n[limits]\nvram_threshold_gb = 24\n'
    settings = load(write(tmp_path, text), {})
    (spec,) = build_models(settings)
    assert (spec.pin, spec.group, spec.copies, spec.split) == (True, "big", 8, True)
    assert settings.limits.vram_threshold_gb == 24


def test_all_wrong_options_come_at_once(tmp_path):
    text = LLM + "[models.options]\nn_ctx = 1\nthreads = 1.5\nslots = true\nseed = 1\n"
    assert [line.split(":")[1] for line in problems(tmp_path, text)] == ["6", "7", "8", "9"]


def test_what_fits_is_taken(tmp_path):
    text = (
        LLM + "options = { n_ctx = 4096, flash_attn = true }\n"
        '[[models]]\nname = "e"\nengine = "embed"\nbackend = "gguf"\npath = "."\noptions = { n_gpu_layers = 1 }\n'
        '[[models]]\nname = "c"\nengine = "command"\noptions = { slots = 2 }\n'
        '[engines.command]\noptions = { argv = ["true"] }\n[engines.embed]\noptions = { slots = 2 }\n'
    )
    models = {spec.name: spec.model.options for spec in build_models(load(write(tmp_path, text), {}))}
    assert models["chat"] == {"n_ctx": 4096, "flash_attn": True}
    assert models["c"] == {"argv": ["true"], "slots": 2}


def test_an_engine_of_ones_own_judges_its_options_itself(tmp_path):
    text = (
        '[engines.mine]\nmodule = "mine.engine"\noptions = { anything = 1 }\n'
        '[[models]]\nname = "m"\nengine = "mine"\nkinds = ["llm"]\noptions = { else = "x" }\n'
        '[engines.llm]\nmodule = "mine.llm"\noptions = { odd = 1 }\n'
    )
    assert load(write(tmp_path, text), {}).models[0].options == {"else": "x"}


def test_options_from_the_environment_have_their_types(tmp_path):
    environ = {
        "BULKHEAD__MODELS__0__OPTIONS__N_CTX": "4096",
        "BULKHEAD__MODELS__0__OPTIONS__USE_MMAP": "false",
        "BULKHEAD__MODELS__0__OPTIONS__CHAT_TEMPLATE": "{{ messages }}",
    }
    (model,) = load(write(tmp_path, LLM), environ).models
    assert model.options == {"n_ctx": 4096, "use_mmap": False, "chat_template": "{{ messages }}"}
    assert type(model.options["chat_template"]) is str
    (found,) = problems(tmp_path, LLM, BULKHEAD__MODELS__0__OPTIONS__N_CTX="many")
    assert found == "BULKHEAD__MODELS__0__OPTIONS__N_CTX: models[0].options.n_ctx: expected int, got str"


# ---- files


def test_a_missing_file_is_a_warning_with_its_place_and_the_others_stay(tmp_path):
    text = LLM + '[[models]]\nname = "gone"\nengine = "llm"\npath = "gone.gguf"\nfiles = { mmproj = "also.gguf" }\n'
    loaded = read(write(tmp_path, text), {})
    assert [model.name for model in loaded.settings.models] == ["chat", "gone"]
    path = tmp_path / "worker.toml"
    cure = 'the model "gone" is not served until there is'
    assert loaded.warnings == (
        f"{path}:8: models[1].path: there is no file or folder {tmp_path}/gone.gguf; {cure}",
        f"{path}:9: models[1].files.mmproj: there is no file or folder {tmp_path}/also.gguf; {cure}",
    )
    assert loaded.notes == loaded.warnings


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_others_own_is_a_warning(tmp_path):  # pragma: no cover  the suite runs as root in containers
    (tmp_path / "m.gguf").touch(mode=0o000)
    (warning,) = read(write(tmp_path, LLM.replace('"."', '"m.gguf"')), {}).warnings
    assert "cannot be read by this user" in warning


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    (warning,) = read(write(tmp_path, LLM), {}).warnings
    assert warning.endswith('cannot be read by this user; the model "chat" is not served until it can')


def test_a_zero_byte_in_a_path_is_a_mistake(tmp_path):
    (found,) = problems(tmp_path, LLM.replace('"."', '"a\\u0000b"'))
    assert found == "worker.toml:4: models[0].path: holds a zero byte"


def test_the_models_that_we_name_ourselves_have_options_that_fit():
    known = [entry for entry in known_models(Path("worker.toml")).values() if entry.options]
    assert known
    for entry in known:
        assert msgspec.convert(entry.options, options_of(entry.engine))
