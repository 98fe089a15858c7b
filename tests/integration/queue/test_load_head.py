"""load_head.lua: data read from PostgreSQL replaces the head if it is still current."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.queue.records import ActiveLease, LimitUse, PastEnd
from tests.integration.queue.shard import (
    LEASE_MS,
    SENDER,
    START_MS,
    WINDOW_MS,
    Shard,
    jobs,
    members,
    milliseconds,
)

NO_GAP = replace(SENDER, gap=timedelta(0))


async def test_a_load_replaces_the_head_and_the_settings(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 10))))

    await shard.load(
        replace(SENDER, hourly_limit=3, gap=milliseconds(70), max_in_flight=2, jobs=jobs((3, 20)))
    )

    state = await shard.sender()
    assert state.due == dict.fromkeys(members(3), 20)
    settings = {name: state.settings[name] for name in ("limit", "gap", "flight", "state")}
    assert settings == {"limit": "3", "gap": "70", "flight": "2", "state": "1"}
    assert await shard.ready() == {7: 20}


async def test_the_horizon_is_the_last_loaded_job_only_if_more_jobs_wait(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 10)), more=True))
    assert int((await shard.sender()).settings["horizon"]) == START_MS + 10

    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 10))))
    assert (await shard.sender()).settings["horizon"] == "inf"


async def test_a_load_read_before_a_commit_is_refused_and_changes_no_head(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    early = await shard.queue.begin_load([7], committed=False)
    await shard.queue.begin_load([7], committed=True)
    before, ready = await shard.sender(), await shard.ready()

    assert await shard.queue.load_heads([replace(SENDER, active=False)], early) == [7]
    after = await shard.sender()
    assert after.settings.pop("refused") == "1"
    assert (after, await shard.ready()) == (before, ready)


async def test_the_second_of_two_first_loads_is_refused(shard: Shard) -> None:
    epochs = await shard.queue.begin_load([7], committed=True)
    assert await shard.queue.load_heads([replace(SENDER, jobs=jobs((1, 0)))], epochs) == []

    assert await shard.queue.load_heads([SENDER], epochs) == [7]
    assert (await shard.sender()).due == dict.fromkeys(members(1), 0)


async def test_a_load_from_before_a_loss_of_redis_is_refused(shard: Shard) -> None:
    await shard.load(SENDER)
    epochs = await shard.queue.begin_load([7], committed=False)
    await shard.redis.flushall()
    await shard.at(1)

    assert await shard.queue.load_heads([SENDER], epochs) == [7], "its history is not known"


async def test_senders_of_one_load_are_refused_separately(shard: Shard) -> None:
    heads = [replace(SENDER, sender_id=n, jobs=jobs((n, 0))) for n in (1, 2, 3)]
    await shard.load(*heads)
    epochs = await shard.queue.begin_load([1, 2, 3], committed=False)
    await shard.queue.begin_load([2], committed=True)

    assert await shard.queue.load_heads(heads, epochs) == [2]
    assert await shard.queue.load_heads([], {}) == []


async def test_a_load_does_not_requeue_a_leased_job(shard: Shard) -> None:
    head = replace(SENDER, jobs=jobs((1, 0), (2, 0)))
    await shard.load(head)
    assert await shard.claimed() == [1]

    # The load read PostgreSQL before the claim was marked there.
    await shard.load(head)

    assert (await shard.sender()).due == dict.fromkeys(members(2), 0)


async def test_a_load_is_requested_soon_if_all_loaded_jobs_are_leased(
    shard: Shard,
) -> None:
    head = replace(NO_GAP, max_in_flight=200, hourly_limit=1000)
    head = replace(head, jobs=jobs(*((n, 0) for n in range(1, 129))), more=True)
    await shard.load(head)
    claimed = await shard.claim(200)
    assert (len(claimed.claims), claimed.loads) == (128, (7,))

    # None of the jobs is marked yet, so the load finds the same jobs again.
    await shard.load(head)
    for claim in claimed.claims:
        await shard.settle(claim)

    look = (await shard.ready())[7]
    assert 0 < look < 1000, "neither forgotten nor asked for again and again"
    await shard.at(look)
    assert (await shard.claim()).loads == (7,)
    await shard.load(replace(head, jobs=jobs((129, 0)), more=False))
    assert await shard.claimed() == [129]


async def test_a_first_load_restores_the_limiters_history(shard: Shard) -> None:
    await shard.at(1000.5)
    ends = (
        PastEnd(JobRef(1, 1), milliseconds(3_000_000), counted=True),
        # This end counts only for the gap.
        PastEnd(JobRef(3, 1), milliseconds(100), counted=False),
        PastEnd(JobRef(2, 3), milliseconds(400), counted=True),
    )
    leases = (ActiveLease(JobRef(4, 2), milliseconds(5000)),)
    await shard.load(replace(NO_GAP, ends=ends, leases=leases, jobs=jobs((5, 0))))

    state = await shard.sender()
    # Ends are rounded up: none is recorded too early.
    assert state.window == {"000000000001:1": 1001 - 3_000_000, "000000000002:3": 601}
    assert state.leases == {"000000000004:2": 6001}
    assert int(state.settings["end"]) == START_MS + 901


async def test_a_first_load_puts_no_leased_job_in_the_head(shard: Shard) -> None:
    lease = ActiveLease(JobRef(1, 1), milliseconds(5000))
    await shard.load(replace(NO_GAP, leases=(lease,), jobs=jobs((1, 0), (2, 0))))

    assert await shard.claimed() == [2]


async def test_a_job_that_was_given_back_after_its_lease_was_restored_is_claimed_again(
    shard: Shard,
) -> None:
    lease = ActiveLease(JobRef(1, 1), milliseconds(5000))
    limited = replace(NO_GAP, max_in_flight=1)
    await shard.load(replace(limited, leases=(lease,), jobs=jobs((2, 0))))
    # It has the one place in flight, until PostgreSQL says that it waits again.
    assert await shard.claimed() == []

    await shard.load(replace(limited, jobs=jobs((1, 0), (2, 0))), committed=True)

    assert await shard.claimed() == [1]
    assert (await shard.sender()).leases.keys() == {"000000000001:1"}


async def test_a_claim_of_a_job_whose_lease_was_restored_keeps_its_lease(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))))
    [claim] = (await shard.claim()).claims
    await shard.redis.delete("outbox:{0}:sender:7")
    await shard.load(replace(NO_GAP, leases=(ActiveLease(claim.job, milliseconds(5000)),)))
    assert await shard.queue.confirm([claim]) == [True]

    # This load read PostgreSQL before the mark.
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))))

    assert await shard.claimed() == []
    assert await shard.queue.confirm([claim]) == [True]


async def test_a_lease_that_expired_before_a_first_load_is_found_at_once(
    shard: Shard,
) -> None:
    await shard.load(replace(NO_GAP, leases=(ActiveLease(JobRef(1, 1), timedelta(0)),)))

    assert (await shard.claim()).loads == ()
    assert await shard.ready() == {7: 250}
    await shard.at(250)
    assert (await shard.claim()).loads == (7,)


async def test_a_first_load_deletes_leftovers_of_a_lost_sender(
    shard: Shard,
) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0), (3, 0))))
    first, _ = (await shard.claim(2)).claims
    await shard.settle(first)
    await shard.redis.delete("outbox:{0}:sender:7")

    await shard.load(replace(NO_GAP, jobs=jobs((4, 0))))

    state = await shard.sender()
    assert (list(state.due), state.leases, state.window) == (members(4), {}, {})


async def test_a_later_load_leaves_history_and_leases_as_they_are(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0))))
    first, second = (await shard.claim(2)).claims
    await shard.settle(first)
    before = await shard.sender()

    ends = (PastEnd(JobRef(9, 1), milliseconds(1), counted=True),)
    leases = (ActiveLease(JobRef(8, 1), milliseconds(9)),)
    await shard.load(replace(NO_GAP, ends=ends, leases=leases, jobs=jobs((3, 0))))

    after = await shard.sender()
    assert (after.window, after.leases) == (before.window, before.leases)
    assert await shard.queue.confirm([second]) == [True]


async def test_a_load_clears_the_request_for_one(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    await shard.claim()
    await shard.at(LEASE_MS)
    assert (await shard.claim()).loads == (7,)

    await shard.load(SENDER)

    assert "loading" not in (await shard.sender()).settings


# Memory --------------------------------------------------------------------------------------


async def test_a_full_head_stays_encoded_as_a_listpack(shard: Shard) -> None:
    # The largest ids and times.
    head = [(JobRef(10**12 - n, 12), START_MS + 10**11 + n) for n in range(128)]
    await shard.load(replace(SENDER, jobs=tuple(head), more=True))

    # Before Redis 7 the encoding has another name, but the same size.
    encoding = await shard.redis.object("encoding", "outbox:{0}:due:7")
    assert encoding in ("listpack", "ziplist")
    size = await shard.redis.memory_usage("outbox:{0}:due:7", samples=0)
    assert size is not None
    assert size < 128 * 33


async def test_a_sender_without_jobs_is_deleted_after_its_history(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (False, False)
    (claim,) = (await shard.claim()).claims
    assert not (await shard.sender()).settings_expire, "it has a send in flight"

    await shard.settle(claim)

    assert await shard.ready() == {}
    settings = await shard.redis.pttl("outbox:{0}:sender:7")
    window = await shard.redis.pttl("outbox:{0}:window:7")
    assert WINDOW_MS < settings < window <= WINDOW_MS + 120_000, "the history goes last"


async def test_a_sender_with_a_gap_longer_than_the_window_is_kept_for_its_gap(
    shard: Shard,
) -> None:
    head = replace(SENDER, gap=timedelta(hours=5), jobs=jobs((1, 0)))
    await shard.load(head)
    (claim,) = (await shard.claim()).claims
    await shard.settle(claim)

    assert await shard.redis.pttl("outbox:{0}:sender:7") > 5 * WINDOW_MS
    await shard.load(replace(head, jobs=jobs((2, 0))))
    assert await shard.ready() == {7: 5 * WINDOW_MS}


@pytest.mark.parametrize("how", ["load", "retry"])
async def test_a_sender_that_is_used_again_is_kept(shard: Shard, how: str) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    (claim,) = (await shard.claim()).claims
    await shard.settle(claim)
    assert (await shard.sender()).settings_expire

    if how == "load":
        await shard.load(replace(SENDER, jobs=jobs((2, 0))))
    else:
        await shard.settle(claim, LimitUse.COUNTED, retry_at=9000)

    state = await shard.sender()
    assert (state.settings_expire, state.window_expires) == (False, False)


async def test_a_full_head_is_compact(shard: Shard) -> None:
    first = JobRef(1_234_567_890_123_456_789, 1)
    full = [(JobRef(first.job_id + n, 1), START_MS + n) for n in range(HEAD_SIZE)]
    await shard.load(replace(SENDER, jobs=tuple(full), more=True))
    key = shard.prefix + "due:7"

    assert await shard.redis.object("ENCODING", key) == "listpack"
    memory: Any = await shard.redis.memory_usage(key)
    assert memory < 40 * HEAD_SIZE
