"""The road from one box to three replicas, as scripts/replicas plays it: real processes over a real PostgreSQL.

The script judges itself: each job counted once, each stream whole to the word, the old key good everywhere. Here its
verdict is read, and that nothing of it stays behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")
pytest.importorskip("xllamacpp", reason="xllamacpp, which serves the chat model, is not installed (extra: llm)")

from coordinator.testing_postgres import why_not

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900.0  # the script's own bounds end it long before
TOLD = (
    "three done, one waiting",
    "the job that waited is done",
    "`kill -9` hits replica",
    "200 of 200 words",
    "A rolling upgrade",
    "each once",
)


@pytest.fixture
def place() -> Iterator[Path]:
    """For the script's temporary folders: PostgreSQL, as another user, must reach its own, and sockets be short."""
    folder = Path(tempfile.mkdtemp(prefix="road-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def running(place: Path) -> list[str]:
    """Processes that name the folder."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [str(one.info) for one in found if any(str(place) in word for word in one.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_from_one_box_to_three_replicas_nothing_is_lost_and_nothing_stays_behind(place: Path) -> None:
    argv = [sys.executable, str(ROOT / "scripts" / "replicas_road.py"), "--json"]
    environ = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends what it started
            out, err = process.communicate(timeout=120)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines, err
    last = lines[-1]
    assert (process.returncode, last["ok"], last["wrong"]) == (0, True, ""), f"{out}\n{err}"
    told = " ".join(line.get("story", "") for line in lines)
    assert [words for words in TOLD if words not in told] == []
    assert last["streams"] >= 9  # three of each of three clients
    assert last["jobs"] == last["streams"] + 2  # the long stream, and the job that waited
    assert list(place.iterdir()) == []
    until = time.monotonic() + 60
    while left := running(place):  # PostgreSQL's helpers end with it, not before it
        assert time.monotonic() < until, left
        time.sleep(0.05)
