"""A cooldown: a sender whose account was refused waits, and one probe at a time is sent."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim, Contact, LimitUse, PastEnd
from tests.integration.queue.shard import (
    LEASE_MS,
    SENDER,
    START_MS,
    WINDOW_MS,
    Shard,
    jobs,
    milliseconds,
)

# Only the cooldown delays this sender: it has no gap and may send several mails at once.
FREE = replace(SENDER, gap=timedelta(0), jobs=jobs(*((n, 0) for n in range(1, 10))))
# The cooldown is longer than the lease of a probe.
COOLDOWN_MS = 300_000
IDLE_MARGIN_MS = 60_000


async def claim_one(shard: Shard) -> Claim:
    (claim,) = (await shard.claim(1)).claims
    return claim


async def refuse(shard: Shard, claim: Claim, wait_ms: int = COOLDOWN_MS) -> None:
    """End a send whose account was refused; its job keeps waiting."""
    await shard.settle(
        claim,
        LimitUse.BEGUN,
        answered=True,
        cooldown=milliseconds(wait_ms),
        retry_at=shard.now,
    )


async def accept(shard: Shard, claim: Claim) -> None:
    await shard.settle(claim, contact=Contact.ACCEPTED, cooldown=timedelta(0))


async def cool(shard: Shard, *, wait_ms: int = COOLDOWN_MS) -> None:
    """Load a sender and let the server refuse its account at once."""
    await shard.load(FREE)
    await refuse(shard, await claim_one(shard), wait_ms)


async def one_probe(shard: Shard) -> Claim:
    (claim,) = (await shard.claim()).claims
    assert claim.probe
    assert await shard.claimed() == []
    return claim


async def test_nothing_is_claimed_before_the_next_probe(shard: Shard) -> None:
    await cool(shard)
    assert await shard.ready() == {7: COOLDOWN_MS}
    await shard.at(COOLDOWN_MS - 1)
    assert await shard.claimed() == []

    await shard.at(COOLDOWN_MS)
    await one_probe(shard)


async def test_one_probe_at_a_time_is_sent_even_long_after_its_time(shard: Shard) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    probe = await one_probe(shard)
    await shard.at(COOLDOWN_MS + LEASE_MS - 1)
    assert await shard.claimed() == []
    # The account is neither accepted nor refused: the mailbox does not exist.
    await shard.settle(probe, LimitUse.BEGUN, answered=True)

    await one_probe(shard)


async def test_a_refused_probe_is_followed_by_another_wait(shard: Shard) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    await refuse(shard, await one_probe(shard), 900_000)
    await shard.at(COOLDOWN_MS + 899_999)
    assert await shard.claimed() == []

    await shard.at(COOLDOWN_MS + 900_000)
    await one_probe(shard)


async def test_an_accepted_probe_ends_the_cooldown(shard: Shard) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    await accept(shard, await one_probe(shard))

    claims = (await shard.claim()).claims
    assert len(claims) == 5
    assert not any(claim.probe for claim in claims)


async def test_a_send_in_flight_at_the_refusal_does_not_end_the_cooldown(shard: Shard) -> None:
    await shard.load(FREE)
    first, *others = (await shard.claim()).claims
    await refuse(shard, first)
    for claim in others:
        await shard.settle(claim, contact=Contact.ACCEPTED)
    assert await shard.claimed() == []

    await shard.at(COOLDOWN_MS)
    await one_probe(shard)


async def test_a_claim_that_says_nothing_about_the_account_changes_no_cooldown(
    shard: Shard,
) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    probe = await one_probe(shard)
    await shard.settle(probe, LimitUse.UNUSED, retry_at=0, give_back=True)

    assert (await one_probe(shard)).job == probe.job


async def test_a_load_read_before_the_refusal_does_not_undo_it(shard: Shard) -> None:
    await shard.load(FREE)
    claim = await claim_one(shard)
    early = await shard.queue.begin_load([7], committed=False)
    await shard.settle(claim, LimitUse.BEGUN, cooldown=milliseconds(COOLDOWN_MS))

    assert await shard.queue.load_heads([FREE], early) == [7]
    assert await shard.claimed() == []


async def test_a_load_read_before_the_end_of_a_cooldown_does_not_restore_it(
    shard: Shard,
) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    probe = await one_probe(shard)
    early = await shard.queue.begin_load([7], committed=False)
    await accept(shard, probe)

    cooling = replace(FREE, cooldown=milliseconds(COOLDOWN_MS))
    assert await shard.queue.load_heads([cooling], early) == [7]
    assert len(await shard.claimed()) == 5


async def test_a_cooldown_survives_the_loss_of_redis(shard: Shard) -> None:
    await cool(shard)
    await shard.redis.flushall()
    await shard.at(1_000)
    await shard.whole()
    await shard.load(replace(FREE, cooldown=milliseconds(COOLDOWN_MS - 1_000)))
    await shard.at(COOLDOWN_MS - 1)
    assert await shard.claimed() == []

    await shard.at(COOLDOWN_MS)
    await one_probe(shard)


async def test_a_cooldown_that_is_loaded_after_its_time_allows_one_probe(shard: Shard) -> None:
    await shard.load(replace(FREE, cooldown=timedelta(seconds=-30)))
    await shard.at(1)

    await one_probe(shard)


async def test_a_load_without_a_cooldown_ends_it(shard: Shard) -> None:
    # ResumeSender does the same.
    await cool(shard)
    await shard.load(FREE, committed=True)

    assert len(await shard.claimed()) == 5


async def test_when_a_probing_dispatcher_dies_the_next_probe_follows_the_end_of_its_lease(
    shard: Shard,
) -> None:
    await cool(shard)
    await shard.at(COOLDOWN_MS)
    dead = await one_probe(shard)
    await shard.at(COOLDOWN_MS + LEASE_MS - 1)
    assert await shard.claimed() == []

    await shard.at(COOLDOWN_MS + LEASE_MS)
    assert (await one_probe(shard)).job != dead.job


# Together with other limits --------------------------------------------------------------------


async def test_a_sender_with_an_open_circuit_waits_for_the_later_of_both(shard: Shard) -> None:
    await shard.load(FREE)
    for _ in range(3):
        await shard.settle(
            await claim_one(shard), LimitUse.BEGUN, connection_error="refused", retry_at=0
        )
    # The circuit allows a probe at 5 s; the account is refused.
    await shard.at(5_000)
    probe = await claim_one(shard)
    assert not probe.probe
    await refuse(shard, probe, 20_000)
    await shard.at(24_999)
    assert await shard.claimed() == []

    await shard.at(25_000)
    probe = await one_probe(shard)
    # The connection fails three times. The circuit opens again, and now its wait ends later.
    for _ in range(3):
        await shard.settle(probe, LimitUse.BEGUN, connection_error="refused", retry_at=0)
        claims = (await shard.claim()).claims
        if claims:
            (probe,) = claims
    assert await shard.ready() == {7: 30_000}
    await shard.at(30_000)
    await one_probe(shard)


async def test_a_sender_in_cooldown_does_not_probe_its_endpoint(shard: Shard) -> None:
    heads = [
        replace(FREE, sender_id=n, jobs=jobs(*((n * 100 + i, 0) for i in range(5)))) for n in (1, 2)
    ]
    await shard.load(*heads)
    claims = (await shard.claim(6)).claims
    by_sender = {n: [claim for claim in claims if claim.sender_id == n] for n in (1, 2)}
    await refuse(shard, by_sender[1].pop(), 20_000)
    for claim in (*by_sender[1][:2], by_sender[2][0]):
        await shard.settle(claim, LimitUse.BEGUN, connection_error="refused", retry_at=600_000)
    for claim in by_sender[1][2:]:
        await shard.settle(claim, LimitUse.UNUSED, retry_at=0, give_back=True)
    assert await shard.claimed() == []
    await shard.at(5_000)

    (probe,) = (await shard.claim()).claims
    assert (probe.sender_id, probe.probe) == (2, False)


async def test_a_probe_outside_the_sending_hours_waits_for_the_next_opening(
    shard: Shard,
) -> None:
    def within(opens: int, closes: int) -> tuple[int, int]:
        return START_MS + opens, START_MS + closes

    await shard.load(replace(FREE, opening=within(0, 10_000)))
    await refuse(shard, await claim_one(shard), 20_000)
    # The next look is at the end of this opening: it requests the next opening.
    assert await shard.ready() == {7: 10_000}
    await shard.at(10_000)
    assert (await shard.claim()).loads == (7,)
    await shard.load(replace(FREE, opening=within(30_000, 40_000), cooldown=milliseconds(10_000)))
    await shard.at(29_999)
    assert await shard.claimed() == []

    await shard.at(30_000)
    await one_probe(shard)


async def test_a_probe_waits_for_room_in_the_window(shard: Shard) -> None:
    ends = (PastEnd(JobRef(99, 1), milliseconds(0), True),)
    cooling = replace(FREE, hourly_limit=1, ends=ends, cooldown=milliseconds(COOLDOWN_MS))
    await shard.load(cooling)
    await shard.at(WINDOW_MS - 1)
    assert await shard.claimed() == []

    await shard.at(WINDOW_MS)
    await one_probe(shard)


async def test_a_paused_sender_sends_no_probe(shard: Shard) -> None:
    await cool(shard)
    left = milliseconds(COOLDOWN_MS)
    await shard.load(replace(FREE, active=False, cooldown=left), committed=True)
    assert await shard.ready() == {}
    await shard.at(2 * COOLDOWN_MS)
    assert await shard.claimed() == []

    await shard.load(replace(FREE, cooldown=milliseconds(-COOLDOWN_MS)), committed=True)
    await shard.at(2 * COOLDOWN_MS + 1)
    await one_probe(shard)


# Deletion of senders -------------------------------------------------------------------------


async def test_a_sender_in_cooldown_is_deleted_when_no_mail_waits(shard: Shard) -> None:
    # PostgreSQL stores the cooldown: the next load restores it.
    await shard.load(replace(FREE, jobs=jobs((1, 0))))
    claim = await claim_one(shard)
    await shard.settle(claim, cooldown=timedelta(days=1))

    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (True, True)
    left = await shard.redis.pttl(f"{shard.prefix}sender:7")
    assert WINDOW_MS < left <= WINDOW_MS + IDLE_MARGIN_MS


async def test_a_sender_in_cooldown_is_kept_while_a_mail_waits(shard: Shard) -> None:
    await shard.load(replace(FREE, jobs=jobs((1, 0))))
    claim = await claim_one(shard)
    await shard.settle(claim, retry_at=0, cooldown=timedelta(days=1))

    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (False, False)
    assert await shard.ready() == {7: 24 * 60 * 60 * 1000}
