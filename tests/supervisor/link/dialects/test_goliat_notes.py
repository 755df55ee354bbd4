"""Assignments are noted on disk, until their end is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.link.dialects.goliat_notes import Notes
from supervisor.link.dialects.goliat_wire import Slip

SLIP = Slip(id="a/1 ü", attempt=2, study="s", index=3, worker="w", failed=True)


async def test_what_was_noted_is_there_in_the_next_life(tmp_path: Path) -> None:
    folder = tmp_path / "goliat" / "notes"
    notes = Notes(folder)
    assert await notes.all() == {}
    await notes.write(SLIP)
    await notes.write(Slip(id="b"))
    await notes.write(Slip(id="b", worker="w"))
    assert await Notes(folder).all() == {SLIP.job: SLIP, "b": Slip(id="b", worker="w")}
    await notes.remove("b")
    await notes.remove("b")
    assert await notes.all() == {SLIP.job: SLIP}
    assert folder.stat().st_mode & 0o777 == 0o700


async def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes(tmp_path)
    await notes.write(SLIP)
    (tmp_path / "x.json").write_bytes(b"\xff{")
    (tmp_path / ".half").write_text("half a note, of a life that was cut")
    assert await notes.all() == {SLIP.job: SLIP}
    assert "x.json is not read" in caplog.text


async def test_a_note_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / f"{SLIP.job}.json").mkdir()
    with pytest.raises(OSError, match="irectory"):
        await Notes(tmp_path).write(SLIP)
    assert [path.name for path in tmp_path.iterdir()] == [f"{SLIP.job}.json"]
