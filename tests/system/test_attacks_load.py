"""Too much at once: many clients on few slots, huge results, many files, and a disk that is full."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.faults import CODES

MIB = 2**20


@pytest.fixture
def rig(shared_rig) -> Iterator[Any]:
    """The module's supervisor, which must come out of each test as the same two processes, with nothing left."""
    before = (shared_rig.process.pid, shared_rig.coordinator().pid)
    yield shared_rig
    assert (shared_rig.process.pid, shared_rig.coordinator().pid) == before
    assert "Traceback" not in shared_rig.words(), shared_rig.words()


def settled(rig: Any, rigs: Any) -> None:
    """No job waits or runs, and no attempt has a folder."""
    client = rig.client()
    for state in ("queued", "running"):
        rigs.until(
            lambda state=state: not client.get("/v1/jobs", params={"state": state}).json()["data"],
            f"no job is {state}",
        )
    rigs.until(lambda: not rig.attempts(), "no attempt has a folder")


def descriptors(rig: Any) -> dict[str, int]:
    return {"supervisor": psutil.Process(rig.process.pid).num_fds(), "coordinator": rig.coordinator().num_fds()}


def resident(rig: Any) -> int:
    return psutil.Process(rig.process.pid).memory_info().rss + rig.coordinator().memory_info().rss


# ---- many at once


def crowd(rig: Any, rigs: Any, clients: int, chance: random.Random) -> list[str]:
    """So many chats at once, a third of which leave early; how each ended."""
    outcomes: list[str] = []
    lock = threading.Lock()

    def one(number: int) -> None:
        leaves = number % 3 == 0
        body = rigs.chat(f"caller {number}", "synthetic-slow", max_tokens=4, stream=number % 2 == 0)
        patience = httpx.Timeout(120, read=chance.uniform(0.01, 0.4) if leaves else 120)
        try:
            answer = client.post("/v1/chat/completions", json=body, timeout=patience)
            outcome = judged(answer, number)
        except httpx.TimeoutException:
            outcome = "left" if leaves else "hung"
        with lock:
            outcomes.append(outcome)

    limits = httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {rig.key()}"}
    with (
        httpx.Client(
            base_url=f"http://127.0.0.1:{rig.port}", headers=headers, limits=limits, trust_env=False
        ) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        list(pool.map(one, range(clients)))
    return outcomes


def judged(answer: httpx.Response, number: int) -> str:
    """ "complete", or the code of a typed error; anything else is a sentence."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        return "complete" if lines and lines[-1] == "data: [DONE]" else f"torn stream {lines[-1:]}"
    if answer.status_code == 200:
        words = answer.json()["choices"][0]["message"]["content"].split()
        right = words == ["caller", str(number)] * 2
        return "complete" if right else f"wrong answer {words}"
    code = answer.json()["error"]["code"]
    return code if code in CODES else f"untyped {answer.text}"


def test_fifty_clients_on_two_slots_are_answered_and_nothing_leaks(rig, rigs):
    chance = random.Random(7)
    crowd(rig, rigs, 10, chance)  # threads, pools and caches are there afterwards
    settled(rig, rigs)
    before, memory = descriptors(rig), resident(rig)
    for _ in range(2):
        outcomes = crowd(rig, rigs, 50, chance)
        assert len(outcomes) == 50
        assert set(outcomes) <= {"complete", "left"}, outcomes
        assert outcomes.count("complete") >= 33
    settled(rig, rigs)
    rigs.until(
        lambda: all(now <= before[name] + 2 for name, now in descriptors(rig).items()),
        f"the descriptors are given back: {before}",
    )
    assert resident(rig) - memory < 40 * MIB


# ---- much at once


@pytest.mark.parametrize(("rows", "dimensions"), [(2, 8), (40, 512), (300, 1024), (64, 16_384)])
def test_embeddings_of_any_size_come_back_whole(rig, rigs, rows: int, dimensions: int):
    """From 64 bytes inside the message to 4 MiB by way of a file."""
    body = {"model": "synthetic", "input": [f"text {n}" for n in range(rows)], "dimensions": dimensions}
    answer = rig.client().post("/v1/embeddings", json=body | {"encoding_format": "base64"})
    assert answer.status_code == 200, answer.text[:300]
    vectors = [base64.b64decode(item["embedding"]) for item in answer.json()["data"]]
    assert len(vectors) == rows
    assert {len(vector) for vector in vectors} == {4 * dimensions}
    assert len(set(vectors)) == rows
    settled(rig, rigs)


def run_files(rig: Any, rigs: Any, count: int, size: int) -> dict[str, Any]:
    client = rig.client()
    args = {"count": str(count), "size": str(size)}
    id_ = rigs.submit(client, {"kind": "command", "model": "files", "params": {"args": args}})
    return rigs.ended(client, id_)


@pytest.mark.parametrize(("count", "size"), [(1, 10 * MIB), (100, 1000), (1, 0)])
def test_files_of_a_command_come_back_whole(rig, rigs, count: int, size: int):
    found = run_files(rig, rigs, count, size)
    assert found["state"] == "succeeded", found["fault"]
    assert len(found["files"]) == count
    client = rig.client()
    for file in found["files"]:
        number = int(file["name"].removeprefix("part-").removesuffix(".bin"))
        assert client.get(file["url"]).content == bytes([number % 256]) * size
    settled(rig, rigs)


def test_more_files_than_a_job_may_have_are_a_typed_end_and_not_tried_again(rig, rigs):
    found = run_files(rig, rigs, 2000, 1)
    assert found["tries"] == 1, found
    if found["state"] == "succeeded":  # what is left out is said in the output
        result = rig.client().get(f"/v1/jobs/{found['id']}/result").json()
        assert any("not returned" in line for line in result["output_tail"]), result
    else:
        assert found["fault"]["code"] in CODES
    settled(rig, rigs)


# ---- no room


def test_a_full_disk_is_a_typed_answer_and_over_when_there_is_room_again(new_rig, rigs, tmp_path: Path):
    try:
        with rigs.tiny_disk(tmp_path / "disk", "12m") as disk:
            # A disk as small as this one is nearly full all the time, and after a while no jobs would be taken.
            limits = 'drain_s = 20\n[holds.disk]\nmode = "off"'
            rig = new_rig("disk", want=frozenset({"synthetic", "files"}), limits=limits)
            rig.log = tmp_path / "log"
            fill_and_free(rig, rigs, disk)
            rig.sweep()
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


def fill_and_free(rig: Any, rigs: Any, disk: Path) -> None:
    client = rig.ready()
    process, coordinator = rig.process.pid, rig.coordinator().pid

    # An upload that does not fit.
    audio = {"file": ("a.wav", wav(20 * MIB), "audio/wav")}
    refused = client.post("/v1/audio/transcriptions", files=audio, data={"model": "synthetic"})
    assert refused.status_code == 507, refused.text
    assert refused.json()["error"]["code"] == "storage_full"

    # Output that does not fit: on the worker, or at the coordinator once it is delivered.
    found = run_files(rig, rigs, 1, 20 * MIB)
    assert found["state"] == "failed"
    assert found["fault"]["code"] in ("command_failed", "worker_disk_full", "storage_full", "upload_failed"), found

    # Not one byte is left: what needs the disk is refused, what does not goes on, and nothing ends.
    ballast = disk / "ballast"
    fill(ballast)
    for _ in range(3):
        answer = client.post("/v1/chat/completions", json=rigs.chat("x"))
        if answer.status_code != 200:
            assert answer.status_code in (503, 507), answer.text
            assert answer.json()["error"]["code"] in CODES
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200

    ballast.unlink()
    rigs.until(
        lambda: client.post("/v1/chat/completions", json=rigs.chat("room again")).status_code == 200,
        "chats are answered again",
    )
    assert run_files(rig, rigs, 2, 1000)["state"] == "succeeded"
    assert (rig.process.pid, rig.coordinator().pid) == (process, coordinator)
    assert rig.end() == 0, rig.words()

    # A start without any room is refused with the cure, and harms nothing.
    fill(ballast)
    rig.log.write_text("")
    assert rig.start().wait(rigs.PATIENCE_S) == 70
    assert "make room" in rig.words()
    assert "Move it away" not in rig.words()
    assert "Traceback" not in rig.words()
    ballast.unlink()
    client = rig.ready()
    assert client.get(f"/v1/jobs/{found['id']}").json()["state"] == "failed"
    assert rig.end() == 0, rig.words()


def fill(path: Path) -> None:
    """Write until the disk is full, to the last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue


def wav(size: int) -> bytes:
    """A WAV file of silence."""
    riff = (36 + size).to_bytes(4, "little")
    form = b"\x01\x00\x01\x00" + (16000).to_bytes(4, "little") + (32000).to_bytes(4, "little") + b"\x02\x00\x10\x00"
    head = b"RIFF" + riff + b"WAVEfmt " + (16).to_bytes(4, "little") + form
    return head + b"data" + size.to_bytes(4, "little") + bytes(size)
