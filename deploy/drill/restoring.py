"""A fault of a drill: PostgreSQL is restored from a dump, and the installation starts held.

Nothing is written between the dump and the restore. So nothing is lost, and what is sent again by
itself breaks a promise.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import CHILD_ENVIRONMENT, Child, LocalServerError, run_to_end
from outbox_server.deploy.drill.database import (
    CopiedDatabase,
    count_open_jobs,
    is_held,
)
from outbox_server.deploy.drill.operator import DrillOperator
from outbox_server.deploy.drill.stack import DrillStack
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.postgres import QUERY_ERRORS
from outbox_server.deploy.wheels import postgres_binaries

# Other faults may kill PostgreSQL meanwhile; then a step is repeated.
_STEP_LIMIT_S: Final = 120.0
_TOOL_LIMIT_S: Final = 60.0


class Restoring:
    """Restores the database of a stack, and releases what is held."""

    def __init__(self, stack: DrillStack, operator: DrillOperator, writes: asyncio.Lock) -> None:
        """`writes` is the lock for changes of the database that no service makes."""
        self._stack = stack
        self._operator = operator
        self._writes = writes
        # The mails that were sent although they were held, one per line.
        self.problems: list[str] = []

    async def restore(self, lasts: float) -> None:
        """Restore the database. An operator releases its mail after `lasts` seconds."""
        databases = CopiedDatabase(lambda: self._stack.postgres.url("postgres", SUPERUSER))
        async with self._writes:
            await until(lambda: _tried(databases.set_aside), _STEP_LIMIT_S)
            # After their restart, the dispatchers work with the restored database.
            for service in self._stack.system.services:
                if service.name == "dispatcher":
                    service.child.signal(signal.SIGKILL)
            await until(lambda: _tried(lambda: self._copy(databases)), _STEP_LIMIT_S)
            restored = time.time()
            await until(lambda: _tried(databases.put_in_place), _STEP_LIMIT_S)
        try:
            await until(lambda: _tried(self._has_decided), _STEP_LIMIT_S)
        except TimeoutError:
            self.problems.append(f"no hold began within {_STEP_LIMIT_S:g} s of a restore")
            return
        await asyncio.sleep(lasts)
        released = time.time()
        if await self._releases():
            began = [one.started_at for one in self._stack.inbox.mails]
            early = sum(restored < each < released for each in began)
            if early:
                self.problems.append(f"{early} mails were sent although they were held")

    async def _copy(self, databases: CopiedDatabase) -> None:
        """Dump the database that was set aside, and restore the dump.

        Raises:
            LocalServerError: a tool failed.
            psycopg.Error: PostgreSQL cannot be reached.
        """
        await databases.make_empty()
        dump = self._stack.system.folder / "drill.dump"
        await self._run("pg_dump", "-Fc", "-f", dump, "-d", self._url(databases.aside))
        words = ("--no-owner", "--role=outbox", "--exit-on-error")
        await self._run("pg_restore", *words, "-d", self._url(databases.copy), dump)

    async def _run(self, name: str, *words: str | Path) -> None:
        folder = self._stack.system.folder
        tool = Child(
            name,
            [postgres_binaries() / name, *words],
            log=folder / "logs" / f"{name}.log",
            cwd=folder,
            environment=CHILD_ENVIRONMENT,
        )
        await run_to_end(tool, _TOOL_LIMIT_S)

    def _url(self, database: str) -> str:
        return self._stack.postgres.url(database, SUPERUSER)

    async def _has_decided(self) -> bool:
        """Whether the dispatchers serve again, and have noticed the restore."""
        url = self._stack.system.servers.database_url
        if not await is_held(url) and await count_open_jobs(url):
            return False
        services = [one for one in self._stack.system.services if one.name == "dispatcher"]
        return all([await service.serving() for service in services])

    async def _releases(self) -> bool:
        """Release everything; False if nothing is held, because no job was open."""
        held: list[bool] = []

        async def known() -> None:
            held.append(await is_held(self._stack.system.servers.database_url))

        await until(lambda: _tried(known), _STEP_LIMIT_S)
        if held[-1]:
            await self._operator.release_all()
        return held[-1]


async def _tried(step: Callable[[], Awaitable[bool | None]]) -> bool:
    """Return whether a step was done; False if another fault has hit it."""
    try:
        return await step() is not False
    except (*QUERY_ERRORS, LocalServerError):
        return False
