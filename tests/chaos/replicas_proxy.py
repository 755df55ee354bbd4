"""Proxies that do what networks do to replicas, by seeded dice: before PostgreSQL, and before a replica's door to the
others. asyncio, because replicas are.

Loss is what TCP makes of it: a packet that is lost costs a retransmission, so a piece of data, and all behind it, comes
200 ms late. A *forgotten* commit is the nastiest deed: the COMMIT reaches the server, its answer never comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

PIECE_BYTES = 2**16
RETRANSMISSION_S = 0.2


class PostgresProxy:
    """Forwards connections of one port of loopback to a server's socket.

    Attributes:
        delay_s: each piece of data takes so long.
        loss: share of pieces that are lost once.
        forget: so many of the next commits lose their answer and their connection.
        forgotten, connections: counts of what was done.
        target: the server's Unix socket; may be changed, for connections from then on.
    """

    def __init__(self, target: Path, seed: int) -> None:
        self.target, self.dice = target, random.Random(seed)
        self.delay_s = self.loss = 0.0
        self.forget = self.forgotten = self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> PostgresProxy:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Cut everything."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, there = await asyncio.open_unix_connection(str(self.target))
        deaf = asyncio.Event()  # a commit is on its way whose answer shall be lost

        async def ask() -> None:
            while data := await self._piece(reader):
                if self.forget > 0 and b"COMMIT\0" in data:
                    self.forget -= 1
                    deaf.set()
                there.write(data)
                await there.drain()

        async def answer() -> None:
            while data := await self._piece(upstream):
                if deaf.is_set():
                    self.forgotten += 1
                    return
                writer.write(data)
                await writer.drain()

        try:
            both = [asyncio.create_task(ask()), asyncio.create_task(answer())]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        finally:
            there.transport.abort()

    async def _piece(self, reader: asyncio.StreamReader) -> bytes:
        data = await reader.read(PIECE_BYTES)
        if data and self.delay_s:
            await asyncio.sleep(self.delay_s)
        if data and self.loss and self.dice.random() < self.loss:
            await asyncio.sleep(RETRANSMISSION_S)
        return data


class PeerProxy:
    """Forwards connections of one port of loopback to another one, or cuts them; a context like `PostgresProxy`.

    Attributes:
        port: where it listens.
        target: to which port; 0 means to none, and who connects is turned away.
        cuts: of how many connections.
    """

    def __init__(self) -> None:
        self.port = self.target = self.cuts = 0
        self._whole = asyncio.Event()
        self._away = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> PeerProxy:
        """Listen on a free port."""
        self._whole.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Cut everything."""
        assert self._server is not None
        self._server.close()
        await self._cut()

    async def cut(self, for_s: float) -> None:
        """Break all connections, and turn new ones away for a while."""
        self._away = True
        await self._cut()
        await asyncio.sleep(for_s)
        self._away = False

    async def stall(self, for_s: float) -> None:
        """Let nothing through, and say nothing of it, as a switch that lost its way."""
        self._whole.clear()
        await asyncio.sleep(for_s)
        self._whole.set()

    async def _cut(self) -> None:
        tasks = list(self._tasks)
        self.cuts += len(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                if self.target and not self._away:
                    await self._forward(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, there = await asyncio.open_connection("127.0.0.1", self.target)
        both = [asyncio.create_task(self._copy(reader, there)), asyncio.create_task(self._copy(upstream, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            there.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE_BYTES):
            await self._whole.wait()
            writer.write(data)
            await writer.drain()
