"""The config of a study goes in; its outputs go out together, from wherever they lie, and as the engine said."""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from protocol.link_wire import RESULT_FILE
from supervisor.link.dialects.goliat_delivery import GoliatDelivery
from supervisor.link.dialects.goliat_http import Http, Trouble
from supervisor.link.dialects.goliat_wire import Slip
from supervisor.testing_goliat import Answer, Dashboard, open_dashboard


class Bench:
    def __init__(self, folder: Path, dashboard: Dashboard, http: Http) -> None:
        self.folder, self.dashboard = folder, dashboard
        self.delivery = GoliatDelivery(http, folder / "kept")
        (self.part,) = dashboard.study("x", {"a": 1})
        self.slip = Slip(id=self.part.id, index=0)

    def file(self, name: str, content: bytes, sha256: str = "") -> OutputFile:
        (self.folder / name).write_bytes(content)
        return OutputFile(name, "text/plain", len(content), sha256 or hashlib.sha256(content).hexdigest())

    def opener(self, file: OutputFile) -> functools.partial[int]:
        return functools.partial(os.open, self.folder / file.name, os.O_RDONLY)

    async def take(self, *files: OutputFile, patience_s: float | None = math.inf) -> None:
        for file in files:
            await self.delivery.upload(self.slip.text(), file, self.opener(file), patience_s=patience_s)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with open_dashboard() as dashboard, Http(dashboard.url) as http:
        bench = Bench(tmp_path, dashboard, http)
        yield bench
        bench.delivery.close()


async def test_the_config_is_written_until_it_is_dropped(bench: Bench) -> None:
    ref = bench.delivery.offer(bench.slip, b"config")
    assert (ref.name, ref.size, ref.sha256) == ("config", 6, hashlib.sha256(b"config").hexdigest())
    path, moved = bench.folder / "in", list[int]()
    for _ in range(2):
        await bench.delivery.fetch(ref, lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), moved.append)
    assert path.read_bytes() == b"config"
    assert moved == [6, 6]
    bench.delivery.drop(bench.slip)
    with pytest.raises(FaultError) as caught:
        await bench.delivery.fetch(ref, lambda: os.open(path, os.O_WRONLY))
    assert caught.value.fault.code == "input_unavailable"


async def test_a_config_that_cannot_be_written_is_the_workers_fault(bench: Bench) -> None:
    ref = bench.delivery.offer(bench.slip, b"config")
    with pytest.raises(FaultError) as caught:
        await bench.delivery.fetch(ref, lambda: os.open(bench.folder, os.O_WRONLY))
    assert caught.value.fault.code == "worker_failed"

    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FaultError) as caught:
        await bench.delivery.fetch(ref, full)
    assert caught.value.fault.code == "worker_disk_full"


@pytest.mark.parametrize("patience_s", [math.inf, 600.0])
async def test_all_files_go_in_one_upload_from_the_outbox_or_from_a_folder_that_is_gone(
    bench: Bench, patience_s: float
) -> None:
    files = [bench.file("a", b"A" * 3_000_000), bench.file("b", b""), bench.file('c "\r\n', b"C")]
    await bench.take(*files, patience_s=patience_s)
    await bench.take(*files, patience_s=patience_s)  # a new session says it again
    if patience_s != math.inf:
        for file in files:
            (bench.folder / file.name).unlink()
    bench.dashboard.stumbles[f"/api/assignments/{bench.part.id}/results"] = [Answer(500)]
    with pytest.raises(Trouble) as caught:
        await bench.delivery.hand_over(bench.slip, files, to_dashboard=True)
    assert caught.value.again
    assert await bench.delivery.hand_over(bench.slip, files, to_dashboard=True) == ""
    assert bench.part.files == {"a": b"A" * 3_000_000, "b": b"", "c %22%0D%0A": b"C"}
    assert (bench.part.uploads, bench.part.relative_path) == (1, "split_0")
    assert bench.delivery.slip(bench.slip.key) == bench.slip
    bench.delivery.drop(bench.slip)
    assert bench.delivery.slip(bench.slip.key) is None


async def test_what_the_dashboard_has_no_place_for_is_kept(bench: Bench) -> None:
    files = [bench.file("a", b"A"), bench.file("b", b"B")]
    await bench.take(*files, patience_s=1.0)
    where = Path(await bench.delivery.hand_over(bench.slip, files, to_dashboard=False))
    assert {path.name: path.read_bytes() for path in where.iterdir()} == {"a": b"A", "b": b"B"}
    again = await bench.delivery.hand_over(bench.slip, files, to_dashboard=False)
    assert {path.name: path.read_bytes() for path in Path(again).iterdir()} == {"a": b"A", "b": b"B"}
    assert bench.part.uploads == 0


async def test_what_was_kept_is_never_overwritten(bench: Bench) -> None:
    folders = []
    for content in (b"A", b"B", b"B", b"A"):  # attempts are numbered anew in each life of the worker
        file = bench.file("a", content)
        await bench.take(file)
        folders.append(Path(await bench.delivery.hand_over(bench.slip, [file], to_dashboard=False)))
        bench.delivery.drop(bench.slip)
    assert folders[0] == folders[3]
    assert folders[1] == folders[2]
    assert [(folder / "a").read_bytes() for folder in folders[:2]] == [b"A", b"B"]
    assert sorted(path.name for path in (bench.folder / "kept").iterdir()) == sorted({each.name for each in folders})


@pytest.mark.parametrize("other", ["folder", "pipe", "link", "unreadable", "file", "closed"])
async def test_what_cannot_be_compared_counts_as_other_results(bench: Bench, other: str) -> None:
    file = bench.file("a", b"A")
    first, second = (bench.folder / "kept" / f"{bench.slip.job}.{number}" for number in (1, 2))
    await bench.take(file)
    assert Path(await bench.delivery.hand_over(bench.slip, [file], to_dashboard=False)) == first
    match other:  # what people leave in there
        case "folder":
            (first / "plots").mkdir()
        case "pipe":
            os.mkfifo(first / "pipe")
        case "link":
            (first / "link").symlink_to(first / "nothing")
        case "unreadable":
            (first / "secret").write_bytes(b"")
            (first / "secret").chmod(0)
        case "file":
            (first / "a").unlink()
            first.rmdir()
            first.write_bytes(b"packed")
        case "closed":
            (first / "more").write_bytes(b"")
            first.chmod(0)
    try:
        for _ in range(2):
            assert Path(await bench.delivery.hand_over(bench.slip, [file], to_dashboard=False)) == second
    finally:
        first.chmod(0o700)
    assert (second / "a").read_bytes() == b"A"
    assert sorted((bench.folder / "kept").iterdir()) == [first, second]
    assert first.read_bytes() == b"packed" if other == "file" else (first / "a").read_bytes() == b"A"


async def test_what_is_refused_for_good_is_kept_and_what_is_unknown_is_told(bench: Bench) -> None:
    file = bench.file("a", b"A")
    await bench.take(file)
    path = f"/api/assignments/{bench.part.id}/results"
    bench.dashboard.stumbles[path] = [Answer(413), Answer(404)]
    assert (Path(await bench.delivery.hand_over(bench.slip, [file], to_dashboard=True)) / "a").read_bytes() == b"A"
    with pytest.raises(Trouble) as caught:
        await bench.delivery.hand_over(bench.slip, [file], to_dashboard=True)
    assert caught.value.status == 404


@pytest.mark.parametrize("to_dashboard", [True, False])
async def test_a_file_that_is_not_what_the_engine_said_is_never_delivered(bench: Bench, to_dashboard: bool) -> None:
    file = bench.file("a", b"A" * 100_000, sha256="0" * 64)
    await bench.take(file)
    with pytest.raises(FaultError) as caught:
        await bench.delivery.hand_over(bench.slip, [file], to_dashboard=to_dashboard)
    assert caught.value.fault.code == "engine_protocol"
    assert bench.part.files == {}


async def test_without_files_there_is_nothing_to_deliver(bench: Bench) -> None:
    body = OutputFile(RESULT_FILE, "application/msgpack", 1, hashlib.sha256(b"x").hexdigest())
    await bench.delivery.upload(bench.slip.text(), body, b"x")
    assert await bench.delivery.hand_over(bench.slip, [], to_dashboard=True) == ""
    assert bench.dashboard.asked == []


async def test_a_claim_of_another_dialect_is_refused(bench: Bench) -> None:
    file = bench.file("a", b"A")
    with pytest.raises(FaultError) as caught:
        await bench.delivery.upload("/v1/jobs/x/{name}", file, bench.opener(file))
    assert caught.value.fault.code == "upload_failed"
