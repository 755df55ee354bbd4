"""The quick way to the socket finds what the whole configuration says."""

from __future__ import annotations

import os

import pytest

from supervisor.config import control_socket, load
from supervisor.config import find_config as find_whole
from supervisor.control.commands.place import find_config, socket_path
from supervisor.errors import ConfigError

DEEP = "d" * 120
MODEL = '[[models]]\nname = "synthetic"\nengine = "synthetic"\n'


@pytest.fixture(autouse=True)
def _bare(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("BULKHEAD") or name in ("STATE_DIRECTORY", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("text", "drop_ins", "environ"),
    [
        ("", {}, {}),
        ('[control]\nsocket = "c.sock"\n', {}, {}),
        ('[control]\nsocket = "/run/c.sock"\n[worker]\nstate_dir = "s"\n', {}, {}),
        ('[control]\nsocket = "~/c.sock"\n', {}, {}),
        ('[worker]\nstate_dir = "s"\n', {}, {}),
        ('[worker]\nstate_dir = "~/s"\n', {}, {}),
        (f'[worker]\nstate_dir = "{DEEP}"\n', {}, {}),
        (f'[worker]\nstate_dir = "{DEEP}"\n', {}, {"XDG_RUNTIME_DIR": "/run/user/7"}),
        ("", {}, {"STATE_DIRECTORY": "/var/lib/bulkhead:/x"}),
        ("", {}, {"XDG_STATE_HOME": "/var/x"}),
        ("", {}, {"XDG_STATE_HOME": "relative"}),
        ('[control]\nsocket = "c.sock"\n', {}, {"BULKHEAD__CONTROL__SOCKET": "env.sock"}),
        ('[control]\nsocket = "c.sock"\n', {}, {"BULKHEAD__CONTROL__SOCKET": ""}),
        ("", {}, {"BULKHEAD__Worker__State_Dir": "env"}),
        ("", {"10-a.toml": '[control]\nsocket = "a"\n', "20-b.toml": '[control]\nsocket = "b"\n'}, {}),
        ("", {"10-a.toml": '[worker]\nstate_dir = "a"\n', ".hidden.toml": '[control]\nsocket = "h"\n'}, {}),
        ("config_version = 1\n", {}, {}),
    ],
)
def test_as_the_whole_configuration_says(tmp_path, monkeypatch, text, drop_ins, environ):
    path = tmp_path / "worker.toml"
    path.write_text(text + MODEL)
    for name, words in drop_ins.items():
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        (tmp_path / "conf.d" / name).write_text(words)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert socket_path(str(path)) == control_socket(load(path))


def test_a_mistake_elsewhere_does_not_matter(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text('[control]\nsocket = "c.sock"\n[limits]\ndrain_s = "soon"\n')
    assert socket_path(str(path)) == tmp_path / "c.sock"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[control\n", "worker.toml: "),
        (b"\xff", "is not UTF-8 text"),
        (b"[control]\nsocket = 1\n", "control.socket: expected str"),
        (b"config_version = 99\n", "99"),
    ],
)
def test_what_cannot_be_read(tmp_path, data, sentence):
    path = tmp_path / "worker.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=sentence):
        socket_path(str(path))


def test_the_same_file_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as ours:
        find_config(None)
    with pytest.raises(ConfigError) as theirs:
        find_whole(None)
    assert ours.value.problems == theirs.value.problems
    (tmp_path / "worker.toml").touch()
    (tmp_path / "other.toml").touch()
    assert find_config(None) == find_whole(None)
    environ = {"BULKHEAD_CONFIG": "other.toml"}
    assert find_config(None, environ) == find_whole(None, environ)
    assert find_config("worker.toml", environ) == find_whole("worker.toml", environ)
