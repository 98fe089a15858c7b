"""life.lua: which events end a life of the shard, and what still works while Redis is full."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Head, LimitUse, PastEnd, brings_history
from tests.integration.queue.shard import SENDER, Shard, jobs, milliseconds

TWO = replace(SENDER, jobs=jobs((1, 0), (2, 0)))


async def knows(shard: Shard) -> bool:
    return not brings_history((await shard.queue.begin_load([7], committed=False))[7])


async def restarts(shard: Shard) -> None:
    await shard.redis.set(shard.prefix + "test:run", "second")


async def clock_steps_back(shard: Shard) -> None:
    await shard.at(shard.now - 1_000)


async def life_key_is_lost(shard: Shard) -> None:
    await shard.redis.delete(shard.prefix + "life")
    await shard.at(shard.now + 1)


ENDS = pytest.mark.parametrize("ends", [restarts, clock_steps_back, life_key_is_lost])
Ends = Callable[[Shard], Coroutine[Any, Any, None]]


@ENDS
async def test_data_loaded_before_a_restart_or_clock_step_back_is_not_used(
    shard: Shard, ends: Ends
) -> None:
    await shard.load(TWO)
    [claim] = (await shard.claim()).claims
    await ends(shard)
    await shard.redis.zadd(shard.prefix + "ready", {"7": 0})

    claimed = await shard.queue.claim(5)
    assert claimed.lost
    assert claimed.claims == ()
    assert claimed.loads == (7,), "of those that are in `ready`"
    assert await shard.queue.confirm([claim]) == [False]
    assert await shard.settle(claim) == [7]
    assert await shard.queue.find_lost([7]) == [7]
    assert not await knows(shard)


@ENDS
async def test_a_load_begun_before_a_restart_or_clock_step_back_is_refused(
    shard: Shard, ends: Ends
) -> None:
    first = await shard.queue.begin_load([7], committed=True)
    await ends(shard)
    assert await shard.queue.load_heads([TWO], first) == [7]

    await shard.load(TWO)
    later = await shard.queue.begin_load([7], committed=True)
    await shard.at(shard.now + 2_000)
    await shard.redis.set(shard.prefix + "test:run", "third")
    assert await shard.queue.load_heads([TWO], later) == [7]


@ENDS
async def test_a_rebuild_does_not_survive_a_restart_or_clock_step_back(
    shard: Shard, ends: Ends
) -> None:
    token = await shard.queue.begin_rebuild()
    assert token is not None
    await ends(shard)

    assert not await shard.queue.keep_rebuild(token)
    assert not await shard.queue.finish_rebuild(token)
    other = await shard.queue.begin_rebuild()
    assert other is not None, "its lock keeps nobody"
    assert await shard.queue.finish_rebuild(other)
    assert not (await shard.claim()).lost


async def test_a_sender_loaded_after_a_restart_or_clock_step_back_is_used(shard: Shard) -> None:
    await shard.load(TWO)
    await restarts(shard)
    await shard.load(TWO)

    claimed = await shard.queue.claim(5)
    assert claimed.lost, "others may still be missing"
    assert [claim.job.job_id for claim in claimed.claims] == [1]


async def test_a_small_step_back_of_the_clock_stops_time_and_shortens_no_gap(shard: Shard) -> None:
    await shard.at(10_000)
    await shard.load(TWO)
    [claim] = (await shard.claim()).claims
    await shard.at(9_001)
    await shard.settle(claim)

    # The send ended at 10,000 by the clock of this life.
    assert (await shard.sender()).window == {"000000000001:1": 10_000}
    assert await shard.ready() == {7: 12_000}
    await shard.at(11_999)
    assert await shard.claimed() == []
    await shard.at(12_000)
    assert await shard.claimed() == [2]


async def test_after_a_long_step_back_of_the_clock_history_counts_by_its_age(shard: Shard) -> None:
    await shard.at(7_200_000)
    await shard.load(TWO)
    [claim] = (await shard.claim()).claims
    await shard.settle(claim)
    await shard.at(1_000)
    assert (await shard.queue.claim(5)).lost

    # PostgreSQL reports that it ended half a second ago.
    ended = PastEnd(JobRef(1, 1), milliseconds(500), counted=True)
    await shard.load(replace(SENDER, jobs=jobs((2, 0)), ends=(ended,)))
    assert await shard.ready() == {7: 2_500}
    assert (await shard.queue.claim(5)).claims == ()
    await shard.at(2_500)
    assert [each.job.job_id for each in (await shard.queue.claim(5)).claims] == [2]


# Redis out of memory -------------------------------------------------------------------------


@pytest.fixture
async def full(shard: Shard) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Return a function that makes Redis refuse to use more memory."""

    async def fill() -> None:
        await shard.redis.config_set("maxmemory", "1")

    yield fill
    await shard.redis.config_set("maxmemory", "0")


Fill = Callable[[], Coroutine[Any, Any, None]]


async def test_loaded_senders_continue_while_redis_is_full(shard: Shard, full: Fill) -> None:
    head: Head = replace(TWO, gap=timedelta(0), more=True)
    await shard.load(head)
    await full()

    assert (await shard.claim(1)).claims != ()
    [second] = (await shard.claim(1)).claims
    assert await shard.queue.confirm([second]) == [True]
    assert await shard.settle(second, LimitUse.COUNTED, retry_at=0) == []
    epochs = await shard.queue.begin_load([7], committed=True)
    assert await shard.queue.load_heads([replace(head, jobs=jobs((3, 0)))], epochs) == []
    assert await shard.claimed(1) == [3]
    assert await shard.claimed(1) == [], "and a look that finds nothing is no error"
    assert await shard.queue.find_lost([7]) == []
    token = await shard.queue.begin_rebuild()
    assert token is not None
    assert await shard.queue.finish_rebuild(token)


async def test_a_sender_that_is_not_loaded_waits_until_redis_has_memory(
    shard: Shard, full: Fill
) -> None:
    await shard.load(SENDER)
    begun = await shard.queue.begin_load([8], committed=True)
    assert [*begun] == [8]
    await full()

    assert [*await shard.queue.begin_load([7, 8, 9], committed=True)] == [7]
    assert not await shard.redis.exists(shard.prefix + "sender:9")
    await shard.redis.config_set("maxmemory", "0")
    assert [*await shard.queue.begin_load([7, 8, 9], committed=True)] == [7, 8, 9]
