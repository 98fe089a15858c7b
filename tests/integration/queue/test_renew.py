"""renew.lua: the end of a lease moves while its send runs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import ActiveLease, Claim, LimitUse
from tests.integration.queue.shard import (
    LEASE_MS,
    SENDER,
    START_MS,
    Shard,
    jobs,
    members,
    milliseconds,
)

HEAD = replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0), (2, 0), (3, 0)))


async def claim_one(shard: Shard) -> Claim:
    (claim,) = (await shard.claim(1)).claims
    return claim


async def test_a_renewal_moves_the_end_to_a_full_lease_from_now(shard: Shard) -> None:
    await shard.load(HEAD)
    first, second = (await shard.claim(2)).claims
    await shard.at(20_000.5)

    assert await shard.renew(first) == [20_000 + LEASE_MS]

    leases = (await shard.sender()).leases
    assert leases == {members(1)[0]: 20_000 + LEASE_MS, members(2)[0]: LEASE_MS}
    assert second.job.job_id == 2


async def test_a_renewal_within_the_same_millisecond_returns_the_end(shard: Shard) -> None:
    await shard.load(HEAD)
    claim = await claim_one(shard)

    assert await shard.renew(claim, claim) == [LEASE_MS, LEASE_MS]


async def test_renewals_are_answered_in_the_order_of_the_leases(shard: Shard) -> None:
    other = replace(HEAD, sender_id=8, jobs=jobs((4, 0)))
    await shard.load(HEAD, other)
    claims = {claim.job.job_id: claim for claim in (await shard.claim()).claims}
    await shard.settle(claims[2])
    stranger = replace(claims[1], sender_id=99)
    await shard.at(1_000)

    end = 1_000 + LEASE_MS
    order = (claims[4], claims[2], stranger, claims[1], claims[3])
    assert await shard.renew(*order) == [end, None, None, end, end]


async def test_renewing_no_leases_is_not_an_error(shard: Shard) -> None:
    assert await shard.renew() == []


async def test_a_renewal_never_restores_a_lease_that_no_longer_exists(shard: Shard) -> None:
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.settle(claim)

    assert await shard.renew(claim) == [None]
    assert (await shard.sender()).leases == {}


async def test_the_next_look_at_the_sender_moves_with_the_lease(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    assert await shard.ready() == {7: LEASE_MS}
    await shard.at(20_000)
    await shard.renew(claim)

    assert await shard.ready() == {7: 20_000 + LEASE_MS}


async def test_a_renewed_lease_outlives_its_first_end(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    claim = await claim_one(shard)
    await shard.at(20_000)
    await shard.renew(claim)
    await shard.at(20_000 + LEASE_MS - 1)
    claimed = await shard.claim()
    assert (claimed.claims, claimed.loads) == ((), ())
    assert (await shard.sender()).leases != {}

    # Renewals stop: its entry is assumed to be taken from the renewed end on.
    await shard.at(20_000 + LEASE_MS)
    assert (await shard.claim()).loads == (7,)
    assert list((await shard.sender()).window.values()) == [20_000 + LEASE_MS]


async def test_an_expired_lease_that_was_not_noticed_is_renewed(shard: Shard) -> None:
    # No claim has examined the sender since, so its entry is still reserved.
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.at(LEASE_MS + 5)

    assert await shard.renew(claim) == [2 * LEASE_MS + 5]
    assert (await shard.claim()).loads == ()


async def test_a_lease_found_expired_is_not_renewed(shard: Shard) -> None:
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.at(LEASE_MS)
    await shard.claim(1)

    assert await shard.renew(claim) == [None]


async def test_renewing_the_probe_of_an_open_circuit_keeps_other_probes_out(
    shard: Shard,
) -> None:
    heads = [
        replace(HEAD, sender_id=n, jobs=jobs(*((n * 100 + i, 0) for i in range(5)))) for n in (1, 2)
    ]
    await shard.load(*heads)
    claims = (await shard.claim()).claims
    for claim in claims:
        await shard.settle(claim, LimitUse.BEGUN, connection_error="refused", retry_at=1)
    await shard.at(5_000)
    probe = await claim_one(shard)
    await shard.at(25_000)
    await shard.renew(probe)
    assert int((await shard.circuit())["until"]) == START_MS + 25_000 + LEASE_MS
    await shard.at(25_000 + LEASE_MS - 1)
    assert await shard.claimed() == []

    # The probing dispatcher dies, and another one probes.
    await shard.at(25_000 + LEASE_MS)
    assert len(await shard.claimed()) == 1


async def test_the_renewal_of_another_send_extends_no_probe(shard: Shard) -> None:
    heads = [
        replace(HEAD, sender_id=n, jobs=jobs(*((n * 100 + i, 0) for i in range(5)))) for n in (1, 2)
    ]
    await shard.load(*heads)
    *failing, slow = (await shard.claim()).claims
    for claim in failing:
        await shard.settle(claim, LimitUse.BEGUN, connection_error="refused", retry_at=1)
    await shard.at(5_000)
    await claim_one(shard)
    before = await shard.circuit()
    await shard.at(6_000)
    assert await shard.renew(slow) == [6_000 + LEASE_MS]

    assert await shard.circuit() == before


async def test_a_refused_claim_does_not_release_a_renewed_lease(
    shard: Shard,
) -> None:
    await shard.load(HEAD)
    marked = await claim_one(shard)
    await shard.redis.flushall()
    await shard.at(1)
    await shard.whole()
    await shard.load(HEAD)
    refused = await claim_one(shard)
    assert refused.job == marked.job
    await shard.at(2)
    assert await shard.renew(marked) == [2 + LEASE_MS]

    await shard.settle(refused, LimitUse.UNUSED)

    assert (await shard.sender()).leases == dict.fromkeys(members(1), 2 + LEASE_MS)


async def test_a_renewed_send_releases_its_entry_by_the_end_that_the_renewal_returned(
    shard: Shard,
) -> None:
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.at(20_000)
    (end,) = await shard.queue.renew([(claim.sender_id, claim.job, claim.user)])
    assert end is not None
    await shard.settle(replace(claim, lease_ms=end), LimitUse.UNUSED, retry_at=0, give_back=True)

    state = await shard.sender()
    assert (state.leases, state.window) == ({}, {})
    assert (await claim_one(shard)).job == claim.job


async def test_a_send_whose_renewal_got_no_answer_is_settled_by_its_attempt(
    shard: Shard,
) -> None:
    # The send knows only the old end, so a give-back would release nothing. It is recorded as an
    # attempt, whose number fences it.
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.at(20_000)
    await shard.renew(claim)
    await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)
    assert (await shard.sender()).leases != {}

    await shard.settle(claim, LimitUse.BEGUN, retry_at=20_000)

    state = await shard.sender()
    assert (state.leases, state.window) == ({}, {})
    assert members(1, attempt=2)[0] in state.due


async def test_a_lease_restored_by_a_load_is_renewed(shard: Shard) -> None:
    await shard.load(HEAD)
    claim = await claim_one(shard)
    await shard.redis.flushall()
    await shard.at(1_000)
    assert await shard.renew(claim) == [None]
    lease = ActiveLease(JobRef(1, 1), milliseconds(LEASE_MS - 1_000))
    await shard.load(replace(HEAD, jobs=jobs((2, 0)), leases=(lease,)))

    assert await shard.renew(claim) == [1_000 + LEASE_MS]
