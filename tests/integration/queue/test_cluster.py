"""Every script uses only the keys of its shard: a cluster runs it and checks each access.

A script that begins with `#!lua` may not touch keys of another slot. Without this line, a node
permits access to every key that it holds. One server with all slots is a cluster that can test
this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.exceptions import ResponseError

from outbox_server.deploy.child import Child
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.shared.queue.following import FollowingClient
from outbox_server.shared.queue.records import LimitUse, Settlement
from tests.conftest import Stores
from tests.eventually import eventually
from tests.integration.queue.shard import LEASE_MS, SENDER, Shard, connect_to, jobs


class ClusterServer(ValkeyServer):
    """A cluster of one node, with all slots."""

    def _child_on(self, port: int, binary: Path) -> Child:
        argv: list[str | Path] = [binary, "--port", str(port), "--bind", LOOPBACK]
        argv += ["--dir", self.folder, "--save", "", "--appendonly", "no"]
        argv += ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
        return Child(self.NAME, argv, log=self._log, cwd=self.folder)


@pytest_asyncio.fixture
async def cluster(stores: Stores, tmp_path: Path) -> AsyncIterator[FollowingClient]:
    server = ClusterServer(tmp_path / "cluster", binary=stores.redis.binary)
    server.password = ""
    await server.start()
    try:
        async with connect_to(server.url) as redis:
            command: Any = redis.execute_command
            await command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

            async def whole() -> bool:
                return "cluster_state:ok" in str(await command("CLUSTER", "INFO"))

            await eventually(whole)
            yield redis
    finally:
        await server.kill()


def strict(shard: Shard) -> Shard:
    """Put `#!lua` before every script."""
    scripts = shard.queue._scripts
    for name, script in scripts.items():
        source = script.script
        assert isinstance(source, str)
        scripts[name] = shard.redis.register_script("#!lua\n" + source)
    return shard


async def test_no_script_touches_a_key_outside_of_its_shard(cluster: FollowingClient) -> None:
    stray = "return redis.call('SET', 'outbox:{1}:x', '1')"
    with pytest.raises(ResponseError, match="slot"):
        await cluster.eval("#!lua\n" + stray, 1, "outbox:{0}:ready")
    shards = [strict(Shard(cluster, number)) for number in (0, 1)]
    command: Any = cluster.execute_command
    assert len({await command("CLUSTER", "KEYSLOT", shard.prefix) for shard in shards}) == 2
    for number, shard in enumerate(shards):
        await shard.at(0)
        assert (await shard.queue.claim(1)).lost
        await shard.whole()
        senders = [10 + number, 20 + number]
        head = replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0), (2, 0), (3, 0)))
        await shard.load(*(replace(head, sender_id=n) for n in senders), committed=True)
        claims = (await shard.claim(4)).claims
        assert await shard.queue.confirm(claims) == [True] * 4
        assert None not in await shard.renew(*claims)
        await shard.settle(claims[0])
        await shard.settle(claims[1], retry_at=5)
        await shard.queue.settle([Settlement(99, claims[0].job, LimitUse.UNUSED)])
        await shard.at(LEASE_MS)
        assert len((await shard.claim()).loads) == 2

    found: Any = await cluster.keys()
    assert {key.partition("}")[0] for key in found} == {"outbox:{0", "outbox:{1"}
