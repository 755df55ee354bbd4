"""Verbs that order something, as a person types them, against a served socket."""

from __future__ import annotations

import io
import json
import sys

import pytest

from supervisor.control import asked
from supervisor.control.commands.layout import Paper
from supervisor.control.commands.ordering import SOURCES, NoSuch, reloaded, which_gpu
from supervisor.control.snapshot import GpuView, Snapshot
from supervisor.intake.holds import Hold, Source
from supervisor.reload import Outcome
from supervisor.reload_plan import Apply, Change

GPUS = (
    GpuView(uuid="GPU-aa11", name="NVIDIA H200"),
    GpuView(uuid="GPU-aa22", name="NVIDIA L4"),
    GpuView(uuid="GPU-bb33", name="NVIDIA L4"),
)
LISTED = [{"uuid": gpu.uuid, "name": gpu.name} for gpu in GPUS]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["pause"], ("pause", "", None, False)),
        (["pause", "--for", "2h"], ("pause", "", 7200.0, False)),
        (["pause", "--for", "1h30m", "--free-vram", "--reason", "a game"], ("pause", "a game", 5400.0, True)),
        (["resume"], ("resume",)),
        (["drain"], ("drain", "the operator asked for it", False)),
        (["drain", "--reason", "moving"], ("drain", "moving", False)),
        (["drain", "--restart"], ("drain", "the operator asked for it", True)),
    ],
)
@pytest.mark.parametrize("how", [[], ["--json"]])
async def test_an_order(box, types, capsys, words, asked, how):
    assert await types(*words, *how) == 0
    assert box.acts.asked == [asked]
    out = capsys.readouterr().out
    assert out
    if how:
        json.loads(out)


async def test_resume_without_a_pause_says_so(box, types, capsys):
    box.acts.held = False
    assert await types("resume") == 0
    assert capsys.readouterr().out == "It was not paused by the operator.\n"


async def test_resume_says_what_else_holds(box, types, capsys):
    box.shown = Snapshot(version="1", holds=(Hold(source=Source.BATTERY, reason="it is low", since=1.0),))
    assert await types("resume") == 0
    assert capsys.readouterr().out.startswith("Resumed, but not taking jobs yet:")


async def test_resume_says_that_it_drains(box, types, capsys):
    box.shown = Snapshot(version="1", draining="an update", holds=(Hold(source=Source.DISK, since=1.0),))
    assert await types("resume") == 0
    assert capsys.readouterr().out == (
        "Resumed.\nIt takes no jobs: it is draining (an update), and that is not undone.\n"
    )


async def test_orders_of_a_scope(box, types, capsys):
    box.shown = Snapshot(version="1", gpus=GPUS)
    assert await types("pause", "--kind", "image", "--gpu", "h200", "--for", "1h") == 0
    assert capsys.readouterr().out.startswith("No more image jobs on GPU h200; `supervisor resume`")
    assert await types("resume", "--kind", "image", "--gpu", "0") == 0
    assert await types("gpus", "cordon", "2", "--reason", "a fan", "--unload") == 0
    assert await types("gpus", "uncordon", "GPU-b") == 0
    assert await types("holds", "put", "update", "--mode", "unload", "--for", "30m") == 0
    assert await types("holds", "lift", "update", "--gpu", "1") == 0
    assert box.acts.asked == [
        ("pause", "", 3600.0, False, "image", "GPU-aa11"),
        ("resume", "image", "GPU-aa11"),
        ("cordon", "GPU-bb33", asked.Cordon(reason="a fan", unload=True)),
        ("uncordon", "GPU-bb33"),
        ("put_hold", asked.PutHold(source=Source.UPDATE, mode="unload", for_s=1800.0)),
        ("lift_hold", "update", "", "GPU-aa22"),
    ]


@pytest.mark.parametrize(
    ("words", "asked_"),
    [
        (["engines", "restart", "chat"], ("restart", "chat", "", False)),
        (["engines", "restart", "chat", "--now", "--reason", "it hangs"], ("restart", "chat", "it hangs", True)),
        (["engines", "unload", "a/b c"], ("unload", "a/b c", "")),
        (["models", "load", "chat"], ("load", "chat")),
        (["models", "unload", "chat", "--reason", "a game"], ("unload", "chat", "a game")),
        (["shutdown"], ("shutdown", "the operator asked for it")),
        (["reload"], ("reload",)),
        (["log-level", "debug", "--for", "10m"], ("log_level", "debug", 600.0)),
    ],
)
@pytest.mark.parametrize("how", [[], ["--json"]])
async def test_an_order_to_a_part(box, types, capsys, words, asked_, how):
    assert await types(*words, *how) == 0
    assert box.acts.asked == [asked_]
    out = capsys.readouterr().out
    assert out
    if how:
        json.loads(out)


# ---- register: the token is on no command line


async def test_register_reads_the_token_from_its_input(box, types, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("s3cret\nmore"))
    assert await types("register", "wss://gpu.example.org") == 0
    assert box.acts.asked == [("register", asked.Register(url="wss://gpu.example.org", token="s3cret"))]


async def test_register_names_the_file_as_it_is_meant_here(box, types, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert await types("register", "wss://c", "--token-file", "token", "--tls-ca", "ca.pem", "--no-check") == 0
    order = asked.Register(
        url="wss://c", token_file=str(tmp_path / "token"), tls_ca=str(tmp_path / "ca.pem"), check=False
    )
    assert box.acts.asked == [("register", order)]


async def test_register_without_a_token(box, types, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert await types("register", "wss://c") == 64
    assert "--token-file" in capsys.readouterr().err
    assert box.acts.asked == []


# ---- which GPU


@pytest.mark.parametrize(
    ("word", "uuid"),
    [
        ("0", "GPU-aa11"),
        ("2", "GPU-bb33"),
        ("GPU-aa22", "GPU-aa22"),
        ("gpu-b", "GPU-bb33"),
        ("H200", "GPU-aa11"),
        ("nvidia h200", "GPU-aa11"),
    ],
)
def test_which_gpu(word, uuid):
    assert which_gpu(word, LISTED) == uuid


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("GPU-aa", "may be GPU-aa11, GPU-aa22; name one"),
        ("L4", "may be GPU-aa22, GPU-bb33; name one"),
        ("3", "There is no GPU 3; there is 0: GPU-aa11"),
        ("GPU-c", "There is no GPU GPU-c"),
        ("-1", "There is no GPU -1"),
    ],
)
def test_which_gpu_is_not_clear(word, sentence):
    with pytest.raises(NoSuch, match=sentence):
        which_gpu(word, LISTED)


def test_which_gpu_of_none():
    with pytest.raises(NoSuch, match="there is none"):
        which_gpu("0", [])


def test_the_sources_are_those_of_holds():
    assert tuple(Source) == SOURCES


# ---- reload


def test_what_a_reload_changed():
    change = Change(path=("limits", "stall_s"), old=60.0, new=300.0, apply=Apply.LIVE)
    other = Change(path=("coordinator", "url"), old="embedded", new="ws://c", apply=Apply.RESTART)
    outcome = Outcome(reason="asked", applied=(change,), restart=(other,), notes=("worker.toml:1: a note",))
    assert reloaded(outcome.plain(), Paper()).splitlines() == [
        "Changed: limits.stall_s, from 60.0 to 300.0",
        'Needs `supervisor drain --restart`: coordinator.url, from "embedded" to "ws://c"',
        "worker.toml:1: a note",
    ]
    assert reloaded(Outcome(reason="asked").plain(), Paper()) == "Nothing has changed."


async def test_a_reload_of_a_wrong_configuration(box, types, capsys, monkeypatch):
    async def reload(_self: object) -> dict[str, object]:
        return Outcome(reason="asked", problems=("worker.toml:3: limits.drain_s: expected float",)).plain()

    monkeypatch.setattr(type(box.acts), "reload", reload)
    assert await types("reload") == 1
    assert capsys.readouterr().out == "worker.toml:3: limits.drain_s: expected float\nNothing has changed.\n"
