"""begin_load.lua: the epoch that a load must still find."""

from __future__ import annotations

from dataclasses import replace

from outbox_server.shared.queue.records import brings_history
from tests.integration.queue.shard import SENDER, START_MS, Shard

FIRST_EPOCH = str(START_MS * 1000)


async def test_an_epoch_of_a_sender_unknown_to_redis_expires_by_itself(
    shard: Shard,
) -> None:
    epochs = await shard.queue.begin_load([7], committed=True)

    assert epochs == {7: f"new:{FIRST_EPOCH}"}
    assert brings_history(epochs[7])
    assert (await shard.sender()).settings_expire
    assert await shard.claimed() == [], "it is still not known"
    await shard.load(SENDER)
    assert not brings_history((await shard.queue.begin_load([7], committed=True))[7])


async def test_only_a_commit_raises_the_epoch(shard: Shard) -> None:
    await shard.load(SENDER)

    assert await shard.queue.begin_load([7], committed=False) == {7: FIRST_EPOCH}
    raised = await shard.queue.begin_load([7], committed=True)
    assert raised == {7: str(int(FIRST_EPOCH) + 1)}
    assert await shard.queue.begin_load([7], committed=False) == raised


async def test_epochs_of_many_senders_are_returned_in_the_order_of_the_senders(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, sender_id=9))
    await shard.at(5)
    await shard.load(replace(SENDER, sender_id=8))

    assert await shard.queue.begin_load([8, 7, 9], committed=False) == {
        8: str(START_MS * 1000 + 5000),
        7: f"new:{START_MS * 1000 + 5000}",
        9: FIRST_EPOCH,
    }


async def test_an_epoch_is_not_used_again_after_redis_lost_its_data(shard: Shard) -> None:
    await shard.load(SENDER)
    old = await shard.queue.begin_load([7], committed=True)
    await shard.redis.flushall()
    await shard.at(1)
    await shard.load(SENDER)

    assert await shard.queue.load_heads([SENDER], old) == [7]


async def test_a_load_begun_before_a_loss_does_not_restore_its_history_after_it(
    shard: Shard,
) -> None:
    # It read PostgreSQL when no job was leased, and was paused.
    old = await shard.queue.begin_load([7], committed=False)
    await shard.load(SENDER)
    await shard.redis.flushall()
    await shard.at(1)

    assert await shard.queue.load_heads([SENDER], old) == [7]
    await shard.queue.begin_load([7], committed=False)
    assert await shard.queue.load_heads([SENDER], old) == [7]
