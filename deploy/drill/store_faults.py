"""The faults of the stores of a production system: a cluster, a replica, and PgBouncer."""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable, Callable
from typing import Final

from redis.crc import key_slot
from redis.exceptions import RedisError

from outbox_server.deploy.drill.plan import Fault
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.cluster import SLOTS, ClusterNode, ValkeyCluster
from outbox_server.deploy.embedded.pgbouncer import PgBouncer
from outbox_server.deploy.embedded.replication import Replication
from outbox_server.shared.queue.keys import ShardKeys

# The limit of a failover, and of a node that comes back and copies its new primary's data.
_PATIENCE_S: Final = 60.0


class StoreFaults:
    """Injects faults into a cluster that has the slots of `shards`, PostgreSQL, and a pooler."""

    def __init__(
        self,
        cluster: ValkeyCluster,
        pooler: PgBouncer,
        shards: int,
        replication: Replication | None = None,
    ) -> None:
        """Without `replication`, PostgreSQL has no replica that could take over."""
        self._cluster = cluster
        self._pooler = pooler
        self._shards = shards
        self.ways: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "cluster_takeover": self.take_over,
            "cluster_move": self.move,
            "pooler_kill": self._kill_pooler,
        }
        if replication is not None:
            self.ways["postgres_takeover"] = lambda _: replication.take_over()

    async def take_over(self, fault: Fault) -> None:
        """Kill the owner of a shard's slot. It comes back as a replica of its replica."""
        slot = self.slot_of(fault)
        primary = await self._cluster.owner_of(slot)
        await primary.kill()
        try:
            await until(lambda: self._is_owned_by_another(slot, primary), _PATIENCE_S)
        finally:
            await primary.start()
        await until(self._serves, _PATIENCE_S)

    async def move(self, fault: Fault) -> None:
        """Move the slot of a shard to another primary."""
        slot = self.slot_of(fault)
        owners = await self._cluster.owners()
        source = await self._cluster.owner_of(slot)
        chance = random.Random(fault.at)
        target = chance.choice([node for node in owners if node is not source])
        await self._cluster.begin_move(slot, target)
        await self._cluster.finish_move(slot, source, target)
        await until(self._serves, _PATIENCE_S)

    async def _kill_pooler(self, _: Fault) -> None:
        # It is started again, as if it had ended by itself.
        before = self._pooler.child.pid
        self._pooler.child.signal(signal.SIGKILL)

        async def again() -> bool:
            return self._pooler.child.pid != before

        await until(again, _PATIENCE_S)

    def slot_of(self, fault: Fault) -> int:
        """Return the slot of the shard that a fault is aimed at."""
        shard = random.Random(fault.at).randrange(self._shards)
        return key_slot(ShardKeys(shard).ready.encode(), SLOTS)

    async def _is_owned_by_another(self, slot: int, primary: ClusterNode) -> bool:
        try:
            return await self._cluster.owner_of(slot) is not primary
        except (RedisError, OSError):
            return False

    async def _serves(self) -> bool:
        try:
            return await self._cluster.serves()
        except (RedisError, OSError):
            return False
