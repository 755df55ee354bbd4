"""`supervisor models pull | remove` while a supervisor runs, and while none does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import trio

from supervisor import pull
from supervisor.cli import main
from supervisor.control import asked
from supervisor.control.commands import models
from supervisor.control.exchange import Refused
from supervisor.pulls import Pulls


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """Commands that this process carried out itself."""
    done: list[str] = []

    def note(arguments: object) -> int:
        done.append(arguments.models_command)  # type: ignore[attr-defined]
        sys.stdout.write("It is gone.\n")
        return 0

    monkeypatch.setattr(pull, "main", note)
    return done


DONE = {"name": "a", "bytes": 3 * 2**20, "folder": "/m/a", "engine": "llm", "config": "/w.toml", "t": "done"}


async def test_a_pull_of_the_supervisor(box, types, here, capsys, tmp_path, monkeypatch):
    async def events(_self):
        yield {"t": "plan", "files": ["a.gguf"], "total_bytes": 3, "origin": "hub"}
        yield None
        yield {"t": "note", "text": "as it was"}
        yield DONE

    monkeypatch.setattr(type(box.acts), "_events", events)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    words = ["a.gguf", "--name", "a", "--token-file", "t", "--force"]
    assert await types("models", "pull", *words) == 0
    order = asked.Pull(source=str(tmp_path / "a.gguf"), name="a", token_file=str(tmp_path / "t"), force=True)
    assert box.acts.asked == [("pull", order)]
    seen = capsys.readouterr()
    assert seen.out == "a: 3.0 MiB in /m/a, engine llm.\nIt is in /w.toml.\n"
    assert "as it was" in seen.err
    assert await types("models", "pull", *words, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["t"] for line in lines] == ["plan", "note", "done"]
    assert here == []


@pytest.mark.parametrize(
    ("end", "sentence"),
    [([{"t": "failed", "message": "The repository has moved."}], "has moved"), ([], "The supervisor has ended")],
)
async def test_a_pull_that_fails(box, types, capsys, monkeypatch, end, sentence):
    async def events(_self):
        for each in end:
            yield each

    monkeypatch.setattr(type(box.acts), "_events", events)
    assert await types("models", "pull", "owner/repo") == 1
    assert sentence in capsys.readouterr().err


async def test_a_pull_that_is_refused(box, types, capsys, monkeypatch):
    """For programs as one that fails, whoever says so."""

    def refuse(_self: object, _order: object) -> None:
        raise Refused(429, "8 pulls are under way; wait for one of them.")

    monkeypatch.setattr(type(box.acts), "pull", refuse)
    assert await types("models", "pull", "owner/repo", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said == {"t": "failed", "message": "8 pulls are under way; wait for one of them."}


async def test_a_removal_by_the_supervisor(box, types, here, capsys):
    assert await types("models", "remove", "a", "--keep-files") == 0
    assert box.acts.asked == [("remove", asked.Remove(name="a", keep_files=True))]
    assert capsys.readouterr().out == "It is gone.\n"
    assert await types("models", "remove", "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["message"] == "It is gone."
    assert here == []


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["--here"], {}),
        (["--models-dir", "m"], {}),
        ([], {"HF_TOKEN": "x"}),
        ([], {"HF_HUB_OFFLINE": "1"}),
    ],
)
async def test_what_only_this_process_knows_keeps_it_here(box, types, here, monkeypatch, words, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert await types("models", "pull", "owner/repo", *[word for word in words if word]) == 0
    assert (here, box.acts.asked) == (["pull"], [])


async def test_the_supervisors_own_child_does_it_itself(box, types, here, monkeypatch):
    """Else the supervisor would ask itself, and wait for itself."""
    monkeypatch.setattr(models.os, "getppid", os.getpid)
    box.shown = box.shown.__class__(version="1", pid=os.getpid())
    assert await types("models", "remove", "a") == 0
    assert (here, box.acts.asked) == (["remove"], [])


async def test_the_supervisors_child_is_known_by_its_parent(box, config, tmp_path):
    """With the real child: a removal that goes to the socket would come back to us, and be noted."""
    box.shown = box.shown.__class__(version="1", pid=os.getpid())
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60), pytest.raises(Refused, match="has no model named a"):
            await Pulls(Path(config), nursery).remove(asked.Remove(name="a"))
        with trio.fail_after(60):
            (tmp_path / "nothing.gguf").write_bytes(b"nothing")
            order = asked.Pull(source=str(tmp_path / "nothing.gguf"))
            said = [event async for event in Pulls(Path(config), nursery).pull(order)]
        nursery.cancel_scope.cancel()
    assert said[-1]["t"] == "failed"
    assert box.acts.asked == []


def test_without_a_supervisor(tmp_path, here, capsys):
    path = tmp_path / "worker.toml"
    path.write_text('[control]\nsocket = "none.sock"\n')
    assert main(["models", "pull", "owner/repo", "--config", str(path)]) == 0
    assert main(["models", "remove", "a", "--json", "--config", str(tmp_path / "new.toml")]) == 0
    assert here == ["pull", "remove"]
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["message"] == "It is gone."
