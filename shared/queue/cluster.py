"""The URL of a Redis Cluster: `redis+cluster://host:6379,host2:6379`.

All keys of a shard are in one slot, so each shard has a client of its own, whose connections lead
to the node that owns the slot. A node that cannot be reached delays its own shards only.

redis-py's RedisCluster is not used. After some errors of one node it closes the connections to all
nodes, even those with a call in progress; and it follows an ASK redirection on another connection
than the one that announced it. Here ASK is an error. While a slot is being moved, its shard waits,
because scripts cannot run on keys that are on two nodes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ClusterDownError

from outbox_server.shared.queue.following import FollowingClient, FollowingPool
from outbox_server.shared.queue.host_urls import HostsUrl, malformed, parse_hosts_url
from outbox_server.shared.queue.keys import ShardKeys
from outbox_server.shared.queue.places import ASK_ERRORS, Address

SCHEMES: Final = ("redis+cluster://", "rediss+cluster://")
_FORM: Final = "redis+cluster://[user:password@]host:6379[,host:6379...]"
_PORT: Final = 6379
_SLOTS: Final = 16_384
# The longest time that the search for a new map of the slots takes, over all nodes.
_SEARCH_LIMIT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Range:
    """The slots from `first` to `last`, their owner, and all nodes that have their keys."""

    first: int
    last: int
    nodes: tuple[Address, ...]


class ClusterMap:
    """Knows which node owns which slot. It asks again after it was doubted."""

    def __init__(self, hosts: tuple[Address, ...], options: Mapping[str, Any]) -> None:
        """`hosts` are those of the URL, `options` the arguments of connections that ask."""
        self._hosts = hosts
        self._options = options
        self._ranges: tuple[_Range, ...] = ()
        # Owners that a node has named since the last map.
        self._moved: dict[int, Address] = {}
        self._doubted: set[Address] = set()
        self._stale = True
        self._version = 0
        self._lock = asyncio.Lock()

    async def owner(self, slot: int) -> Address:
        """Return the node that owns a slot.

        Raises:
            redis.exceptions.RedisError: no node can be reached, or none knows an owner.
        """
        if self._stale or self._owner(slot) is None:
            version = self._version
            async with asyncio.timeout(_SEARCH_LIMIT_S), self._lock:
                if version == self._version:
                    await self._renew(slot)
        owner = self._owner(slot)
        if owner is None:
            raise ClusterDownError(f"CLUSTERDOWN no node owns slot {slot}")
        return owner

    async def slots_of_nodes(self, slot: int) -> list[int]:
        """Ask for a new map, and return one slot of each node that owns some.

        Raises:
            redis.exceptions.RedisError: no node can be reached, or none knows an owner of `slot`.
        """
        self._stale = True
        await self.owner(slot)
        return list({each.nodes[0]: each.first for each in self._ranges}.values())

    def doubt(self, address: Address) -> None:
        """Ask for a new map before the next connection, and ask this node last."""
        self._doubted.add(address)
        self._stale = True

    def moved(self, slot: int, address: Address) -> None:
        """Note the owner of a slot, as the former owner named it."""
        self._moved[slot] = address

    def _owner(self, slot: int) -> Address | None:
        if slot in self._moved:
            return self._moved[slot]
        return next((r.nodes[0] for r in self._ranges if r.first <= slot <= r.last), None)

    async def _renew(self, slot: int) -> None:
        known = dict.fromkeys(chain.from_iterable(each.nodes for each in self._ranges))
        asked = [*known, *(host for host in self._hosts if host not in known)]
        # The order differs each time, because a node that is cut off has an old map.
        random.shuffle(asked)
        asked.sort(key=lambda address: address in self._doubted)
        failure: BaseException = ClusterDownError(f"CLUSTERDOWN no node owns slot {slot}")
        for address in asked:
            try:
                found = await self._ask(address)
            except ASK_ERRORS as error:
                failure = error
                continue
            if any(each.first <= slot <= each.last for each in found):
                self._ranges = found
                self._moved.clear()
                self._doubted.clear()
                self._stale = False
                self._version += 1
                return
        raise failure

    async def _ask(self, address: Address) -> tuple[_Range, ...]:
        host, port = address
        async with Redis(host=host, port=port, **self._options) as client:
            command: Any = client.execute_command
            # As two words: redis-py then returns the reply as it is.
            reply = await command("CLUSTER", "SLOTS")
        ranges = []
        for first, last, *nodes in reply:
            # A node that does not know its own address sends an empty one.
            found = tuple((str(node[0] or host), int(node[1])) for node in nodes)
            if found:
                ranges.append(_Range(int(first), int(last), found))
        return tuple(ranges)


class SlotPlace:
    """The node that owns one slot."""

    def __init__(self, cluster: ClusterMap, slot: int) -> None:
        self._cluster = cluster
        self._slot = slot

    async def find(self) -> Address:
        """Return the address of the node."""
        return await self._cluster.owner(self._slot)

    def doubt(self, address: Address) -> None:
        """Let the map be renewed."""
        self._cluster.doubt(address)

    def moved(self, address: Address) -> None:
        """Note the new owner."""
        self._cluster.moved(self._slot, address)

    async def aclose(self) -> None:
        """Do nothing: the map keeps no connection."""


class ClusterClient(FollowingClient):
    """The clients of all slots in use. It is itself the client of the first shard's slot."""

    def __init__(self, cluster: ClusterMap, make_pool: Callable[[int], FollowingPool]) -> None:
        self._cluster = cluster
        self._own_slot = _slot_of(ShardKeys(0).ready)
        super().__init__(make_pool(self._own_slot))
        self._make_pool = make_pool
        self._others: dict[int, FollowingClient] = {}

    def of_key(self, key: str) -> FollowingClient:
        """Return the client of the slot of a key."""
        return self._of_slot(_slot_of(key))

    async def nodes(self) -> list[FollowingClient]:
        """Return a client of each node that owns slots.

        Raises:
            redis.exceptions.RedisError: they cannot be found.
        """
        return [self._of_slot(each) for each in await self._cluster.slots_of_nodes(self._own_slot)]

    def _of_slot(self, slot: int) -> FollowingClient:
        if slot == self._own_slot:
            return self
        if slot not in self._others:
            self._others[slot] = FollowingClient(self._make_pool(slot))
        return self._others[slot]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections."""
        for client in self._others.values():
            await client.aclose(close_connection_pool)
        await super().aclose(close_connection_pool)


def connect_to_cluster(url: str, options: Mapping[str, Any]) -> ClusterClient:
    """Return the clients of a cluster; `options` are the arguments of each of their connections.

    Raises:
        ConfigurationError: the URL is malformed.
    """
    found = parse_cluster_url(url)
    limits = {name: value for name, value in options.items() if name != "max_connections"}
    # A node replies at once, even to a client that waits for messages.
    limits["socket_timeout"] = options["socket_connect_timeout"]
    cluster = ClusterMap(found.hosts, {**limits, **found.login, **found.tls})

    def make_pool(slot: int) -> FollowingPool:
        return FollowingPool(
            place=SlotPlace(cluster, slot), **{**options, **found.login, **found.tls}
        )

    return ClusterClient(cluster, make_pool)


def parse_cluster_url(url: str) -> HostsUrl:
    """Return the parts of the URL.

    Raises:
        ConfigurationError: it is malformed; the text does not contain it, as it has a password.
    """
    found = parse_hosts_url(url, _FORM, _PORT, frozenset())
    if found.path.strip("/") not in ("", "0"):
        raise malformed("a cluster has database 0 only", _FORM)
    return found


def _slot_of(key: str) -> int:
    return key_slot(key.encode(), _SLOTS)
