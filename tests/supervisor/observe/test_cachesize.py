from __future__ import annotations

from pathlib import Path

import trio

from supervisor.observe.cachesize import CacheSize, held_bytes


def test_only_what_would_be_free_without_the_folder_counts(tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert held_bytes(models) == 0
    (models / "a").mkdir(parents=True)
    (models / "a" / "weights").write_bytes(b"x" * 1000)
    (models / "b").mkdir()
    (models / "b" / "same").hardlink_to(models / "a" / "weights")  # twice in here: once on the disk
    (tmp_path / "mine").write_bytes(b"y" * 500)
    (models / "b" / "mine").hardlink_to(tmp_path / "mine")  # somebody else's too
    assert held_bytes(models) == 1000
    (tmp_path / "mine").unlink()
    assert held_bytes(models) == 1500


async def test_it_is_unknown_before_the_first_look_and_looked_at_again_and_again(tmp_path: Path) -> None:
    looked, heard = trio.open_memory_channel[int](100)

    class Watched(CacheSize):
        async def look(self) -> None:
            await super().look()
            looked.send_nowait(self.bytes() or 0)

    cache = Watched(tmp_path, every_s=0.01)
    assert cache.bytes() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        with trio.fail_after(20):
            assert await heard.receive() == 0
            (tmp_path / "m").write_bytes(b"x" * 7)
            assert any([await heard.receive() == 7 for _ in range(3)])
        nursery.cancel_scope.cancel()
