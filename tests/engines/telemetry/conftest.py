"""`nvml`: the scripted stand-in of scripted_nvml.py, loaded by path because test folders are no packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def nvml() -> Any:
    spec = importlib.util.spec_from_file_location("scripted_nvml", Path(__file__).with_name("scripted_nvml.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
