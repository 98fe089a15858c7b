"""settle.lua: a lease becomes an entry of the window, or is given back."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim, LimitUse, Settlement
from tests.integration.queue.shard import (
    LEASE_MS,
    SENDER,
    START_MS,
    WINDOW_MS,
    Shard,
    jobs,
    members,
)

NO_GAP = replace(SENDER, gap=timedelta(0))


async def claim_one(shard: Shard) -> Claim:
    (claim,) = (await shard.claim(1)).claims
    return claim


async def test_a_counted_send_takes_an_entry_at_its_true_end_rounded_up(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    await shard.at(1000.2)

    assert await shard.settle(claim, age=300) == []

    state = await shard.sender()
    assert state.leases == {}
    assert state.window == dict.fromkeys(members(1), 701)
    assert int(state.settings["end"]) == START_MS + 701
    assert await shard.ready() == {7: 2701}


async def test_a_begun_send_takes_no_entry_and_starts_the_gap(shard: Shard) -> None:
    await shard.load(replace(SENDER, hourly_limit=1, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    await shard.at(1000)

    await shard.settle(claim, LimitUse.BEGUN, age=300)

    state = await shard.sender()
    assert (state.leases, state.window) == ({}, {})
    assert await shard.ready() == {7: 2700}


async def test_an_unused_claim_leaves_no_trace(shard: Shard) -> None:
    await shard.load(replace(SENDER, hourly_limit=1, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    await shard.at(1000)

    await shard.settle(claim, LimitUse.UNUSED)

    state = await shard.sender()
    assert (state.leases, state.window, state.settings["end"]) == ({}, {}, "0")
    assert await shard.claimed() == [2]


async def test_an_earlier_end_that_is_settled_later_does_not_shorten_the_gap(
    shard: Shard,
) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0), (3, 0))))
    claims = (await shard.claim(2)).claims
    await shard.at(1000)
    await shard.settle(claims[0], age=100)
    await shard.settle(claims[1], age=400)

    await shard.load(replace(SENDER, jobs=jobs((3, 0))))
    assert await shard.ready() == {7: 2900}


async def test_many_claims_of_many_senders_are_settled_at_once(shard: Shard) -> None:
    for sender_id in (1, 2, 3):
        head = jobs((sender_id * 10, 0), (sender_id * 10 + 1, 0))
        await shard.load(replace(NO_GAP, sender_id=sender_id, jobs=head))
    claims = (await shard.claim()).claims
    await shard.redis.delete("outbox:{0}:sender:3")

    unknown = await shard.queue.settle(
        [Settlement(claim.sender_id, claim.job, LimitUse.COUNTED) for claim in claims]
    )

    assert unknown == [3], "each sender that is to be loaded comes once"
    for sender in await shard.senders([1, 2]):
        assert sender.leases == {}
        assert len(sender.window) == 2


async def test_settling_no_claims_is_not_an_error(shard: Shard) -> None:
    assert await shard.queue.settle([]) == []


async def test_a_retry_waits_with_the_next_attempt_number_and_raises_the_epoch(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    claim = await claim_one(shard)
    stale = await shard.queue.begin_load([7], committed=False)

    await shard.settle(claim, LimitUse.BEGUN, retry_at=5000)

    assert (await shard.sender()).due == dict.fromkeys(members(1, attempt=2), 5000)
    assert await shard.queue.load_heads([SENDER], stale) == [7], "it read before the retry"
    await shard.at(5000)
    assert (await shard.claim()).claims[0].job == JobRef(1, 2)


async def test_a_retry_is_written_only_up_to_the_horizon(
    shard: Shard,
) -> None:
    head = jobs(*((n, 0) for n in range(1, 40)), (40, 5000))
    await shard.load(replace(NO_GAP, jobs=head, more=True))
    claims = (await shard.claim(2)).claims

    await shard.settle(claims[0], retry_at=5000)
    await shard.settle(claims[1], retry_at=5001)

    waiting = (await shard.sender()).due
    assert members(1, attempt=2)[0] in waiting
    assert members(2, attempt=2)[0] not in waiting, "it comes with a later load, in its order"


async def test_a_job_given_back_waits_with_the_same_attempt_number(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)

    await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)

    assert await claim_one(shard) == claim


@pytest.mark.parametrize("use", list(LimitUse))
async def test_a_claim_settled_twice_is_as_if_settled_once(shard: Shard, use: LimitUse) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    await shard.settle(claim, use)
    once = (await shard.sender(), await shard.ready())

    await shard.settle(claim, use)

    assert (await shard.sender(), await shard.ready()) == once


# Settlements after the lease expired ---------------------------------------------------------


async def late_claim(shard: Shard, *, limit: int = 1) -> Claim:
    """A claim whose lease expired; the load requested then found its job waiting again."""
    head = replace(NO_GAP, hourly_limit=limit, jobs=jobs((1, 0)))
    await shard.load(head)
    claim = await claim_one(shard)
    await shard.at(LEASE_MS)
    assert (await shard.claim(1)).loads == (7,)
    await shard.load(replace(head, jobs=jobs((1, 0), (2, 0))))
    return claim


async def test_a_counted_send_settled_late_takes_its_entry_at_its_true_end(shard: Shard) -> None:
    claim = await late_claim(shard)
    assert await shard.ready() == {7: LEASE_MS + WINDOW_MS}

    await shard.at(LEASE_MS + 100)
    await shard.settle(claim, age=600)

    state = await shard.sender()
    assert state.window == dict.fromkeys(members(1), LEASE_MS - 500)
    assert await shard.ready() == {7: LEASE_MS - 500 + WINDOW_MS}


@pytest.mark.parametrize("use", [LimitUse.BEGUN, LimitUse.UNUSED])
async def test_a_late_claim_that_sent_nothing_releases_its_entry(
    shard: Shard, use: LimitUse
) -> None:
    claim = await late_claim(shard)

    await shard.settle(claim, use)

    assert (await shard.sender()).window == {}
    assert await shard.claimed() == [1]


async def test_a_late_settle_does_not_release_the_entry_of_the_dispatcher_that_sent_the_job(
    shard: Shard,
) -> None:
    # This dispatcher paused between claim and mark; another one claimed the same attempt and sent
    # it.
    stopped = await late_claim(shard, limit=2)
    again = await claim_one(shard)
    assert again.job == stopped.job
    await shard.settle(again)

    await shard.settle(stopped, LimitUse.UNUSED)

    assert (await shard.sender()).window == dict.fromkeys(members(1), LEASE_MS)


async def test_a_late_settle_does_not_end_the_lease_of_the_current_holder(
    shard: Shard,
) -> None:
    stopped = await late_claim(shard, limit=2)
    again = await claim_one(shard)
    assert again.job == stopped.job

    await shard.settle(stopped, LimitUse.UNUSED)

    assert await shard.queue.confirm([again]) == [True]
    await shard.settle(again)
    assert (await shard.sender()).window == dict.fromkeys(members(1), LEASE_MS)


async def test_two_expired_leases_of_one_attempt_take_two_entries(shard: Shard) -> None:
    stopped = await late_claim(shard, limit=2)
    assert (await claim_one(shard)).job == stopped.job
    await shard.at(2 * LEASE_MS)
    assert await shard.claimed(1) == []
    assert len((await shard.sender()).window) == 2

    await shard.settle(stopped, LimitUse.UNUSED)

    assert len((await shard.sender()).window) == 1, "the other may have sent it"


async def test_a_late_settle_does_not_requeue_a_leased_job(shard: Shard) -> None:
    stopped = await late_claim(shard, limit=3)
    again = await claim_one(shard)
    assert again.job == stopped.job

    await shard.settle(stopped, LimitUse.UNUSED, retry_at=0, give_back=True)

    assert await shard.claimed() == [2]


async def test_a_late_retry_keeps_the_keys_of_an_idle_sender(shard: Shard) -> None:
    claim = await late_claim(shard, limit=5)
    await shard.load(NO_GAP)
    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (True, True)

    await shard.settle(claim, LimitUse.COUNTED, retry_at=100_000)

    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (False, False)
