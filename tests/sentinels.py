"""A primary and its replica, both watched by a real Sentinel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from outbox_server.deploy.child import Child
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from tests.eventually import eventually


@dataclass(frozen=True)
class WatchedPair:
    """A primary, its replica and the client of their Sentinel."""

    primary: ValkeyServer
    replica: ValkeyServer
    sentinel: Redis
    # The first host does not answer, and the second one names a server that is gone, as a Sentinel
    # does that is cut off from the others. So a client asks the next one.
    url: str

    async def fail_over(self) -> None:
        """Let Sentinel promote the replica."""
        command: Any = self.sentinel.execute_command
        await command("SENTINEL", "FAILOVER", "main")

    async def primary_port(self) -> int:
        """Return the port of the primary that Sentinel names."""
        command: Any = self.sentinel.execute_command
        found = await command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
        return int(found[1])


@asynccontextmanager
async def watched_pair(binary: Path, folder: Path) -> AsyncIterator[WatchedPair]:
    """Run them in `folder`, and return when Sentinel knows the replica."""
    primary, replica = (ValkeyServer(folder / str(number), binary=binary) for number in (1, 2))
    for server in (primary, replica):
        server.password = ""
    place, port = folder / "sentinel", free_port()
    sentinel = _sentinel(binary, place, port)
    other_port = free_port()
    other = _sentinel(binary, folder / "outdated", other_port)
    try:
        await primary.start()
        await replica.start()
        _watch(place, primary.port, 1_000)
        _watch(folder / "outdated", free_port(), 3_600_000)
        async with Redis.from_url(replica.url) as client:
            follow: Any = client.replicaof
            await follow(LOOPBACK, primary.port)
        sentinel.start()
        other.start()
        async with Redis(port=port, decode_responses=True) as client:
            command: Any = client.execute_command

            async def knows_the_replica() -> bool:
                try:
                    found = await command("SENTINEL", "REPLICAS", "main")
                except QUEUE_ERRORS:
                    return False
                return bool(found) and found[0]["master-link-status"] == "ok"

            await eventually(knows_the_replica)
            async with Redis(port=other_port) as outdated:
                await eventually(partial(answers, outdated))
            hosts = ",".join(f"{LOOPBACK}:{each}" for each in (free_port(), other_port, port))
            url = f"redis+sentinel://{hosts}/main/0"
            yield WatchedPair(primary, replica, client, url)
    finally:
        await other.stop()
        await sentinel.stop()
        await replica.kill()
        await primary.kill()


def _sentinel(binary: Path, folder: Path, port: int) -> Child:
    folder.mkdir()
    words: list[str | Path] = [binary, folder / "sentinel.conf", "--sentinel"]
    words += ["--port", str(port), "--bind", LOOPBACK]
    return Child("Sentinel", words, log=folder / "log", cwd=folder)


def _watch(folder: Path, port: int, down_after_ms: int) -> None:
    (folder / "sentinel.conf").write_text(
        f"sentinel monitor main {LOOPBACK} {port} 1\n"
        f"sentinel down-after-milliseconds main {down_after_ms}\n"
    )


async def answers(client: Redis) -> bool:
    """Return whether the server of a client can be reached."""
    try:
        return bool(await client.ping())
    except QUEUE_ERRORS:
        return False
