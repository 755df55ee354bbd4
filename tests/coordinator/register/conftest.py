"""Both registers: the SQLite file, and tables in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.register import Register, open_register
from tests.coordinator.store.conftest import postgres as postgres
from tests.coordinator.store.conftest import space as space

Open = Callable[[], Register]


@pytest.fixture(params=("sqlite", "postgres"))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open the register; every call opens the same data again. All are closed with the test."""
    where = request.getfixturevalue("space") if request.param == "postgres" else ""
    with ExitStack() as stack:

        def opened() -> Register:
            register = open_register(where, tmp_path / "keys.sqlite")
            stack.callback(register.close)
            return register

        yield opened
