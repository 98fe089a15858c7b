"""Reports about this dispatcher to PostgreSQL every few seconds.

The first report gives the dispatcher the number that its attempts are stored with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.endpoint_meter import EndpointName
from outbox_server.services.dispatcher.storage.endpoint_reports import (
    EndpointReport,
    write_endpoints,
)
from outbox_server.services.dispatcher.storage.reports import (
    REPORT_EVERY,
    DispatcherReport,
    write_end,
    write_report,
)
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.loops import Loop

_END_LIMIT_S: Final = 2.0


class Reporter:
    """Writes the reports. `describe` returns the present report."""

    def __init__(
        self,
        engine: AsyncEngine,
        describe: Callable[[], DispatcherReport],
        endpoints: Callable[[], Awaitable[Collection[EndpointReport]]],
    ) -> None:
        """`endpoints` returns what was counted at each endpoint."""
        self._engine = engine
        self._describe = describe
        self._endpoints = endpoints
        # The reports of endpoints as they are stored.
        self._stored: dict[EndpointName, EndpointReport] = {}
        # The number of this dispatcher; None before its first report.
        self.number: int | None = None

    async def run(self) -> None:
        """Write reports until cancelled."""
        await Loop("dispatcher report", self.report, errors=DATABASE_ERRORS).run()

    async def report(self) -> timedelta:
        """Write a report, and return the pause until the next one."""
        endpoints = {one.name: one for one in await self._endpoints()}
        async with self._engine.begin() as connection:
            number = await write_report(connection, self.number, self._describe())
            stored = self._stored if number == self.number else {}
            changed = [one for name, one in endpoints.items() if stored.get(name) != one]
            await write_endpoints(connection, number, changed, stored.keys() - endpoints.keys())
        self.number, self._stored = number, endpoints
        return REPORT_EVERY

    async def close(self) -> None:
        """Record the end of this dispatcher, if PostgreSQL answers soon."""
        if self.number is None:
            return
        with suppress(*DATABASE_ERRORS, TimeoutError):
            async with asyncio.timeout(_END_LIMIT_S), self._engine.begin() as connection:
                await write_end(connection, self.number)
