"""Tenants: whose jobs there are, their share of the fleet, and what they may."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.keys import (
    THE_PROGRAM,
    Key,
    KeyRefusal,
    checked_limit,
    checked_models,
    plain_name,
)
from coordinator.register import Register, Turn
from coordinator.register.known import Known, tenant_of
from coordinator.register.known import Tenant as Tenant

MAX_WEIGHT = 1000.0
LEAST_WEIGHT = 0.001


class Tenants:
    """The tenants of one coordinator, or of all its replicas. Tenants need not be made: a key names its own.

    `get` and `may_use` look at what is known in memory; the others block, and raise StoreError and FaultError when the
    register is in trouble.
    """

    def __init__(self, place: Known | Register | Path) -> None:
        """Open the register, or its file, where that has not been done. Raises StoreError."""
        self._known = Known.of(place)
        self._register = self._known.register

    def close(self) -> None:
        """Close the register."""
        self._register.close()

    def get(self, name: str) -> Tenant:
        """The tenant as somebody has set it, or by its defaults."""
        return self._known.tenant(name)

    def list(self) -> Iterator[Tenant]:
        """Those that somebody has set, and those that have keys, by name."""
        found = {row["name"]: tenant_of(row) for row in self._register.read("SELECT * FROM tenants")}
        for row in self._register.read("SELECT DISTINCT tenant AS name FROM keys"):
            found.setdefault(row["name"], Tenant(name=row["name"]))
        return iter([found[name] for name in sorted(found)])

    def set(
        self,
        name: str,
        *,
        weight: float | None = None,
        store_content: bool | None = None,
        models: Sequence[str] | None = None,
        rpm: int | None = None,
        concurrent: int | None = None,
        by: str = THE_PROGRAM,
    ) -> Tenant:
        """Set what is given, and leave the rest.

        Raises:
            KeyRefusal: a value that cannot be.
        """
        if not plain_name(name, "tenant"):
            raise KeyRefusal("tenant: Expected a name.")
        if weight is not None and not (math.isfinite(weight) and LEAST_WEIGHT <= weight <= MAX_WEIGHT):
            raise KeyRefusal(f"weight: Expected a number from {LEAST_WEIGHT:g} to {MAX_WEIGHT:g}.")
        given = {
            "weight": weight,
            "store_content": None if store_content is None else int(store_content),
            "models": None if models is None else checked_models(models),
            "rpm": None if rpm is None else checked_limit(rpm, "rpm"),
            "concurrent": None if concurrent is None else checked_limit(concurrent, "concurrent"),
        }
        wanted = {column: value for column, value in given.items() if value is not None}

        def change(turn: Turn) -> Tenant:
            turn.all(
                "INSERT INTO tenants (name, weight, store_content, models, rpm, concurrent, created_ms, changed) "
                "VALUES (:name, 1.0, 1, '[]', 0, 0, :now, :change) ON CONFLICT (name) DO NOTHING RETURNING name",
                name=name,
                now=turn.now_ms,
                change=turn.change,
            )
            columns = "".join(f"{column} = :{column}, " for column in wanted)
            (row,) = turn.all(
                f"UPDATE tenants SET {columns}changed = :change WHERE name = :name RETURNING *",
                **wanted,
                change=turn.change,
                name=name,
            )
            said = ", ".join(f"{column} {value}" for column, value in wanted.items()) or "nothing"
            turn.act(by, f"set of the tenant {name!r}: {said}")
            return tenant_of(row)

        tenant = self._register.write(change)
        self._known.refresh()
        return tenant

    def models(self, key: Key) -> frozenset[str] | None:
        """The only models that this key may use; None: all. What the tenant and the key allow both."""
        theirs, own = self.get(key.tenant).models, key.models
        if theirs and own:
            return frozenset(theirs) & frozenset(own)
        return frozenset(theirs or own) if theirs or own else None

    def may_use(self, key: Key, model: str) -> bool:
        """Whether the key may use the model."""
        allowed = self.models(key)
        return allowed is None or model in allowed

    def may_submit(self, tenant: str, key_id: str, model: str) -> bool:
        """`may_use` for work that was taken a while ago, by the names that it was noted with."""
        key = self._known.prefixes.get(key_id) or Key(prefix=key_id, scope="client", tenant=tenant)
        return self.may_use(key, model)
