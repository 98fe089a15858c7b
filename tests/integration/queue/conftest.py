from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.queue.shard import Shard, connect_to


@pytest.fixture
async def bare_shard(redis_url: str) -> AsyncIterator[Shard]:
    """A shard after a loss of Redis: it holds only the test's clock."""
    async with connect_to(redis_url) as client:
        shard = Shard(client)
        await shard.at(0)
        yield shard


@pytest.fixture
async def shard(bare_shard: Shard) -> Shard:
    """A complete shard without senders."""
    await bare_shard.whole()
    return bare_shard
