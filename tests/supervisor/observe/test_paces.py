from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.engine_wire import Model
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake.pace import ENOUGH, LAST
from supervisor.observe import paces as paces_module
from supervisor.observe.paces import MOST, SAVE_EVERY_S, Paces, identity_of, rate_of


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(path: Path, **more: Any) -> Paces:
    return Paces(path, lambda model: f"{model}@cuda:0", **more)


@pytest.mark.parametrize(
    ("kind", "usage", "seconds", "rate"),
    [
        ("llm", {"completion_tokens": 100, "prompt_tokens": 10}, 2.0, 50.0),
        ("llm", {"completion_tokens": 31}, 1.0, 0.0),  # too short to say something
        ("llm", {"completion_tokens": 100, "prompt_tokens": 1700}, 2.0, 0.0),  # it mostly read
        ("llm", {"completion_tokens": 100, "prompt_tokens": 1700, "cached_tokens": 1600}, 2.0, 50.0),
        ("llm", {"completion_tokens": 100}, 0.05, 0.0),
        ("llm", {}, 2.0, 0.0),
        ("embedding", {"prompt_tokens": 1024}, 0.5, 2048.0),
        ("embedding", {"prompt_tokens": 8}, 0.5, 0.0),
        ("audio_stt", {"audio_seconds": 60.0}, 6.0, 10.0),
        ("audio_tts", {"audio_seconds": 1.0}, 6.0, 0.0),
        ("image", {"images": 4}, 6.0, 0.0),  # of which size, in how many steps?
        ("x-own", {"completion_tokens": 100}, 1.0, 0.0),
    ],
)
def test_only_runs_that_say_something_have_a_rate(kind, usage, seconds, rate) -> None:
    assert rate_of(kind, usage, seconds) == rate


def test_a_collapse_is_told_once_shown_and_forgiven(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "supervisor")
    shares: list[tuple[str, float]] = []
    paces = made(tmp_path / "paces.json", on_pace=lambda model, share: shares.append((model, share)))
    for _ in range(ENOUGH):
        paces.seen("chat", 40.0)
    assert paces.sentence("chat") == ""
    assert shares == [("chat", 1.0)]
    for _ in range(LAST + 2):
        paces.seen("chat", 4.0)
    assert paces.sentence("chat").startswith("chat runs at 4.0 a second instead of 40.0")
    assert shares[-1] == ("chat", pytest.approx(0.1))
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == paces.sentence("chat")
    for _ in range(LAST):
        paces.seen("chat", 38.0)
    assert paces.sentence("chat") == ""
    assert caplog.messages[1:] == ["chat runs as fast as it used to again"]
    assert paces.sentence("other") == ""


def test_history_is_kept_over_restarts_and_belongs_to_a_device(tmp_path: Path) -> None:
    path = tmp_path / "paces.json"
    first = made(path)
    for _ in range(ENOUGH):
        first.seen("chat", 40.0)
    first.save()
    second = made(path)
    for _ in range(LAST):
        second.seen("chat", 4.0)
    assert second.sentence("chat")
    elsewhere = Paces(path, lambda model: f"{model}@cpu")
    for _ in range(LAST):
        elsewhere.seen("chat", 4.0)
    assert elsewhere.sentence("chat") == "", "on the CPU it was never faster"
    unknown = Paces(path, lambda _model: "")
    unknown.seen("chat", 4.0)
    assert unknown.sentence("chat") == ""


def test_it_is_written_seldom_whole_and_bounded(tmp_path: Path) -> None:
    path, clock = tmp_path / "paces.json", Clock()
    paces = made(path, clock=clock)
    paces.seen("m", 1.0)
    assert not path.exists()
    clock.now += SAVE_EVERY_S
    paces.seen("m", 1.0)
    assert len(json.loads(path.read_bytes())["m@cuda:0"]["healthy"]) == 2
    for number in range(MOST + 50):
        for _ in range(2):
            paces.seen(f"m{number}", 1.0)
    paces.save()
    kept = json.loads(path.read_bytes())
    assert len(kept) == MOST
    assert f"m{MOST + 49}@cuda:0" in kept
    assert "m@cuda:0" not in kept
    assert [each.name for each in tmp_path.iterdir()] == ["paces.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": {"healthy": "x"}}', b"\xff"])
def test_a_broken_file_costs_history_only(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "paces.json").write_bytes(content)
    paces = made(tmp_path / "paces.json")
    assert "is lost" in caplog.text
    paces.seen("chat", 4.0)
    paces.save()
    assert json.loads((tmp_path / "paces.json").read_bytes())["chat@cuda:0"]["last"] == [4.0]


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    real = paces_module.write_atomically
    monkeypatch.setattr(paces_module, "write_atomically", refuse)
    paces = made(tmp_path / "paces.json")
    for _ in range(3):
        paces.seen("chat", 4.0)
        paces.save()
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.setattr(paces_module, "write_atomically", real)
    paces.seen("chat", 4.0)
    paces.save()
    assert (tmp_path / "paces.json").exists()


def test_another_set_up_is_another_identity() -> None:
    engine = EngineSpec(name="llm", module="m", python="p")
    spec = ModelSpec(name="chat", engine=engine, model=Model(name="chat", device="cuda", options={"n_ctx": 8}))
    same = identity_of(spec, "cuda:0")
    assert same == identity_of(msgspec.structs.replace(spec, keep_alive_s=5.0), "cuda:0")
    other = msgspec.structs.replace(spec.model, options={"n_ctx": 16})
    assert len({same, identity_of(spec, "cpu"), identity_of(msgspec.structs.replace(spec, model=other), "cuda:0")}) == 3
