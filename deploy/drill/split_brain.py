"""A fault of a drill: two servers of Redis are primaries at once, with dispatchers on each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from outbox_server.deploy.drill.stack import DrillStack
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK

# Another fault may have killed the first server.
_PATIENCE_S: Final = 60.0


class SplitBrain:
    """Promotes a replica while its primary lives on, and leads one dispatcher to it."""

    def __init__(
        self,
        stack: DrillStack,
        restart: Callable[[Service, Mapping[str, str]], Awaitable[None]],
    ) -> None:
        """`restart` starts a service again with more variables."""
        self._stack = stack
        self._restart = restart

    async def split(self, lasts: float) -> None:
        """Split for `lasts` seconds. Then the old primary copies the data of the new one."""
        first = self._stack.valkey
        second = ValkeyServer(first.folder.with_name("valkey-second"))
        second.password = first.password
        dispatcher = [one for one in self._stack.system.services if one.name == "dispatcher"][-1]
        try:
            await second.start()
            await become_copy(second, first)
            await self._restart(
                dispatcher, {"OUTBOX_REDIS_URL": second.url, "OUTBOX_REDIS_URL_FILE": ""}
            )
            await asyncio.sleep(lasts)
            await become_copy(first, second)
        finally:
            await self._restart(dispatcher, {})
            await second.stop()


async def become_copy(replica: ValkeyServer, primary: ValkeyServer) -> None:
    """Make a server a replica until it has the data of another one, then a primary again.

    Raises:
        TimeoutError: one of the two was away for too long.
    """

    async def copied() -> bool:
        async with Redis.from_url(replica.url, decode_responses=True) as client:
            try:
                replication = await client.info("replication")
                if replication.get("master_port") != primary.port:
                    await client.replicaof(LOOPBACK, str(primary.port))
                    return False
                if replication["master_link_status"] != "up":
                    return False
                await client.replicaof("NO", "ONE")
            except (RedisError, OSError):
                return False
        return True

    await until(copied, _PATIENCE_S)
