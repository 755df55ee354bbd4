"""A worker's result is judged before it is stored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.blobs.folder import FolderBlobs
from coordinator.results import MAX_USAGE_KEYS, clean_usage, judge_result
from coordinator.store.base import Outcome
from coordinator.testing_link import pieces
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.link_wire import RESULT_FILE, Complete

pack = msgspec.msgpack.encode


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


async def upload(blobs: FolderBlobs, name: str, data: bytes) -> OutputFile:
    await blobs.put_output("job_1", 1, name, pieces(data))
    return OutputFile(name, "image/png", len(data), hashlib.sha256(data).hexdigest())


async def judge(blobs: FolderBlobs, kind: str, result: Any, *files: OutputFile) -> Outcome | Fault:
    body = Complete(files=files) if result is None else Complete(result=msgspec.Raw(pack(result)), files=files)
    return await judge_result(blobs, "job_1", 1, kind, body)


async def test_a_good_result_with_files(blobs: FolderBlobs) -> None:
    file = await upload(blobs, "a.png", b"png")
    outcome = await judge(blobs, "image", {"width": 8, "height": 8, "format": "png", "seeds": [1]}, file)
    assert isinstance(outcome, Outcome)
    assert msgspec.msgpack.decode(outcome.result)["seeds"] == [1]
    (stored,) = outcome.files
    assert (stored.name, stored.size, stored.mime) == ("a.png", 3, "image/png")
    assert await blobs.read(stored.blob, 9) == b"png"


@pytest.mark.parametrize("listed", [True, False])
async def test_a_large_result_comes_as_a_file(blobs: FolderBlobs, listed: bool) -> None:
    text = "x" * (2 * 2**20)
    file = await upload(blobs, RESULT_FILE, pack({"content": text}))
    outcome = await judge(blobs, "llm", None, *([file] if listed else []))
    assert isinstance(outcome, Outcome)
    assert msgspec.msgpack.decode(outcome.result) == {"content": text}
    assert outcome.files == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [({"size": 4}, "upload_failed"), ({"sha256": "0" * 64}, "upload_failed"), ({"name": "b.png"}, "upload_failed")],
)
async def test_files_must_be_there_as_declared(blobs: FolderBlobs, change: dict[str, Any], code: str) -> None:
    file = msgspec.structs.replace(await upload(blobs, "a.png", b"png"), **change)
    outcome = await judge(blobs, "llm", {"content": "x"}, file)
    assert isinstance(outcome, Fault)
    assert (outcome.code, outcome.may_retry) == (code, True)


async def test_a_file_named_twice_is_refused(blobs: FolderBlobs) -> None:
    file = await upload(blobs, "a.png", b"png")
    assert isinstance(await judge(blobs, "llm", {"content": "x"}, file, file), Fault)


@pytest.mark.parametrize(
    ("kind", "result", "code"),
    [
        ("llm", None, "upload_failed"),
        ("llm", {"content": 5}, "engine_protocol"),
        ("llm", "text", "engine_protocol"),
        ("image", {"width": 8}, "engine_protocol"),
        ("x-mine", [1], "engine_protocol"),
    ],
)
async def test_what_does_not_fit_its_kind_is_refused(blobs: FolderBlobs, kind: str, result: Any, code: str) -> None:
    outcome = await judge(blobs, kind, result)
    assert isinstance(outcome, Fault)
    assert outcome.code == code


async def test_bytes_that_are_no_msgpack_are_refused(blobs: FolderBlobs) -> None:
    await upload(blobs, RESULT_FILE, b"\xc1 no msgpack")
    outcome = await judge(blobs, "llm", None)
    assert isinstance(outcome, Fault)
    assert outcome.code == "engine_protocol"


async def test_free_kinds_carry_anything(blobs: FolderBlobs) -> None:
    outcome = await judge(blobs, "x-mine", {"output": {"deep": [1, "two"]}})
    assert isinstance(outcome, Outcome)


def test_usage_keeps_what_can_be_summed() -> None:
    nan, inf = float("nan"), float("inf")
    assert clean_usage({"a": 1.0, "b": nan, "c": inf, "d": -1.0, "e" * 65: 1.0}) == {"a": 1.0}
    assert len(clean_usage({f"k{n}": 1.0 for n in range(100)})) == MAX_USAGE_KEYS


NAN, INF = float("nan"), float("inf")
SEGMENT = {"id": 0, "start": 0.0, "end": 1.0, "text": "x"}


@pytest.mark.parametrize(
    "lie",
    [
        *({"duration": time} for time in (NAN, INF, -INF, 1e300)),
        {"segments": [{**SEGMENT, "end": NAN}]},
        {"segments": [{**SEGMENT, "words": [{"word": "x", "start": INF, "end": 1.0}]}]},
    ],
)
async def test_times_that_are_none_are_no_transcript(blobs: FolderBlobs, lie: dict[str, Any]) -> None:
    good = {"text": "x", "language": "en", "duration": 1.5, "segments": [SEGMENT]}
    assert isinstance(await judge(blobs, "audio_stt", good), Outcome)
    outcome = await judge(blobs, "audio_stt", {**good, **lie})
    assert isinstance(outcome, Fault)
    assert outcome.code == "engine_protocol"


@pytest.mark.parametrize("kind", ["llm", "x-any"])
async def test_what_json_cannot_say_is_no_result(blobs: FolderBlobs, kind: str) -> None:
    odd = [{"a": msgspec.msgpack.Ext(5, b"x")}]
    outcome = await judge(blobs, kind, {"tool_calls": odd, "output": odd})
    assert isinstance(outcome, Fault)
    assert outcome.code == "engine_protocol"
