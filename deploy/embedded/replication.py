"""A synchronous replica of the embedded PostgreSQL, which can take its place."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.postgres import QUERY_ERRORS, PostgresServer

# Another fault may have killed the primary, which then recovers.
_PATIENCE_S: Final = 120.0
_POLL_S: Final = 0.05
_IN_SYNC: Final = (
    "SELECT count(*) > 0 FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
)
_IS_PRIMARY: Final = "SELECT NOT pg_is_in_recovery()"
_RELOAD: Final = "SELECT pg_reload_conf()"
_SYNCHRONOUS: Final = "ALTER SYSTEM SET synchronous_standby_names = '*'"
_ALONE: Final = "ALTER SYSTEM RESET synchronous_standby_names"


class _HasPostgres(Protocol):
    postgres: PostgresServer


class Replication:
    """Keeps a streaming replica of `servers.postgres`, which must be `replicated`.

    Commits are synchronous: a client gets the answer when the replica has the commit on its disk.
    So a takeover loses nothing that was answered.
    """

    def __init__(self, servers: _HasPostgres) -> None:
        """The owner of `servers` starts again what `servers.postgres` is, if that ends."""
        self._servers = servers
        # The server that an address of the primary leads to. During a takeover it is still the old
        # one, as nobody may read old data from a replica that is not promoted yet.
        self.primary = servers.postgres
        self._home: Path = servers.postgres.folder
        self._made = 0
        self._replica: PostgresServer | None = None
        # All replicas of now and before. One may be the primary by now.
        self._all: list[PostgresServer] = []
        self._replacing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Add a replica, and return when commits wait for it.

        Raises:
            LocalServerError: that takes too long.
        """
        await self._add_replica()

    async def stop(self) -> None:
        """Stop every replica, and the one that has become the primary."""
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.gather(self._replacing, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in self._all))

    async def take_over(self) -> None:
        """Kill the primary with -9, and promote the replica. It gets a new replica meanwhile.

        Raises:
            LocalServerError: the replica was not in sync, or not promoted, for too long.
        """
        if self._replacing is not None:
            await self._replacing
        await _until(self._in_sync, "no replica is in sync")
        old, new = self._servers.postgres, self._replica
        if new is None:
            raise RuntimeError("the replica was not started")
        self._replica = None
        # From here on, the owner of the servers keeps the new one, and lets the old one end.
        self._servers.postgres = new
        await old.kill()
        await _until(lambda: self._promote(new), "the replica is not promoted")
        self.primary = new
        shutil.rmtree(old.folder, ignore_errors=True)
        self._replacing = asyncio.create_task(self._add_replica())

    async def _promote(self, server: PostgresServer) -> bool:
        if not await server.ask(_IS_PRIMARY):
            await server.ask("SELECT pg_promote()")
        # It has no replica yet, so no commit may wait for one.
        await server.ask(_ALONE)
        await server.ask(_RELOAD)
        return bool(await server.ask(_IS_PRIMARY))

    async def _add_replica(self) -> None:
        async def added() -> bool:
            primary = self._servers.postgres
            await primary.ask(_ALONE)
            await primary.ask(_RELOAD)
            self._made += 1
            replica = primary.another(self._home.with_name(f"{self._home.name}-{self._made}"))
            self._all.append(replica)
            try:
                await replica.start_as_replica(primary)
            except LocalServerError:
                # The primary was killed meanwhile.
                shutil.rmtree(replica.folder, ignore_errors=True)
                return False
            self._replica = replica
            return True

        async def synchronous() -> bool:
            await self._servers.postgres.ask(_SYNCHRONOUS)
            await self._servers.postgres.ask(_RELOAD)
            return await self._in_sync()

        await _until(added, "there is no replica")
        await _until(synchronous, "no replica is in sync")

    async def _in_sync(self) -> bool:
        return bool(await self._servers.postgres.ask(_IN_SYNC))


async def _until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait until `condition` is true; a server that cannot be reached makes it false."""
    end = time.monotonic() + _PATIENCE_S
    reason = ""
    while time.monotonic() < end:
        try:
            if await condition():
                return
        except QUERY_ERRORS as error:
            reason = f": {str(error).partition(chr(10))[0]}"
        await asyncio.sleep(_POLL_S)
    raise LocalServerError(f"{otherwise} within {_PATIENCE_S:g} s{reason}")
