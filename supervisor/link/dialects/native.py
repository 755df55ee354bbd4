"""`bulkhead.v1`: everything can be said, so nothing is translated."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from supervisor.link.dialects.base import Delivery, Dialect, Features, Home, Spoken
from supervisor.link.session import Address, SessionEnd, Side, converse
from supervisor.link.transfer import Transfer


class _Native:
    def __init__(self, address: Address, transfer: Transfer) -> None:
        self._address, self._transfer = address, transfer

    @property
    def delivery(self) -> Delivery:
        return self._transfer

    async def converse(self, side: Side) -> SessionEnd:
        return await converse(self._address, side)

    @property
    def waits_for(self) -> str:
        return ""

    async def warm_up(self) -> None:
        await self._transfer.warm_up()


@contextlib.asynccontextmanager
async def _open(home: Home) -> AsyncIterator[Spoken]:
    async with Transfer(home.address) as transfer:
        yield _Native(home.address, transfer)


NATIVE = Dialect(
    Features(push=True, many=True, cancel=True, streaming=True, progress=True, resume=True, token=True), _open
)
