"""Old configurations become new ones, and stay their owner's."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor import config_migrate
from supervisor.config import load
from supervisor.config_migrate import STEPS, migrate, migrate_file
from supervisor.errors import ConfigError
from supervisor.settings import CONFIG_VERSION

PATH = Path("worker.toml")

# One pair for each version that a file may have; the file's owner should recognise it.
OLD = {
    0: """\
# my box
config_version = 0   # old

[supervisor]         # who
name = "box-1"

[supervisor.labels]
rack = "3"           # third

[coordinator]
# where
address = "embedded" # here

[limits]
idle_unload_min = 5  # five
drain_timeout_s = 30
# last

[[models]]
name = "synthetic-a"
engine = "synthetic"
modality = "llm"     # only that

[[models]]
name = "synthetic-b"
engine = "synthetic"
modality = 'image'
""",
}
NEW = {
    0: """\
# my box
config_version = 1   # old

[worker]         # who
name = "box-1"

[worker.labels]
rack = "3"           # third

[coordinator]
# where
url = "embedded" # here

[limits]
keep_alive_s = 300  # five
drain_s = 30
# last

[[models]]
name = "synthetic-a"
engine = "synthetic"
kinds = ["llm"]     # only that

[[models]]
name = "synthetic-b"
engine = "synthetic"
kinds = ["image"]
""",
}


def test_there_is_a_step_and_a_pair_for_every_older_version():
    assert len(STEPS) == CONFIG_VERSION
    assert set(OLD) == set(NEW) == set(range(CONFIG_VERSION))


@pytest.mark.parametrize("version", sorted(OLD))
def test_comments_order_and_lines_stay(version, tmp_path):
    migrated = migrate(PATH, OLD[version])
    assert migrated.text == NEW[version]
    assert migrated.version == version
    assert migrate(PATH, migrated.text).text == migrated.text
    path = tmp_path / "worker.toml"
    path.write_text(OLD[version])
    settings = load(path, {})
    assert (settings.worker.labels, settings.limits.keep_alive_s) == ({"rack": "3"}, 300)
    assert [model.kinds for model in settings.models] == [["llm"], ["image"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("limits.drain_timeout_s = 3\nlimits.idle_unload_min = 2", "limits.drain_s = 3\nlimits.keep_alive_s = 120"),
        ('supervisor = { name = "x" }', 'worker = { name = "x" }'),
        ('models = [{ name = "s", modality = "llm" }]', 'models = [{ name = "s", kinds = ["llm"] }]'),
        ('"supervisor".name = "x"', 'worker.name = "x"'),
        (
            '[supervisor]\nname = "x"\n[log]\n[supervisor.labels]\na = "b"',
            '[worker]\nname = "x"\n[log]\n[worker.labels]\na = "b"',
        ),
        ("[limits]\ndrain_s = 3", "[limits]\ndrain_s = 3"),
    ],
)
def test_every_way_to_write_a_table(old, new):
    migrated = migrate(PATH, f"config_version = 0\n{old}\n")
    assert migrated.text == f"config_version = 1\n{new}\n"


def test_each_change_is_told():
    assert migrate(PATH, OLD[0]).changes[:2] == ("supervisor is now worker", "coordinator.address is now url")


def test_a_file_of_this_version_or_of_none_stays_as_it_is():
    for text in ("", "config_version = 1\n[supervisor]\n", 'config_version = "one"\n'):
        assert migrate(PATH, text).text == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\nconfig_version = 2", "worker.toml:2: config_version: 2 is newer than this program knows (1); install a"),
        ("config_version = -1", "worker.toml:1: config_version: -1 was never a version"),
        (
            'config_version = 0\n[coordinator]\nurl = "a"\naddress = "b"',
            "worker.toml: coordinator.address: its new name is url, which is there as well; keep one of them",
        ),
        ("config_version = 0\nlimits.idle_unload_min = {}", "worker.toml:1: config_version: 0 cannot be migrated"),
    ],
)
def test_what_cannot_be_migrated_has_a_sentence(text, sentence):
    with pytest.raises(ConfigError) as caught:
        migrate(PATH, text)
    assert caught.value.problems[0].startswith(sentence)


def test_steps_run_one_after_the_other(monkeypatch):
    def from_1(draft: config_migrate.Draft) -> None:
        draft.rename("limits", "drain_s", to="patience_s")

    monkeypatch.setattr(config_migrate, "STEPS", (*STEPS, from_1))
    monkeypatch.setattr(config_migrate, "CONFIG_VERSION", 2)
    both = migrate(PATH, "config_version = 0\n[limits]\ndrain_timeout_s = 3 # c\n")
    assert both.text == "config_version = 2\n[limits]\npatience_s = 3 # c\n"
    assert migrate(PATH, "config_version = 1\n[limits]\ndrain_s = 3\n").text.endswith("patience_s = 3\n")


def test_the_difference_is_shown(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text("config_version = 0\n[log]\n")
    _, difference = migrate_file(path)
    assert difference.splitlines()[2:] == ["@@ -1,2 +1,2 @@", "-config_version = 0", "+config_version = 1", " [log]"]
    path.write_text("[log]\n")
    assert migrate_file(path)[1] == ""
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        migrate_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        migrate_file(tmp_path / "gone.toml")
