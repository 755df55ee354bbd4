"""Keys that another process makes while the coordinator runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from coordinator.keys import FILE_NAME, Keys
from coordinator.registrations import Registrations


def made(state: Path) -> str:
    """A key, made by the real command."""
    argv = [sys.executable, "-m", "coordinator", "keys", "create", "--scope", "worker", "--state", str(state)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    return next(word for word in done.stdout.split() if word.startswith("bhw_"))


def test_every_key_made_beside_a_running_coordinator_opens_its_door(tmp_path: Path) -> None:
    """Opening a file anew and closing it drops the locks of its process: the command took itself for the last one."""
    keys = Keys(tmp_path / FILE_NAME)
    registrations = Registrations(tmp_path / FILE_NAME)
    try:
        for _ in range(3):
            assert keys.find(made(tmp_path)) is not None
    finally:
        registrations.close()
        keys.close()
