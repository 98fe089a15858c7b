"""A head loader that stops between its read of PostgreSQL and its write to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.heads.reading import HeadReader
from outbox_server.shared.queue.records import Head
from outbox_server.shared.settings import Settings
from tests.world import World


class SlowReader(HeadReader):
    """Stops after its first read of PostgreSQL until `go` is set."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.has_read = asyncio.Event()
        self.go = asyncio.Event()
        self.looks = 0

    async def read(
        self, connection: AsyncConnection, epochs: Mapping[int, str], rows: Sequence[Row[Any]]
    ) -> tuple[list[Head], dict[int, list[int]]]:
        found = await super().read(connection, epochs, rows)
        self.looks += 1
        if self.looks == 1:
            self.has_read.set()
            await self.go.wait()
        return found


class SlowLoader(HeadLoader):
    """Stops between its first read of PostgreSQL and its write to Redis."""

    def __init__(self, world: World) -> None:
        super().__init__(world.engine, world.queues, world.settings)
        self._reader = self.reader = SlowReader(world.settings)
