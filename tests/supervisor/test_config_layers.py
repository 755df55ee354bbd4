"""worker.toml, drop-ins and the environment laid over each other, and where each value came from."""

from __future__ import annotations

import os
import time
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


# ---- odd files and odd variables: one sentence each, with the place, and none of them waits or runs away


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[limits]\n# \xff\n", "worker.toml:2: column 3: is not UTF-8 text; save it as UTF-8"),
        (b"\xef\xbb\xbf[limits]\n", "worker.toml:1: begins with a byte order mark; save it as UTF-8 without one"),
        ("[limits]\n".encode("utf-16"), "worker.toml:1: column 1: is not UTF-8 text; save it as UTF-8"),
        (b"[limits]\n# \0\n", "worker.toml:2: column 3: Found invalid character '\\x00'"),
        (b"[limits]\r\nstall_s = 'x'\r\n", "worker.toml:2: limits.stall_s: expected float, got str"),
        (b"[limits]\nstall_s = 1\nstall_s = 2\n", "worker.toml:3: column 12: Cannot overwrite a value"),
        (b"[log]\n[log]\n", "worker.toml:2: column 5: Cannot declare ('log',) twice"),
        (b"a = " + b"[" * 9999 + b"]" * 9999, "worker.toml: is nested too deeply"),
        (b"limits.stall_s = " + b"9" * 5000, "worker.toml:1: Exceeds the limit (4300 digits) for integer"),
        (b"#" * 3_000_000, "worker.toml: has 3000000 bytes, more than 2097152; that is no configuration"),
        (b'control.socket = "a\\u0000b"', "worker.toml:1: control.socket: holds a zero byte"),
        (b'[engines.llm]\npython = "/a\\u0000b"', "worker.toml:2: engines.llm.python: holds a zero byte"),
        (b'[engines.llm]\nread = ["/a\\u0000b"]', "worker.toml:2: engines.llm.read[0]: holds a zero byte"),
        (b'[engines.llm.env]\n"A\\u0000" = "b"', "worker.toml:2: engines.llm.env.A\0: holds a zero byte"),
        (b'coordinator.token_file = "a\\u0000b"', "worker.toml:1: coordinator.token_file: holds a zero byte"),
    ],
)
def test_odd_files(tmp_path, data, sentence):
    path = tmp_path / "worker.toml"
    path.write_bytes(data)
    (found,) = problems(path)
    assert sentence in found


def test_a_large_file_is_read_in_a_moment(tmp_path):
    """Looking for the line of each key was quadratic: 90 s for this one."""
    path = tmp_path / "worker.toml"
    path.write_text("[worker.labels]\n" + "".join(f'k{number} = "x"\n' for number in range(50_000)) + "bad = 1\n")
    began = time.process_time()
    (found,) = problems(path)
    assert found.startswith("worker.toml:50002: worker.labels.bad: expected str")
    assert time.process_time() - began < 10


def test_odd_drop_ins(main):
    folder = main.parent / "conf.d"
    folder.rmdir()
    folder.write_text("")
    assert problems(main) == ["conf.d: cannot be read as a folder: Not a directory"]
    folder.unlink()
    folder.symlink_to(folder)
    assert problems(main) == ["conf.d: cannot be read as a folder: Too many levels of symbolic links"]
    folder.unlink()
    folder.mkdir()
    (folder / "a.toml").mkdir()
    (folder / "b.toml").symlink_to("b.toml")
    (folder / "c.toml").symlink_to("gone")
    os.mkfifo(folder / "d.toml")
    (folder / "e.toml").write_bytes(b"\xff")
    main.write_bytes(b"[log\n")
    assert problems(main) == [
        "worker.toml:1: column 5: Expected ']' at the end of a table declaration",
        "conf.d/a.toml: cannot be read: it is not a plain file",
        "conf.d/b.toml: cannot be read: Too many levels of symbolic links",
        "conf.d/c.toml: cannot be read: No such file or directory",
        "conf.d/d.toml: cannot be read: it is not a plain file",
        "conf.d/e.toml:1: column 1: is not UTF-8 text; save it as UTF-8",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("LIMITS__STALL_S", "1\ny = 1", "limits.stall_s: expected float, got str"),
        ("LIMITS__STALL_S", "[1", "limits.stall_s: expected float, got str"),
        ("LIMITS__STALL_S", "1" * 99_999, "limits.stall_s: number out of range"),
        ("LIMITS__STALL_S", "nan", "limits.stall_s: expected float > 0.0"),
        ("LIMITS____STALL_S", "1", "there is no place limits..stall_s in the configuration"),
        ("", "1", "there is no place  in the configuration"),
        ("MODELS__0__NAME", "x", "models: expected a list, got a table"),
        ("WORKER__LABELS__A", "\udcff", "worker.labels.a: is not UTF-8 text"),
        ("WORKER__STATE_DIR", "a\0b", "worker.state_dir: holds a zero byte"),
    ],
)
def test_odd_variables(tmp_path, variable, value, sentence):
    path = tmp_path / "worker.toml"
    path.write_text("")
    assert problems(path, **{f"BULKHEAD__{variable}": value}) == [f"BULKHEAD__{variable}: {sentence}"]


@pytest.mark.parametrize("index", ["-1", "1", "0x0", "²", "9" * 5000])
def test_an_item_that_is_not_there(main, index):
    (found,) = problems(main, **{f"BULKHEAD__MODELS__{index}__DEVICE": "cpu"})
    assert "there is no place models." in found
