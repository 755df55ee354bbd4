"""The register: keys, tenants, registrations and enrolment tokens, in one small database.

It is the SQLite file `keys.sqlite` beside the store, or, when the store is PostgreSQL, tables of that database, so that
all replicas share it. `base` says what a register does, `schema` what it holds, `known` keeps what every request asks
for in memory.
"""

from __future__ import annotations

from coordinator.register.base import Register, Turn
from coordinator.register.opening import FILE_NAME, open_register, opened
from coordinator.register.sqlite import SqliteRegister, make_private

__all__ = ["FILE_NAME", "Register", "SqliteRegister", "Turn", "make_private", "open_register", "opened"]
