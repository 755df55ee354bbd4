from __future__ import annotations

import os

import pytest

from engines.runtime.visible import show_only
from protocol.engine_wire import Model


def test_only_the_device_set_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all of them")
    show_only(Model(name="m"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "all of them"
    show_only(Model(name="m", devices=("GPU-a", "GPU-b")))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
