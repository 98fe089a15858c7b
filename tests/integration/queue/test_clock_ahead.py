"""Redis' clock is ahead of PostgreSQL's: a mail is due by PostgreSQL's clock."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import pytest

from outbox_server.shared.queue.clock_difference import ClockDifference
from outbox_server.shared.queue.records import LimitUse
from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs

AHEAD_MS = 300_000


def learn(shard: Shard, ahead_ms: int = AHEAD_MS) -> None:
    shard.queue.learn_clocks(START_MS + ahead_ms, START_MS)


async def test_a_job_is_claimed_when_it_is_due_by_postgresqls_clock(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 60_000)), gap=timedelta(0)))
    learn(shard)
    assert await shard.claimed() == []
    assert await shard.ready() == {7: AHEAD_MS}
    await shard.at(AHEAD_MS - 1)
    assert await shard.claimed() == []
    assert (await shard.queue.count_ready_jobs()).count == 0

    await shard.at(AHEAD_MS)
    assert (await shard.queue.count_ready_jobs()).count == 1
    [claim] = (await shard.claim()).claims
    assert (claim.job.job_id, claim.waited) == (1, timedelta(0))
    assert await shard.ready() == {7: AHEAD_MS + 60_000}


async def test_a_job_that_was_claimed_too_early_waits_for_its_due_time(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 60_000)), gap=timedelta(0)))
    await shard.at(60_000)
    [claim] = (await shard.claim()).claims
    learn(shard)
    await shard.settle(claim, LimitUse.UNUSED, retry_at=60_000, give_back=True)

    # The next claim passes the difference to Redis. Only that claim finds no mail to send.
    assert await shard.claimed() == []
    assert await shard.ready() == {7: AHEAD_MS + 60_000}
    await shard.at(AHEAD_MS + 60_000)
    assert await shard.claimed() == [1]


async def test_sending_hours_begin_and_end_by_postgresqls_clock(shard: Shard) -> None:
    opening = (START_MS + 10_000, START_MS + 20_000)
    await shard.load(replace(SENDER, jobs=jobs((1, 0), (2, 0)), opening=opening))
    learn(shard)
    await shard.at(AHEAD_MS + 9_999)
    assert await shard.claimed() == []
    await shard.at(AHEAD_MS + 10_000)
    [claim] = (await shard.claim()).claims
    await shard.settle(claim)
    await shard.at(AHEAD_MS + 19_999)
    assert await shard.claimed() == [2]


async def test_a_clock_that_is_behind_changes_nothing(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    learn(shard, -AHEAD_MS)
    assert await shard.claimed() == [1]


async def test_the_difference_is_forgotten_when_a_life_ends(shard: Shard) -> None:
    """A step back of the clock ends a life."""
    learn(shard)
    await shard.redis.set(shard.prefix + "test:run", "second")
    await shard.queue.read_life()
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    assert [claim.job.job_id for claim in (await shard.queue.claim(1)).claims] == [1]


def test_the_largest_of_the_last_readings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    difference = ClockDifference()
    assert difference.ms() == 0
    difference.learn(40)
    now[0] += 30
    difference.learn(20)
    difference.learn(-5)
    assert difference.ms() == 40
    now[0] += 31
    assert difference.ms() == 20
    now[0] += 60
    assert difference.ms() == 0
