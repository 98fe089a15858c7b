"""claim.lua: which jobs may be sent now, by earliest look, regardless of other waiting jobs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import (
    ActiveLease,
    Claim,
    Claimed,
    LimitUse,
    PastEnd,
    Settlement,
)
from tests.integration.queue.shard import (
    LEASE,
    LEASE_MS,
    PATIENCE_MS,
    SENDER,
    START_MS,
    WINDOW,
    WINDOW_MS,
    Shard,
    connect_to,
    jobs,
    members,
    milliseconds,
)

NO_GAP = replace(SENDER, gap=timedelta(0))


async def test_a_claim_on_an_empty_shard_returns_no_job_and_no_next_look(shard: Shard) -> None:
    assert await shard.queue.claim(5) == Claimed()


async def test_a_shard_without_its_generation_is_lost_but_its_loaded_jobs_are_claimed(
    bare_shard: Shard,
) -> None:
    await bare_shard.load(replace(SENDER, jobs=jobs((1, 0))))

    claimed = await bare_shard.queue.claim(5)
    assert claimed.lost
    assert [claim.job.job_id for claim in claimed.claims] == [1]

    await bare_shard.whole()
    assert not (await bare_shard.queue.claim(5)).lost


async def test_a_claimed_job_is_leased_and_no_longer_waits(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    await shard.at(250)

    claimed = await shard.claim()

    lease_ms = START_MS + 250 + LEASE_MS
    life = shard.queue.life
    assert claimed.claims == (
        Claim(SENDER.sender_id, JobRef(1, 1), milliseconds(250), lease_ms, START_MS, life=life),
    )
    state = await shard.sender()
    assert state.leases == dict.fromkeys(members(1), 250 + LEASE_MS)
    assert state.due == dict.fromkeys(members(2), 0)
    assert await shard.claimed() == []


async def test_a_job_is_not_claimed_before_it_is_due(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 1000))))

    await shard.at(999)
    assert await shard.queue.claim(5) == Claimed(next_look=milliseconds(1))
    await shard.at(999.999)
    assert await shard.claimed() == []
    await shard.at(1000)
    assert await shard.claimed() == [1]


async def test_jobs_of_a_sender_are_claimed_by_due_time_and_then_by_id(shard: Shard) -> None:
    head = jobs((9, 0), (1_000_000_000, 0), (10, 5), (2, 7), (11, 7))
    await shard.load(replace(NO_GAP, max_in_flight=9, jobs=head))
    await shard.at(10)

    assert await shard.claimed() == [9, 1_000_000_000, 10, 2, 11]


async def test_senders_are_served_by_their_next_look_and_then_by_their_key(shard: Shard) -> None:
    for sender_id, due in ((7, 30), (10, 10), (9, 20), (12, 10)):
        await shard.load(replace(SENDER, sender_id=sender_id, jobs=jobs((sender_id, due))))
    await shard.at(100)

    assert await shard.claimed(3) == [10, 12, 9]
    assert await shard.claimed(3) == [7]


async def test_no_more_jobs_are_claimed_than_requested(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs(*((n, 0) for n in range(1, 9)))))

    claimed = await shard.claim(2)
    assert [claim.job.job_id for claim in claimed.claims] == [1, 2]
    assert claimed.next_look == timedelta(0)


async def test_with_a_gap_one_send_is_in_flight_and_the_next_begins_a_gap_after_its_end(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    (first,) = (await shard.claim()).claims
    await shard.at(500.4)
    assert await shard.claimed() == []
    # It ended at 400.4, which is rounded up to 401: a gap is never short by a fraction of a ms.
    await shard.settle(first, age=100)

    await shard.at(2400.9)
    assert (await shard.claim()).next_look == milliseconds(1)
    await shard.at(2401)
    (second,) = (await shard.claim()).claims
    assert (second.job, second.waited) == (JobRef(2, 1), timedelta(0)), (
        "lateness counts from the instant at which the limits allowed it"
    )


async def test_without_a_gap_max_in_flight_sends_run_at_once(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, max_in_flight=3, jobs=jobs(*((n, 0) for n in range(1, 9)))))

    claimed = await shard.claim()
    assert [claim.job.job_id for claim in claimed.claims] == [1, 2, 3]
    assert claimed.next_look == LEASE
    await shard.settle(claimed.claims[1])
    assert await shard.claimed() == [4]


async def test_ends_and_reservations_share_the_window(shard: Shard) -> None:
    ends = tuple(
        PastEnd(JobRef(100 + n, 1), milliseconds(age), counted=True)
        for n, age in enumerate((WINDOW_MS - 1, 3000, 2000))
    )
    head = replace(NO_GAP, hourly_limit=4, ends=ends, jobs=jobs(*((n, 0) for n in range(1, 9))))
    await shard.load(head)

    (first,) = (await shard.claim()).claims
    # The lease takes the fourth entry, so there is room again when the oldest end leaves.
    assert await shard.ready() == {7: 1}
    await shard.at(1)
    (second,) = (await shard.claim()).claims
    assert [first.job.job_id, second.job.job_id] == [1, 2]

    await shard.settle(first)
    await shard.settle(second, LimitUse.UNUSED)
    assert await shard.claimed() == [3]
    assert (await shard.claim()).next_look == milliseconds(LEASE_MS)


async def test_an_end_leaves_the_window_exactly_one_window_later(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, hourly_limit=1, jobs=jobs((1, 0), (2, 0))))
    (claim,) = (await shard.claim()).claims
    await shard.at(700)
    await shard.settle(claim)

    await shard.at(WINDOW_MS + 699.999)
    assert await shard.claimed() == []
    await shard.at(WINDOW_MS + 700)
    assert await shard.claimed() == [2]


@pytest.mark.parametrize("gap", [0, 2000])
async def test_lateness_of_a_job_counts_only_from_when_the_window_had_room(
    shard: Shard, gap: int
) -> None:
    ends = tuple(
        PastEnd(JobRef(100 + age, 1), milliseconds(WINDOW_MS - age), counted=True)
        for age in (1000, 1400)
    )
    head = replace(SENDER, gap=milliseconds(gap), hourly_limit=2, ends=ends)
    await shard.load(replace(head, jobs=jobs((1, -500_000), (2, -500_000))))
    await shard.at(1500)

    (claim,) = (await shard.claim(1)).claims
    assert claim.waited == milliseconds(500)


async def test_lateness_counts_while_the_caller_has_no_room_for_the_job(
    shard: Shard,
) -> None:
    ends = tuple(
        PastEnd(JobRef(100 + age, 1), milliseconds(WINDOW_MS - age), counted=True)
        for age in (1000, 1400)
    )
    head = replace(NO_GAP, hourly_limit=2, ends=ends)
    await shard.load(replace(head, jobs=jobs((1, -500_000), (2, -500_000))))
    await shard.at(1500)

    waited = [(await shard.claim(1)).claims[0].waited for _ in range(2)]

    assert waited == [milliseconds(500), milliseconds(100)]


async def test_a_lower_limit_and_a_longer_gap_hold_from_the_next_claim_on(shard: Shard) -> None:
    head = replace(NO_GAP, jobs=jobs(*((n, 0) for n in range(1, 9))))
    await shard.load(head)
    claims = (await shard.claim(3)).claims
    for changed in (
        replace(head, hourly_limit=3),
        replace(head, gap=timedelta(seconds=9)),
        replace(head, max_in_flight=3),
        replace(head, active=False),
    ):
        await shard.load(changed, committed=True)
        assert await shard.claimed() == []
    for claim in claims:
        await shard.settle(claim)
    await shard.load(replace(head, gap=timedelta(seconds=9)), committed=True)
    assert await shard.ready() == {7: 9000}
    await shard.load(replace(head, hourly_limit=3), committed=True)
    assert await shard.ready() == {7: WINDOW_MS}
    await shard.load(replace(head, jobs=head.jobs[3:]), committed=True)
    assert await shard.claimed() == [4, 5, 6, 7, 8]


async def test_a_paused_sender_is_skipped_and_resumes_where_it_stopped(
    shard: Shard,
) -> None:
    head = replace(SENDER, jobs=jobs((1, 0), (2, 50)))
    await shard.load(replace(head, active=False))
    await shard.at(100)

    assert await shard.queue.claim(5) == Claimed()
    await shard.load(head, committed=True)
    assert await shard.claimed() == [1]


async def test_an_expired_lease_takes_an_entry_at_its_deadline_and_requests_a_load(
    shard: Shard,
) -> None:
    head = replace(SENDER, hourly_limit=2, jobs=jobs((1, 0), (2, 0)))
    await shard.load(head)
    await shard.claim()
    await shard.at(LEASE_MS - 1)
    assert await shard.queue.claim(5) == Claimed(next_look=milliseconds(1))
    epoch = (await shard.sender()).settings["epoch"]

    # No claim runs for a while. The entry counts from the deadline, not from the next claim.
    await shard.at(LEASE_MS + 500)
    claimed = await shard.claim()

    assert claimed.loads == (7,)
    assert claimed.claims == ()
    state = await shard.sender()
    assert state.leases == {}
    assert list(state.window.values()) == [LEASE_MS]
    assert int(state.settings["end"]) == START_MS + LEASE_MS
    assert int(state.settings["epoch"]) == int(epoch) + 1, "a load under way has read too early"
    assert await shard.ready() == {7: LEASE_MS + 2000}


async def test_an_overdue_load_is_requested_again(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    await shard.claim()
    await shard.at(LEASE_MS)
    assert (await shard.claim()).loads == (7,)

    await shard.at(LEASE_MS + PATIENCE_MS - 1)
    assert await shard.queue.claim(5) == Claimed(next_look=milliseconds(1))
    await shard.at(LEASE_MS + PATIENCE_MS)
    assert (await shard.claim()).loads == (7,)
    await shard.load(SENDER)
    assert await shard.ready() == {}


async def test_a_head_that_runs_low_requests_a_load_once_if_more_jobs_wait(
    shard: Shard,
) -> None:
    head = replace(NO_GAP, max_in_flight=50, jobs=jobs(*((n, 0) for n in range(1, 41))), more=True)
    await shard.load(head)

    assert (await shard.claim(8)).loads == ()
    assert (await shard.claim(1)).loads == (7,)
    assert (await shard.claim(1)).loads == ()

    await shard.load(replace(head, more=False, jobs=head.jobs[10:]))
    assert (await shard.claim(9)).loads == (), "nothing waits behind this one"


async def test_a_sender_whose_settings_are_lost_sends_nothing_until_it_is_loaded(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    await shard.redis.delete("outbox:{0}:sender:7")

    claimed = await shard.claim()
    assert claimed == Claimed(loads=(7,), next_look=milliseconds(PATIENCE_MS))
    assert (await shard.claim()).loads == ()
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    assert await shard.claimed() == [1]


async def test_a_lease_from_before_a_loss_blocks_the_gap_until_postgresql_tells_its_end(
    shard: Shard,
) -> None:
    """Its dispatcher may renew it at another server of Redis, which lost nothing."""
    lease = ActiveLease(JobRef(1, 1), milliseconds(900))
    await shard.load(replace(SENDER, leases=(lease,), jobs=jobs((2, 0))))

    assert (await shard.claim()).next_look == milliseconds(900)
    await shard.at(900)
    claimed = await shard.claim()
    assert (claimed.claims, claimed.loads, claimed.next_look) == ((), (), milliseconds(250))
    await shard.at(1_150)
    assert (await shard.claim()).loads == (7,)
    # It was renewed.
    lease = ActiveLease(JobRef(1, 1), milliseconds(500))
    await shard.load(replace(SENDER, leases=(lease,), jobs=jobs((2, 0))))
    assert (await shard.claim()).next_look == milliseconds(500)
    await shard.at(1_650)
    assert (await shard.claim()).claims == ()
    await shard.at(1_900)
    assert (await shard.claim()).loads == (7,)
    # It ended half a second ago.
    ended = PastEnd(JobRef(1, 1), milliseconds(500), counted=True)
    await shard.load(replace(SENDER, ends=(ended,), jobs=jobs((2, 0))))
    assert await shard.ready() == {7: 3_400}


async def calls_of_a_claim(shard: Shard, want: int) -> dict[str, int]:
    """Claim `want` jobs; return how often each Redis command was called."""
    # The first claim also stores the limits of users.
    assert await shard.claimed(0) == []
    await shard.redis.config_resetstat()
    assert len(await shard.claimed(want)) == want
    stats = await shard.redis.info("commandstats")
    beside = ("cmdstat_config|resetstat", "cmdstat_script|load", "cmdstat_evalsha", "cmdstat_info")
    return {name: found["calls"] for name, found in stats.items() if name not in beside}


@pytest.mark.parametrize("blocked", ["gap", "window", "paused", "lease"])
async def test_a_blocked_sender_costs_nothing(shard: Shard, blocked: str) -> None:
    await shard.load(replace(SENDER, sender_id=98, jobs=jobs((1, 0))))
    alone = await calls_of_a_claim(shard, 1)
    ends = (PastEnd(JobRef(999, 1), milliseconds(1), counted=True),)
    head = replace(SENDER, ends=ends, jobs=jobs(*((n, 0) for n in range(1, 129))))
    match blocked:
        case "window":
            head = replace(head, gap=timedelta(0), hourly_limit=1)
        case "paused":
            head = replace(head, active=False)
        case "lease":
            lease = ActiveLease(JobRef(998, 1), milliseconds(5000))
            head = replace(head, leases=(lease,))
    await shard.load(*(replace(head, sender_id=n) for n in range(50)))
    await shard.load(replace(SENDER, sender_id=99, jobs=jobs((1, 0))))

    assert await calls_of_a_claim(shard, 1) == alone


async def test_the_cost_of_a_claim_depends_on_the_jobs_it_takes_not_on_those_waiting(
    shard: Shard,
) -> None:
    costs = []
    for waiting in (33, 128):
        await shard.redis.delete("outbox:{0}:asleep")
        head = jobs(*((n, 0) for n in range(1, 1 + waiting)))
        await shard.load(replace(NO_GAP, sender_id=waiting, max_in_flight=20, jobs=head))
        costs.append(await calls_of_a_claim(shard, 20))
    assert costs[0] == costs[1]


async def test_many_senders_without_settings_do_not_slow_a_claim(shard: Shard) -> None:
    strangers = {str(n): START_MS - 1 for n in range(1000, 1500)}
    await shard.redis.zadd("outbox:{0}:ready", strangers)
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))

    asked: list[int] = []
    found: list[int] = []
    for _ in range(20):
        claimed = await shard.claim(5)
        asked += claimed.loads
        found += [claim.job.job_id for claim in claimed.claims]
        if claimed.next_look:
            break
    assert sorted(asked) == list(range(1000, 1500))
    assert found == [1]


async def test_scripts_use_the_clock_of_redis(redis_url: str) -> None:
    async with connect_to(redis_url) as redis:
        queue = Queue(redis, 0, window=WINDOW, lease=LEASE)
        token = await queue.begin_rebuild()
        assert token is not None
        assert await queue.finish_rebuild(token)
        seconds, _ = await redis.time()
        now = seconds * 1000
        head = replace(SENDER, jobs=((JobRef(1, 1), now), (JobRef(2, 1), now + 3_600_000)))
        epochs = await queue.begin_load([7], committed=True)
        assert await queue.load_heads([head], epochs) == []

        claimed = await queue.claim(5)

        (claim,) = claimed.claims
        assert timedelta(0) <= claim.waited < timedelta(seconds=10)
        assert claimed.next_look is not None
        assert timedelta(seconds=50) < claimed.next_look <= LEASE
        await queue.settle([Settlement(claim.sender_id, claim.job, LimitUse.COUNTED)])
        assert await redis.zscore(queue.keys.ready, "7") == now + 3_600_000
