"""confirm.lua: whether a claim still holds after its job was marked and before SMTP."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.records import LimitUse
from tests.integration.queue.shard import LEASE_MS, SENDER, Shard, jobs, members

HEAD = replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0), (2, 0), (3, 0)))


async def test_confirmations_are_returned_in_the_order_of_the_claims(shard: Shard) -> None:
    await shard.load(HEAD)
    claims = (await shard.claim()).claims
    await shard.settle(claims[1])

    assert await shard.queue.confirm(claims) == [True, False, True]


async def test_a_claim_from_before_a_loss_of_redis_is_not_confirmed(shard: Shard) -> None:
    await shard.load(HEAD)
    claims = (await shard.claim(2)).claims
    await shard.redis.flushall()
    await shard.at(1)
    await shard.whole()
    await shard.load(HEAD)

    assert await shard.queue.confirm(claims) == [False, False]


async def test_a_job_claimed_twice_around_a_loss_belongs_to_the_dispatcher_that_marked_it(
    shard: Shard,
) -> None:
    await shard.load(HEAD)
    (marked,) = (await shard.claim(1)).claims
    await shard.redis.flushall()
    await shard.at(1)
    await shard.whole()
    await shard.load(HEAD)
    (refused,) = (await shard.claim(1)).claims
    assert refused.job == marked.job

    assert await shard.queue.confirm([marked]) == [True]
    await shard.settle(refused, LimitUse.UNUSED)

    assert (await shard.sender()).leases == dict.fromkeys(members(1), LEASE_MS)
    await shard.settle(marked, LimitUse.UNUSED)
    assert (await shard.sender()).leases == {}


async def test_a_claim_whose_lease_was_found_expired_is_not_confirmed(shard: Shard) -> None:
    await shard.load(HEAD)
    claims = (await shard.claim(1)).claims
    await shard.at(LEASE_MS)
    assert await shard.queue.confirm(claims) == [True]
    await shard.claim()

    assert await shard.queue.confirm(claims) == [False]


async def test_a_claim_of_a_sender_whose_settings_are_lost_is_not_confirmed(shard: Shard) -> None:
    # A first load that read PostgreSQL before the mark would lose the lease.
    await shard.load(HEAD)
    claims = (await shard.claim(1)).claims
    await shard.redis.delete("outbox:{0}:sender:7")
    assert await shard.queue.confirm(claims) == [False]

    await shard.queue.begin_load([7], committed=False)
    assert await shard.queue.confirm(claims) == [False]


async def test_a_claim_does_not_hold_by_the_lease_of_a_later_claim_of_its_job(
    shard: Shard,
) -> None:
    # The dispatcher was suspended for longer than its lease between claim and confirm.
    await shard.load(replace(HEAD, gap=timedelta(seconds=1)))
    late = (await shard.claim(1)).claims
    await shard.at(LEASE_MS)
    await shard.claim(1)  # finds the expired lease, and assumes that the mail was sent
    await shard.at(LEASE_MS + 1000)
    await shard.load(replace(HEAD, gap=timedelta(seconds=1)))  # PostgreSQL still has it SCHEDULED
    again = (await shard.claim(1)).claims
    assert [claim.job for claim in again] == [claim.job for claim in late]

    assert await shard.queue.confirm(late) == [False]
    await shard.settle(late[0], LimitUse.UNUSED)
    assert await shard.queue.confirm(again) == [True]
    assert (await shard.claim(1)).claims == ()


async def test_the_sender_of_several_claims_is_read_once(shard: Shard) -> None:
    head = replace(HEAD, user="ann", jobs=jobs(*((n, 0) for n in range(1, 6))))
    await shard.load(head)
    claims = (await shard.claim()).claims
    reads = []
    for confirmed in (claims[:1], claims):
        await shard.redis.config_resetstat()
        assert await shard.queue.confirm(confirmed) == [True] * len(confirmed)
        reads.append((await shard.redis.info("commandstats"))["cmdstat_hmget"]["calls"])

    assert len(claims) == 5
    assert reads[0] == reads[1]
