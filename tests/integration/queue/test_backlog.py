"""backlog.lua: the jobs that wait only for a dispatcher."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.records import Head, LimitUse, ReadyJobs
from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs, milliseconds

NO_GAP = replace(SENDER, gap=timedelta(0), max_in_flight=3)
NOTHING = ReadyJobs(complete=True, count=0, age=timedelta(0))


def ready(count: int, age_ms: int) -> ReadyJobs:
    return ReadyJobs(complete=True, count=count, age=milliseconds(age_ms))


async def test_a_shard_without_due_jobs_has_no_ready_ones(shard: Shard) -> None:
    assert await shard.queue.count_ready_jobs() == NOTHING
    await shard.load(replace(SENDER, jobs=jobs((1, 5_000))))
    assert await shard.queue.count_ready_jobs() == NOTHING


async def test_a_sender_with_a_gap_has_one_ready_job_and_its_age_is_its_lateness(
    shard: Shard,
) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0), (3, 0))))
    await shard.at(700)
    assert await shard.queue.count_ready_jobs() == ready(1, 700)
    (claim,) = (await shard.claim()).claims
    assert await shard.queue.count_ready_jobs() == NOTHING
    await shard.settle(claim, LimitUse.COUNTED)
    await shard.at(2_699)
    assert await shard.queue.count_ready_jobs() == NOTHING
    # The next job is late from the end of the gap on, not from its due time.
    await shard.at(3_000)
    assert await shard.queue.count_ready_jobs() == ready(1, 300)


async def test_a_sender_without_a_gap_counts_up_to_its_places(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs(*((n, 0) for n in range(1, 9)))))
    assert await shard.queue.count_ready_jobs() == ready(3, 0)
    await shard.claim(2)
    assert await shard.queue.count_ready_jobs() == ready(1, 0)
    await shard.load(replace(NO_GAP, sender_id=8, jobs=jobs((20, 0), (21, 0))))
    assert await shard.queue.count_ready_jobs() == ready(3, 0)


@pytest.mark.parametrize(
    "held",
    [
        replace(SENDER, active=False),
        replace(SENDER, opening=(START_MS + 9_000, START_MS + 10_000)),
        replace(SENDER, cooldown=timedelta(seconds=60)),
    ],
    ids=["paused", "outside its hours", "cooling down"],
)
async def test_mail_that_a_limit_holds_back_is_not_ready(shard: Shard, held: Head) -> None:
    await shard.load(replace(held, jobs=jobs((1, 0))))
    await shard.at(5_000)
    assert await shard.queue.count_ready_jobs() == NOTHING


async def test_senders_beyond_those_that_are_examined_count_as_one_job_each(shard: Shard) -> None:
    await shard.load(
        *(
            replace(NO_GAP, sender_id=n, jobs=jobs((2 * n, 0), (2 * n + 1, 0)))
            for n in range(1, 251)
        )
    )
    assert (await shard.queue.count_ready_jobs()).count == 200 * 2 + 50


async def test_a_shard_that_redis_has_lost_is_incomplete(shard: Shard) -> None:
    await shard.redis.flushall()
    await shard.at(0)
    assert await shard.queue.count_ready_jobs() == replace(NOTHING, complete=False)


async def test_counting_changes_nothing(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0))))
    before = await shard.sender(), await shard.ready()
    await shard.queue.count_ready_jobs()
    assert (await shard.sender(), await shard.ready()) == before


async def test_a_claim_names_the_limit_that_made_its_job_wait(shard: Shard) -> None:
    await shard.load(replace(SENDER, hourly_limit=2, jobs=jobs(*((n, 0) for n in range(1, 4)))))

    async def send(at: int) -> str:
        await shard.at(at)
        (claim,) = (await shard.claim()).claims
        await shard.settle(claim, LimitUse.COUNTED)
        return claim.delayed_by

    assert await send(100) == ""
    assert await send(5_000) == "MIN_GAP"
    assert await send(3_600_100) == "HOURLY_LIMIT"
    hours = (START_MS + 3_700_000, START_MS + 9_000_000)
    await shard.load(replace(SENDER, sender_id=8, opening=hours, jobs=jobs((9, 0))))
    assert await send(3_700_500) == "SENDING_HOURS"
    cooling = replace(SENDER, sender_id=9, cooldown=timedelta(seconds=10), jobs=jobs((10, 0)))
    await shard.load(cooling)
    assert await send(3_720_000) == "COOLDOWN"


async def test_the_probe_of_a_circuit_waited_for_the_endpoint(shard: Shard) -> None:
    await shard.load(replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0), (2, 0), (3, 0), (4, 0))))
    for claim in (await shard.claim(3)).claims:
        await shard.settle(claim, LimitUse.BEGUN, connection_error="refused")
    await shard.at(6_000)
    (probe,) = (await shard.claim()).claims
    assert probe.delayed_by == "ENDPOINT_DOWN"
