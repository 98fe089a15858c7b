"""Sending hours in Redis: no claims outside of an opening; a load brings the next one."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from outbox_server.shared.forecast.openings import Openings
from outbox_server.shared.forecast.simulation import JobGroup, Limiter, simulate
from outbox_server.shared.sending_hours import SendingHours
from tests.integration.queue.shard import (
    PATIENCE_MS,
    SENDER,
    START_MS,
    Shard,
    jobs,
    milliseconds,
)

NO_GAP = replace(SENDER, gap=timedelta(0))


def opening(begins: int, ends: int) -> tuple[int, int]:
    return START_MS + begins, START_MS + ends


async def test_waiting_for_the_sending_hours_is_not_lateness(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0)), opening=opening(1_000, 5_000)))
    assert await shard.ready() == {SENDER.sender_id: 1_000}
    await shard.at(999)
    assert await shard.claimed() == []
    await shard.at(1_010)
    claimed = await shard.claim(1)
    assert [claim.job.job_id for claim in claimed.claims] == [1]
    assert claimed.claims[0].waited == timedelta(milliseconds=10)


async def test_after_the_loaded_opening_a_load_is_requested_and_no_job_is_claimed(
    shard: Shard,
) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 6_000)), opening=opening(0, 5_000)))
    # The job is due after the opening, so no look is needed before the opening ends.
    assert await shard.ready() == {SENDER.sender_id: 5_000}
    await shard.at(6_500)
    claimed = await shard.claim()
    assert (claimed.claims, claimed.loads) == ((), (SENDER.sender_id,))
    # The load is requested once; a dispatcher gets time to perform it.
    again = await shard.claim()
    assert (again.claims, again.loads) == ((), ())
    await shard.load(replace(NO_GAP, jobs=jobs((1, 6_000)), opening=opening(9_000, 12_000)))
    assert await shard.ready() == {SENDER.sender_id: 9_000}
    await shard.at(9_000)
    assert await shard.claimed() == [1]


async def test_no_due_job_is_claimed_after_the_end_of_an_opening(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0)), opening=opening(0, 5_000)))
    await shard.at(4_999)
    assert await shard.claimed(1) == [1]
    await shard.at(5_000)
    closed = await shard.claim()
    assert (closed.claims, closed.loads) == ((), (SENDER.sender_id,))
    # Until then no look is needed. Job 2 could have been claimed before the end.
    assert closed.next_look == timedelta(milliseconds=PATIENCE_MS)


async def test_a_sender_without_hours_sends_at_any_time(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0)), opening=opening(0, 1_000)))
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))), committed=True)
    await shard.at(2_000)
    assert await shard.claimed() == [1]


async def sends_of(shard: Shard, hours: SendingHours, dues: list[int], **limits: int) -> list[int]:
    """Let time pass until all is sent; no send takes time. Return the times in ms after START."""
    waiting = dict(enumerate(dues, 1))
    sends: list[int] = []

    async def load() -> None:
        opens = hours.opens(START_MS + shard.now)
        assert opens is not None
        head = replace(
            SENDER,
            hourly_limit=limits["limit"],
            gap=milliseconds(limits["gap"]),
            jobs=jobs(*waiting.items()),
            opening=(opens, hours.closes(opens)),
        )
        await shard.load(head)

    await load()
    while waiting:
        found = await shard.claim()
        for claim in found.claims:
            sends.append(shard.now)
            del waiting[claim.job.job_id]
            await shard.settle(claim)
        if found.loads:
            await load()
        elif not found.claims:
            assert found.next_look
            await shard.at(shard.now + found.next_look / milliseconds(1))
    return sends


@pytest.mark.parametrize("seed", range(6))
async def test_sends_across_clock_changes_match_the_forecast(shard: Shard, seed: int) -> None:
    chance = random.Random(seed)
    # The clocks of Berlin, New York and Lord Howe (half an hour) change within the next days.
    zone, change = (
        ("Europe/Berlin", datetime(2027, 3, 27, 12, tzinfo=UTC)),
        ("America/New_York", datetime(2027, 11, 6, 12, tzinfo=UTC)),
        ("Australia/Lord_Howe", datetime(2027, 4, 2, 12, tzinfo=UTC)),
    )[seed % 3]
    start = int(change.timestamp() * 1_000) - START_MS + chance.randrange(86_400_000)
    opens = chance.randrange(24 * 60)
    weekdays = frozenset(chance.sample(range(1, 8), chance.choice([0, 4])))
    hours = SendingHours(weekdays, opens, (opens + chance.choice([40, 90, 600])) % 1_440, zone)
    limits = {"limit": chance.randrange(3, 9), "gap": chance.choice([0, 2_000, 900_000])}
    dues = sorted(start + chance.choice([0, chance.randrange(3 * 86_400_000)]) for _ in range(60))
    await shard.at(start)

    sends = await sends_of(shard, hours, dues, **limits)

    limiter = Limiter(limits["limit"], limits["gap"] * 1_000, 3_600_000_000, hours=Openings(hours))
    groups = [JobGroup((START_MS + due) * 1_000) for due in dues]
    for number, send in enumerate(sends):
        asked = [*groups[:number], replace(groups[number], mine=1)]
        assert (
            simulate(limiter, asked, (START_MS + start) * 1_000).last == (START_MS + send) * 1_000
        )
