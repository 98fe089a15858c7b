"""Wake-ups: a sleeping dispatcher is woken only for jobs due before its next look."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest
import pytest_asyncio
from redis.asyncio.client import PubSub

from outbox_server.shared.queue.records import LimitUse
from tests.eventually import PATIENCE
from tests.integration.queue.shard import SENDER, Shard, jobs

NO_GAP = replace(SENDER, gap=timedelta(0))


class ShardListener:
    """Listens on the shard's channel."""

    def __init__(self, pubsub: PubSub, shard: Shard) -> None:
        self._pubsub = pubsub
        self._shard = shard

    async def heard(self) -> int:
        """Return how many messages have arrived since the last call."""
        await self._shard.redis.publish(self._shard.queue.keys.wake, "end")
        messages = 0
        async with asyncio.timeout(PATIENCE):
            async for message in self._pubsub.listen():
                if message["data"] == "end":
                    return messages
                messages += 1
        raise AssertionError


@pytest_asyncio.fixture
async def ear(shard: Shard) -> AsyncIterator[ShardListener]:
    async with shard.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(shard.queue.keys.wake)
        yield ShardListener(pubsub, shard)


async def test_no_wake_is_sent_when_no_dispatcher_sleeps(shard: Shard, ear: ShardListener) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    assert await ear.heard() == 0


async def test_a_dispatcher_that_sleeps_indefinitely_is_woken_for_any_job(
    shard: Shard, ear: ShardListener
) -> None:
    await shard.claim()
    await shard.load(replace(SENDER, jobs=jobs((1, 999_999))))
    assert await ear.heard() == 1


@pytest.mark.parametrize(("due", "reported"), [(99, 1), (100, 0), (101, 0)])
async def test_a_dispatcher_that_sleeps_until_its_next_look_is_woken_only_for_earlier_jobs(
    shard: Shard, ear: ShardListener, due: int, reported: int
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 100))))
    await shard.claim()

    await shard.load(replace(SENDER, sender_id=8, jobs=jobs((2, due))))

    assert await ear.heard() == reported


async def test_one_message_wakes_all_dispatchers_and_no_other_follows_until_one_sleeps_again(
    shard: Shard, ear: ShardListener
) -> None:
    await shard.claim()
    await shard.load(replace(SENDER, jobs=jobs((1, 100))))
    await shard.load(replace(SENDER, sender_id=8, jobs=jobs((2, 50))))
    assert await ear.heard() == 1
    await shard.claim()
    await shard.load(replace(SENDER, sender_id=9, jobs=jobs((3, 10))))
    assert await ear.heard() == 1


async def test_a_settle_that_frees_an_entry_wakes_a_dispatcher(
    shard: Shard, ear: ShardListener
) -> None:
    await shard.load(replace(NO_GAP, max_in_flight=1, jobs=jobs((1, 0), (2, 0))))
    (claim,) = (await shard.claim()).claims
    assert await ear.heard() == 0

    await shard.settle(claim)

    assert await ear.heard() == 1
    assert await shard.claimed() == [2]


async def test_a_settle_after_which_no_job_waits_wakes_no_dispatcher(
    shard: Shard, ear: ShardListener
) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))))
    (claim,) = (await shard.claim()).claims
    await shard.settle(claim)
    assert await ear.heard() == 0


async def test_a_retry_wakes_a_dispatcher_for_its_time(shard: Shard, ear: ShardListener) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))))
    (claim,) = (await shard.claim()).claims
    await shard.settle(claim, LimitUse.BEGUN, retry_at=5000)
    assert await ear.heard() == 1


async def test_a_resume_wakes_a_dispatcher_and_a_pause_does_not(
    shard: Shard, ear: ShardListener
) -> None:
    head = replace(SENDER, jobs=jobs((1, 100)))
    await shard.load(head)
    await shard.claim()
    await shard.load(replace(head, active=False), committed=True)
    assert await ear.heard() == 0
    await shard.claim()
    await shard.load(head, committed=True)
    assert await ear.heard() == 1


async def test_a_full_dispatcher_wakes_the_sleepers_for_the_jobs_it_leaves(
    shard: Shard, ear: ShardListener
) -> None:
    await shard.claim()
    for sender_id in (1, 2):
        await shard.load(replace(SENDER, sender_id=sender_id, jobs=jobs((sender_id, 0))))
    assert await ear.heard() == 1
    # Both wake. The first one has room for only one job, and by then the other sleeps again.
    await shard.redis.set("outbox:{0}:asleep", "inf")

    assert await shard.claimed(1) == [1]

    assert await ear.heard() == 1


async def test_a_dispatcher_that_sleeps_indefinitely_is_woken_after_another_slept_briefly(
    shard: Shard, ear: ShardListener
) -> None:
    # One dispatcher sleeps without an end.
    await shard.claim()
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 100), (3, 100))))
    assert await ear.heard() == 1
    await shard.redis.set("outbox:{0}:asleep", "inf")
    # Another one claims the job that is due now and learns when the next ones are due.
    assert await shard.claimed(2) == [1]
    assert await ear.heard() == 0
    # At that time it has room for half of them.
    await shard.at(100)
    assert await shard.claimed(1) == [2]

    assert await ear.heard() == 1, "the first has room, and would sleep on"


async def test_the_end_of_a_rebuild_wakes_a_dispatcher(bare_shard: Shard) -> None:
    async with bare_shard.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(bare_shard.queue.keys.wake)
        ear = ShardListener(pubsub, bare_shard)
        await bare_shard.whole()
        assert await ear.heard() == 1
