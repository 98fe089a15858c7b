"""begin_load.lua: the epoch that a load must still find."""

from __future__ import annotations

from dataclasses import replace

from outbox_server.shared.queue.queue import brings_history
from tests.integration.queue.shard import SENDER, START_MS, Shard

FIRST_EPOCH = str(START_MS * 1000)


async def test_a_sender_that_redis_does_not_know_gets_an_epoch_that_goes_by_itself(
    shard: Shard,
) -> None:
    epochs = await shard.queue.begin_load([7], committed=True)

    assert epochs == {7: f"new:{FIRST_EPOCH}"}
    assert brings_history(epochs[7])
    assert (await shard.sender()).settings_expire
    assert await shard.claimed() == [], "it is still not known"
    await shard.load(SENDER)
    assert not brings_history((await shard.queue.begin_load([7], committed=True))[7])


async def test_the_epoch_is_raised_by_a_commit_and_by_nothing_else(shard: Shard) -> None:
    await shard.load(SENDER)

    assert await shard.queue.begin_load([7], committed=False) == {7: FIRST_EPOCH}
    raised = await shard.queue.begin_load([7], committed=True)
    assert raised == {7: str(int(FIRST_EPOCH) + 1)}
    assert await shard.queue.begin_load([7], committed=False) == raised


async def test_epochs_of_many_senders_come_in_their_order(shard: Shard) -> None:
    await shard.load(replace(SENDER, sender_id=9))
    await shard.at(5)
    await shard.load(replace(SENDER, sender_id=8))

    assert await shard.queue.begin_load([8, 7, 9], committed=False) == {
        8: str(START_MS * 1000 + 5000),
        7: f"new:{START_MS * 1000 + 5000}",
        9: FIRST_EPOCH,
    }


async def test_no_life_of_a_sender_repeats_an_epoch(shard: Shard) -> None:
    await shard.load(SENDER)
    old = await shard.queue.begin_load([7], committed=True)
    await shard.redis.flushall()
    await shard.at(1)
    await shard.load(SENDER)

    assert await shard.queue.load_heads([SENDER], old) == [7]


async def test_no_load_of_an_earlier_life_brings_its_history_into_a_later_one(
    shard: Shard,
) -> None:
    # It read PostgreSQL when nobody had a lease, and was stopped.
    old = await shard.queue.begin_load([7], committed=False)
    await shard.load(SENDER)
    await shard.redis.flushall()
    await shard.at(1)

    assert await shard.queue.load_heads([SENDER], old) == [7]
    await shard.queue.begin_load([7], committed=False)
    assert await shard.queue.load_heads([SENDER], old) == [7]
