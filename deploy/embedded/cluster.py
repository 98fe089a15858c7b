"""A real cluster of Valkey nodes on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port

SLOTS: Final = 16_384
_LIMIT_S: Final = 60.0
_POLL_S: Final = 0.02


class ClusterNode(ValkeyServer):
    """One node. After a restart it is in the cluster again, with its slots and without data."""

    def __init__(self, folder: Path, *, binary: Path | None = None, timeout_ms: int) -> None:
        """Create a node that counts another as failed after `timeout_ms` without an answer."""
        super().__init__(folder, binary=binary)
        self.bus = free_port()
        self.arguments = (
            *("--cluster-enabled", "yes", "--cluster-port", str(self.bus)),
            *("--cluster-node-timeout", str(timeout_ms)),
            # A lost node stops its own slots only.
            *("--cluster-require-full-coverage", "no"),
            *("--repl-diskless-sync-delay", "0"),
        )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        """Open a client of this node alone."""
        async with Redis.from_url(self.url, decode_responses=True, socket_timeout=5) as client:
            yield client

    async def command(self, *words: str | int) -> Any:
        """Send a command and return the reply as it is."""
        async with self.client() as client:
            execute: Any = client.execute_command
            return await execute(*words)

    async def id(self) -> str:
        """Return its id in the cluster."""
        return str(await self.command("CLUSTER", "MYID"))


class ValkeyCluster:
    """Primaries that share all slots evenly, and replicas of some of them."""

    def __init__(
        self,
        folder: Path,
        *,
        replicas: Sequence[int] = (),
        primaries: int = 3,
        binary: Path | None = None,
        timeout_ms: int = 1500,
    ) -> None:
        """Create a cluster. `replicas` has the number of the primary of each replica."""
        folder.mkdir(parents=True, exist_ok=True)
        nodes = [
            ClusterNode(folder / str(number), binary=binary, timeout_ms=timeout_ms)
            for number in range(primaries + len(replicas))
        ]
        self.primaries, self.replicas = nodes[:primaries], nodes[primaries:]
        self._primary_of = tuple(replicas)
        for node in nodes:
            node.password = nodes[0].password

    @property
    def nodes(self) -> list[ClusterNode]:
        """All nodes."""
        return [*self.primaries, *self.replicas]

    @property
    def url(self) -> str:
        """The URL of the cluster, as OUTBOX_REDIS_URL takes it, with two of its nodes."""
        hosts = ",".join(f"{LOOPBACK}:{node.port}" for node in self.primaries[:2])
        return f"redis+cluster://:{self.primaries[0].password}@{hosts}"

    async def start(self) -> None:
        """Start all nodes, and return when every slot is served and every replica is in sync.

        Raises:
            LocalServerError: they do not find one another.
        """
        for node in self.nodes:
            await node.start()
        bounds = [SLOTS * n // len(self.primaries) for n in range(len(self.primaries) + 1)]
        for node, (first, end) in zip(self.primaries, pairwise(bounds), strict=True):
            await node.command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for epoch, node in enumerate(self.nodes, 1):
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            if node is not self.primaries[0]:
                await self.primaries[0].command("CLUSTER", "MEET", LOOPBACK, node.port, node.bus)
        for node in self.nodes:
            await _until(lambda node=node: self._knows_all(node))  # type: ignore[misc]
        for node, number in zip(self.replicas, self._primary_of, strict=True):
            await node.command("CLUSTER", "REPLICATE", await self.primaries[number].id())
        await _until(self.serves)

    async def stop(self) -> None:
        """End all nodes with kill -9: they keep no data."""
        await asyncio.gather(*(node.kill() for node in self.nodes if node.running))

    async def _knows_all(self, node: ClusterNode) -> bool:
        found = await node.command("CLUSTER", "NODES")
        lines = [line.split() for line in str(found).splitlines()]
        return len(lines) == len(self.nodes) and all("handshake" not in line[2] for line in lines)

    async def flush(self) -> None:
        """Delete all keys."""
        for node in self.nodes:
            if _fields(await node.command("INFO", "REPLICATION"))["role"] == "master":
                await node.command("FLUSHALL")

    async def serves(self) -> bool:
        """Return whether all nodes know an owner of every slot, and all replicas are in sync."""
        for node in self.nodes:
            info = _fields(await node.command("CLUSTER", "INFO"))
            if info["cluster_state"] != "ok" or info["cluster_slots_ok"] != str(SLOTS):
                return False
            replication = _fields(await node.command("INFO", "REPLICATION"))
            if replication["role"] == "slave" and replication["master_link_status"] != "up":
                return False
        return True

    async def owner_of(self, slot: int) -> ClusterNode:
        """Return the running node that owns a slot, as most of the running nodes say."""
        votes: dict[int, int] = {}
        for node in self.nodes:
            if node.running:
                for first, last, owner, *_ in await node.command("CLUSTER", "SLOTS"):
                    if int(first) <= slot <= int(last):
                        votes[int(owner[1])] = votes.get(int(owner[1]), 0) + 1
        port = max(votes, key=lambda each: votes[each])
        return next(node for node in self.nodes if node.port == port)

    async def owners(self) -> list[ClusterNode]:
        """Return the nodes that own slots now."""
        node = next(node for node in self.nodes if node.running)
        ports = {int(owner[1]) for _, _, owner, *_ in await node.command("CLUSTER", "SLOTS")}
        return [node for node in self.nodes if node.port in ports]

    async def begin_move(self, slot: int, target: ClusterNode) -> ClusterNode:
        """Begin to move a slot; return its owner. No key has been moved yet."""
        source = await self.owner_of(slot)
        await target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", await source.id())
        await source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", await target.id())
        return source

    async def finish_move(self, slot: int, source: ClusterNode, target: ClusterNode) -> int:
        """Move the keys of the slot, and then the slot itself. Return the number of keys.

        Raises:
            redis.exceptions.ResponseError: a key exists on the target already, for example.
        """
        moved = 0
        login = ("AUTH", source.password) if source.password else ()
        while keys := await source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            words = ("MIGRATE", LOOPBACK, target.port, "", 0, 5000, *login, "KEYS", *keys)
            await source.command(*words)
            moved += len(keys)
        owner = await target.id()
        others = [node for node in await self.owners() if node not in (source, target)]
        for node in (target, source, *others):
            if node.running:
                await node.command("CLUSTER", "SETSLOT", slot, "NODE", owner)
        return moved


def _fields(text: object) -> dict[str, str]:
    """Return the fields of a reply of INFO, whether redis-py has parsed it or not."""
    if isinstance(text, dict):
        return {str(name): str(value) for name, value in text.items()}
    lines = (line.partition(":") for line in str(text).splitlines())
    return {name: value.strip() for name, _, value in lines}


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + _LIMIT_S
    while True:
        try:
            if await condition():
                return
        except (RedisError, OSError) as error:
            if time.monotonic() > end:
                raise LocalServerError(f"the cluster does not start: {error}") from error
        if time.monotonic() > end:
            raise LocalServerError(f"the cluster does not start within {_LIMIT_S:g} s")
        await asyncio.sleep(_POLL_S)
