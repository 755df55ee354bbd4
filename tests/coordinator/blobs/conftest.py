"""Every place that files lie in, opened by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.blobs.base import Blobs
from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.opening import BlobsConfig, open_blobs

if TYPE_CHECKING:
    from tests.coordinator.s3_rig import S3Rig

Make = Callable[..., Blobs]


@pytest.fixture(scope="module")
def rig() -> Iterator[S3Rig]:
    pytest.importorskip("obstore", reason="the extra s3 is not installed")
    pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")
    from tests.coordinator.s3_rig import s3_server

    with s3_server() as rig:
        yield rig


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.coordinator.s3_rig import ID, SECRET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture(params=["folder", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens the same store again and again."""
    if request.param == "folder":
        return lambda **more: FolderBlobs(tmp_path / "blobs", **more)
    rig = request.getfixturevalue("rig")
    request.getfixturevalue("keys")
    config = BlobsConfig(url=f"s3://files/pre/{tmp_path.name}", endpoint=rig.endpoint)

    def opened(**more: Any) -> Blobs:
        blobs = open_blobs(config, tmp_path / "state")
        for name, value in more.items():
            setattr(blobs, {"now_s": "_now_s"}.get(name, name), value)
        return blobs

    return opened
