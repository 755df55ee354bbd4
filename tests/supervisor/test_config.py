from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from supervisor import config
from supervisor.config import build_models, find_config, load, masked, state_dir
from supervisor.errors import ConfigError
from supervisor.settings import Settings


def write(folder: Path, text: str) -> Path:
    path = folder / "worker.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), environ)
    return [line.replace(str(folder) + "/", "") for line in caught.value.problems]


def test_an_empty_file_is_a_whole_configuration(tmp_path):
    assert load(write(tmp_path, ""), {}) == Settings()


def test_all_errors_come_at_once_with_line_path_and_hint(tmp_path):
    text = """\
[coordinator]
ulr = "embedded"
listen = "8080"

[worker]
labels = { rack = 3 }

[[models]]
name = "chat"
engine = "lmm"

[[models]]
name = "synthetic"
engine = "synthetic"
kinds = ["llm", "imgae"]
preload = "yes"

[[models]]
engine = "whisper"

[limits]
drain_s = -1
stall_s = "soon"

[log]
level = "inf"

[engines.piperr]
device = "gpu"
"""
    assert problems(tmp_path, text) == [
        'worker.toml:2: coordinator.ulr: unknown key (did you mean "url"?)',
        'worker.toml:3: coordinator.listen: "8080" is not HOST:PORT with a port from 0 to 65535',
        'worker.toml:6: worker.labels.rack: expected str, got int; write "3" in quotes',
        'worker.toml:10: models[0].engine: there is no engine "lmm" (did you mean "llm"?)',
        'worker.toml:15: models[1].kinds[1]: engine "synthetic" does not serve "imgae" (did you mean "image"?)',
        "worker.toml:16: models[1].preload: expected bool, got str",
        "worker.toml:18: models[2].name: is missing",
        "worker.toml:22: limits.drain_s: expected float > 0.0",
        "worker.toml:23: limits.stall_s: expected float, got str",
        'worker.toml:26: log.level: "inf" is not one of debug, info, warning, error (did you mean "info"?)',
        'worker.toml:28: engines.piperr: there is no engine "piperr" (did you mean "piper"?); '
        "an engine of your own needs `module`",
        'worker.toml:29: engines.piperr.device: "gpu" is not one of cpu, cuda, auto',
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = ", "worker.toml:1: Invalid value"),
        ("y = 1\nx = 07", "worker.toml:2: column"),
        ("limits = 3", "worker.toml:1: limits: expected a table, got a number"),
        ("models = {}", "worker.toml:1: models: expected a list, got a table"),
        ("models = [3]", "worker.toml:1: models[0]: expected a table, got a number"),
        ("config_version = 2\nnonsense = 1", "config_version: 2 is newer than this program knows (1)"),
        ('[worker]\nname = "my box"', "worker.name: has characters other than"),
        ('[coordinator]\nurl = "http://x"', '"http://x" is neither "embedded" nor the ws:// or wss://'),
        ('[coordinator]\nurl = "wss://x"', "coordinator.token_file: is missing"),
        ('[coordinator]\nlisten = "0.0.0.0:80"', "give tls_cert and tls_key, or listen on 127.0.0.1"),
        ('[coordinator]\nlisten = "[::]:80"', "can be reached from other machines"),
        ('[coordinator]\nurl = "wss://x"\ntoken_file = "t"', "t cannot be read: No such file"),
        ('[coordinator]\ntls_cert = "worker.toml"', "coordinator.tls_key: is missing"),
        ('[coordinator]\ntls_ca = "ca.pem"', "there is no file"),
        ('[engines.llm]\npython = "no/python"', "engines.llm.python: there is no program"),
        ('[engines.mine]\nmodule = "a-b"', '"a-b" is not the name of a Python module'),
        ('[[models]]\nname = "a"\nengine = "llm"', "models[0].path: is missing"),
        ('[[models]]\nname = "a\\u0001"\nengine = "whisper"\npath = "."', "holds a control character"),
        ('[[models]]\nname = "a"\nengine = "synthetic"', "must be named synthetic"),
        (
            '[[models]]\nname = "a"\nengine = "llm"\nbackend = "xllamacp"\npath = "."',
            'no backend "xllamacp" (did you mean "xllamacpp"?)',
        ),
        ('[[models]]\nname = "a"\nengine = "piper"\nbackend = "x"\npath = "."', "; leave it out"),
        ('[[models]]\nname = "a"\nengine = "llm"\npath = "."\nsha256 = { model = "12" }', "models[0].sha256.model"),
        (
            f'[[models]]\nname = "a"\nengine = "llm"\npath = "."\nsha256 = {{ modle = "{"0" * 64}" }}',
            'no file has the role "modle" (did you mean "model"?)',
        ),
        (
            '[[models]]\nname = "a"\nengine = "llm"\npath = "."\nfiles = { model = "." }',
            "the role model is given by `path` already",
        ),
        (
            '[[models]]\nname = "a"\nengine = "server"\n[[models]]\nname = "a"\nengine = "server"',
            'worker.toml:5: models[1].name: models[0] is named "a" already',
        ),
        (
            '[engines.mine]\nmodule = "m"\n[[models]]\nname = "a"\nengine = "mine"',
            "models[0].kinds: is missing",
        ),
        (
            '[engines.mine]\nmodule = "m"\n[[models]]\nname = "a"\nengine = "mine"\nkinds = ["lmm"]',
            'there is no task kind "lmm" (did you mean "llm"?)',
        ),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path, text, sentence):
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_a_bad_field_is_not_reported_a_second_time_by_the_cross_check(tmp_path):
    assert problems(tmp_path, "[coordinator]\nlisten = 5") == [
        'worker.toml:2: coordinator.listen: expected str, got int; write "5" in quotes'
    ]


def test_a_token_that_others_can_read_is_refused_with_the_cure(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    text = '[coordinator]\nurl = "wss://x/prefix"\ntoken_file = "token"'
    assert problems(tmp_path, text)[0].endswith("; run: chmod 600 token")
    token.chmod(0o600)
    assert load(write(tmp_path, text), {}).coordinator.token_file == str(token)


def test_unreadable_and_undecodable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "gone.toml", {})
    path = tmp_path / "worker.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(path, {})


# ---- environment ---------------------------------------------------------------------------------------------


def test_the_environment_is_stronger_than_the_file(tmp_path):
    path = write(tmp_path, '[limits]\ndrain_s = 5\n[[models]]\nname = "synthetic"\nengine = "synthetic"\n')
    settings = load(
        path,
        {
            "BULKHEAD__LIMITS__DRAIN_S": "7.5",
            "BULKHEAD__COORDINATOR__LISTEN": "127.0.0.1:0",
            "BULKHEAD__MODELS__0__PRELOAD": "true",
            "BULKHEAD__MODELS__0__KINDS": '["llm"]',
            "BULKHEAD__WORKER__NAME": "42",
            "BULKHEAD_CONFIG": "elsewhere",
        },
    )
    assert settings.limits.drain_s == 7.5
    assert settings.coordinator.listen == "127.0.0.1:0"
    assert settings.models[0].preload is True
    assert settings.models[0].kinds == ["llm"]
    assert settings.worker.name == "42"


def test_an_error_from_the_environment_names_the_variable(tmp_path):
    found = problems(
        tmp_path,
        "",
        BULKHEAD__LIMITS__DRAIN_S="soon",
        BULKHEAD__LIMITS__DRAINS="1",
        BULKHEAD__MODELS__7__NAME="x",
        BULKHEAD__CONFIG_VERSION__X="1",
        BULKHEAD__ENGINES="3",
    )
    assert "BULKHEAD__LIMITS__DRAIN_S: limits.drain_s: expected float, got str" in found
    assert 'BULKHEAD__LIMITS__DRAINS: limits.drains: unknown key (did you mean "drain_s"?)' in found
    assert any(line.startswith("BULKHEAD__ENGINES: engines: expected a table") for line in found)
    assert any("BULKHEAD__MODELS__7__NAME" in line for line in found)
    assert any("BULKHEAD__CONFIG_VERSION__X" in line for line in found)


# ---- places --------------------------------------------------------------------------------------------------


def test_relative_paths_belong_to_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "m.gguf").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "proj.gguf").touch()
    (tmp_path / "venv").mkdir()
    link = tmp_path / "venv" / "python"
    link.symlink_to(sys.executable)
    settings = load(
        write(
            tmp_path,
            '[worker]\nstate_dir = "state"\n[engines.llm]\npython = "venv/python"\n'
            '[[models]]\nname = "a"\nengine = "llm"\npath = "m.gguf"\nfiles = { mmproj = "~/proj.gguf" }\n',
        ),
        {},
    )
    assert state_dir(settings, {}) == tmp_path / "state"
    assert settings.engines["llm"].python == str(link), "a venv's link must not be followed"
    assert settings.models[0].path == str(tmp_path / "m.gguf")
    assert settings.models[0].files == {"mmproj": str(tmp_path / "home" / "proj.gguf")}


def test_an_interpreter_may_be_found_on_the_path(tmp_path):
    settings = load(write(tmp_path, '[engines.llm]\npython = "sh"'), {})
    assert os.path.isabs(settings.engines["llm"].python)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/bulkhead:/x"}, "/var/lib/bulkhead"),
        ({"XDG_STATE_HOME": "/xdg"}, "/xdg/bulkhead"),
        ({"XDG_STATE_HOME": "relative"}, "/h/.local/state/bulkhead"),
        ({}, "/h/.local/state/bulkhead"),
    ],
)
def test_the_default_state_folder(monkeypatch, environ, expected):
    monkeypatch.setenv("HOME", "/h")
    assert state_dir(Settings(), environ) == Path(expected)


def test_search_order(tmp_path, monkeypatch):
    etc = tmp_path / "etc" / "worker.toml"
    monkeypatch.setattr(config, "SEARCH", (*config.SEARCH[:-1], str(etc)))  # this box may have its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no such file; looked at"):
        find_config(None, {})
    etc.parent.mkdir()
    etc.touch()
    assert find_config(None, {}) == etc
    home = tmp_path / ".config" / "bulkhead"
    home.mkdir(parents=True)
    (home / "worker.toml").touch()
    assert find_config(None, {}) == home / "worker.toml"
    write(tmp_path, "")
    assert find_config(None, {}) == Path("worker.toml")
    with pytest.raises(ConfigError, match=r"other\.toml: no such file"):
        find_config(None, {"BULKHEAD_CONFIG": "other.toml"})
    with pytest.raises(ConfigError, match=r"given\.toml: no such file"):
        find_config("given.toml", {})


# ---- models --------------------------------------------------------------------------------------------------


def test_models_take_the_defaults_of_their_engine(tmp_path):
    (tmp_path / "m").touch()
    settings = load(
        write(
            tmp_path,
            '[engines.llm]\ndevice = "cuda"\noptions = { n_ctx = 4096, threads = 1 }\nenv = { A = "b" }\n'
            '[engines.mine]\nmodule = "mine.engine"\n'
            '[[models]]\nname = "a"\nengine = "llm"\npath = "m"\noptions = { threads = 2 }\n'
            f'sha256 = {{ model = "{"AB" * 32}" }}\n'
            '[[models]]\nname = "b"\nengine = "llm"\npath = "m"\ndevice = "cpu"\ngpus = ["GPU-1"]\n'
            '[[models]]\nname = "c"\nengine = "mine"\nkinds = ["x-fold"]\n',
        ),
        {},
    )
    first, second, third = build_models(settings)
    assert first.engine.module == "engines.llm.engine"
    assert first.engine.python == sys.executable
    assert first.engine.env == {"A": "b"}
    assert first.model.device == "cuda"
    assert first.model.kinds == ("llm",)
    assert first.model.options == {"n_ctx": 4096, "threads": 2}
    assert first.model.files == {"model": str(tmp_path / "m")}
    assert first.sha256 == {"model": "ab" * 32}
    assert second.model.device == "cpu"
    assert second.model.devices == ("GPU-1",)
    assert third.engine.module == "mine.engine"
    assert third.model.device == "auto"
    assert third.model.kinds == ("x-fold",)


def test_showing_the_settings_hides_secrets(tmp_path):
    settings = load(write(tmp_path, '[engines.llm]\nenv = { HF_TOKEN = "hf_x", LANG = "C" }'), {})
    assert masked(settings)["engines"]["llm"]["env"] == {"HF_TOKEN": "****", "LANG": "C"}
