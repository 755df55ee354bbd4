"""worker.toml, drop-ins and the environment laid over each other, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.config import load, read
from supervisor.config_layers import drop_ins, read_layers
from supervisor.errors import ConfigError

MAIN = """\
[limits]
drain_s = 10
stall_s = 20
[limits.restart]
healthy_s = 5

[[models]]
name = "synthetic-a"
engine = "synthetic"
kinds = ["llm"]
"""


@pytest.fixture
def main(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    path = tmp_path / "worker.toml"
    path.write_text(MAIN)
    return path


def drop(main: Path, name: str, text: str) -> Path:
    path = main.parent / "conf.d" / name
    path.write_text(text)
    return path


def problems(main: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(main, environ)
    return [line.replace(f"{main.parent}/", "") for line in caught.value.problems]


def test_later_drop_ins_are_stronger_and_the_environment_is_the_strongest(main):
    drop(main, "20-b.toml", "[limits]\nstall_s = 40\n[limits.restart]\nquarantine_after = 9\n")
    drop(main, "10-a.toml", "limits.stall_s = 30\nlimits.load_s = 31\n")
    limits = load(main, {}).limits
    assert (limits.drain_s, limits.stall_s, limits.load_s) == (10, 40, 31)
    assert (limits.restart.healthy_s, limits.restart.quarantine_after) == (5, 9)
    assert load(main, {"BULKHEAD__LIMITS__STALL_S": "50"}).limits.stall_s == 50


def test_models_are_laid_over_by_name_and_others_are_added(main):
    drop(
        main,
        "a.toml",
        '[[models]]\nname = "synthetic-b"\nengine = "synthetic"\n\n'
        '[[models]]\nname = "synthetic-a"\nvram_gb = 2\nkinds = ["image", "video"]\n',
    )
    first, second = load(main, {}).models
    assert (first.name, first.engine, first.vram_gb, first.kinds) == ("synthetic-a", "synthetic", 2, ["image", "video"])
    assert second.name == "synthetic-b"


def test_a_name_given_twice_in_one_file_stays_a_mistake(main):
    entry = '[[models]]\nname = "synthetic-a"\nengine = "synthetic"\n'
    drop(main, "a.toml", entry + entry)
    assert problems(main) == ['conf.d/a.toml:5: models[1].name: models[0] is named "synthetic-a" already']


def test_a_problem_names_the_file_that_has_it(main):
    drop(main, "a.toml", '\n[limits]\nload_s = "x"\n\n[[models]]\nname = "synthetic-a"\ndevice = "gpu"\n')
    main.write_text(MAIN.replace("drain_s = 10", "drain_s = -1"))
    assert problems(main, BULKHEAD__LOG__LEVEL="loud") == [
        'BULKHEAD__LOG__LEVEL: log.level: "loud" is not one of debug, info, warning, error',
        "worker.toml:2: limits.drain_s: expected float > 0.0",
        "conf.d/a.toml:3: limits.load_s: expected float, got str",
        'conf.d/a.toml:7: models[0].device: "gpu" is not one of cpu, cuda, auto (did you mean "cpu"?)',
    ]


def test_broken_files_are_all_named(main):
    drop(main, "a.toml", "x = \n")
    drop(main, "b.toml", "config_version = 99\n")
    found = problems(main)
    assert len(found) == 2
    assert found[0].startswith("conf.d/a.toml:1: column 5: ")
    assert found[1].startswith("conf.d/b.toml:1: config_version: 99 is newer than this program knows")


def test_what_is_no_toml_file_is_left_alone(main):
    drop(main, ".hidden.toml", "x = \n")
    drop(main, "a.toml.bak1", "x = \n")
    drop(main, "a.txt", "x = \n")
    wanted = drop(main, "b.toml", "")
    assert drop_ins(main) == [wanted]
    assert load(main, {}).limits.drain_s == 10


def test_origins(main):
    over = drop(main, "a.toml", '[limits]\nstall_s = 40\n[[models]]\nname = "synthetic-a"\ndevice = "cpu"\n')
    environ = {"BULKHEAD__LIMITS__LOAD_S": "7", "BULKHEAD__ENGINES__LLM": '{device = "cpu"}'}
    layers = read(main, environ).layers

    def origin(*path: str | int) -> str:
        return str(layers.origin(path) or "default").replace(f"{main.parent}/", "")

    assert origin("limits", "drain_s") == "worker.toml:2"
    assert origin("limits", "stall_s") == f"conf.d/{over.name}:2"
    assert origin("limits", "load_s") == "BULKHEAD__LIMITS__LOAD_S"
    assert origin("engines", "llm", "device") == "BULKHEAD__ENGINES__LLM"
    assert origin("limits", "start_s") == "default"
    assert origin("limits", "restart", "healthy_s") == "worker.toml:5"
    assert origin("limits", "restart", "reprobe_s") == "default"
    assert origin("models", 0, "engine") == "worker.toml:9"
    assert origin("models", 0, "device") == "conf.d/a.toml:5"
    assert origin("models", 0, "backend") == "default"


def test_a_replaced_table_loses_its_old_places(main):
    main.write_text("[engines.llm.options]\na = 1\n")
    drop(main, "a.toml", "\n\n[engines.llm]\noptions = 3\n")
    assert problems(main) == ["conf.d/a.toml:4: engines.llm.options: expected a table, got a number"]


def test_the_etag_changes_with_every_file(main):
    first = read_layers(main, {}).etag
    assert first == read_layers(main, {"BULKHEAD__LOG__LEVEL": "debug"}).etag
    over = drop(main, "a.toml", "")
    second = read_layers(main, {}).etag
    over.write_text("[log]\n")
    third = read_layers(main, {}).etag
    over.rename(over.with_name("b.toml"))
    assert len({first, second, third, read_layers(main, {}).etag}) == 4


def test_an_old_drop_in_is_read_as_migrated(main):
    over = drop(main, "a.toml", "config_version = 0\n[limits]\ndrain_timeout_s = 77\n")
    loaded = read(main, {})
    assert loaded.settings.limits.drain_s == 77
    (note,) = loaded.layers.notes
    assert note.startswith(f"{over}: config_version 0 is read as 1; run `supervisor config migrate --write`")
    assert over.read_text().startswith("config_version = 0")
