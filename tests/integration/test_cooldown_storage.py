"""Cooldowns in PostgreSQL: when one begins, when its backoff advances and when it ends."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AccountRefusal
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from tests.eventually import eventually
from tests.world import World

BACKOFF = (timedelta(minutes=5), timedelta(minutes=15), timedelta(hours=1))
DAY = timedelta(hours=24)
HOUR = timedelta(hours=1)
# The kinds of attempts, one letter each: accepted; refused by a reply that matches no rule; refused
# by a known reply; to be retried; abandoned by a dispatcher that died.
KINDS = {
    "S": (AttemptOutcome.SENT, ReplyClass.SENT),
    "R": (AttemptOutcome.PERMANENT_FAILURE, ReplyClass.REFUSED),
    "K": (AttemptOutcome.PERMANENT_FAILURE, ReplyClass.RECIPIENT),
    "T": (AttemptOutcome.TEMPORARY_FAILURE, ReplyClass.TEMPORARY),
    "L": (AttemptOutcome.LEASE_EXPIRED, None),
}


def refusal(
    sender: int, *, began: timedelta = timedelta(seconds=2), daily: bool = False, **more: Any
) -> AccountRefusal:
    """Return a refusal of an attempt that began `began` ago and ended a second ago."""
    return AccountRefusal(
        sender, began, timedelta(seconds=1), more.pop("message", "no"), daily=daily, **more
    )


async def cool_down(connection: AsyncConnection, refused: AccountRefusal) -> timedelta:
    left = await try_to_cool_down(connection, refused)
    assert left is not None
    return left


async def try_to_cool_down(
    connection: AsyncConnection, refused: AccountRefusal
) -> timedelta | None:
    return await storage.cool_down(connection, refused, backoff=BACKOFF, day=DAY)


async def cooldown(world: World, sender: int) -> Any:
    rows = await world.sql("SELECT * FROM cooldowns WHERE sender_id = %s", sender)
    return rows[0] if rows else None


async def move_probe(world: World, sender: int, ago: timedelta, refusals: int = 1) -> None:
    """Move the time of the next probe to `ago`."""
    await world.sql(
        "UPDATE cooldowns SET next_probe_at = now() - %s, refusals = %s WHERE sender_id = %s",
        ago,
        refusals,
        sender,
    )


async def attempt(
    world: World, sender: int, ago: timedelta, outcome: AttemptOutcome = AttemptOutcome.SENT
) -> None:
    await world.sql(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted) SELECT coalesce(max(email_job_id), 0) + 1, 1, %s, now() - %s, now() - %s, %s,"
        " true FROM attempts",
        sender,
        ago,
        ago,
        outcome,
    )


async def attempts(world: World, sender: int, kinds: str) -> None:
    """Record attempts, oldest first."""
    pairs = [KINDS[kind] for kind in kinds]
    await world.sql(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted, reply_class) SELECT 1000000 + n, 1, %s, now() - interval '1 day' + n *"
        " interval '1 second', now() - interval '1 day' + n * interval '1 second', outcome, true,"
        " reply FROM unnest(%s::smallint[], %s::smallint[]) WITH ORDINALITY"
        " AS each (outcome, reply, n)",
        sender,
        [int(outcome) for outcome, _ in pairs],
        [None if reply is None else int(reply) for _, reply in pairs],
    )


# Beginning -----------------------------------------------------------------------------------


async def test_the_first_refusal_begins_a_cooldown_with_its_reply(
    world: World, connection: AsyncConnection
) -> None:
    sender, other = await world.sender(), await world.sender()
    left = await cool_down(
        connection,
        refusal(sender, message="limit exceeded", smtp_code=550, enhanced_code="5.4.5"),
    )

    row = await cooldown(world, sender)
    assert (row.refusals, row.smtp_code, row.enhanced_code, row.message) == (
        1,
        550,
        "5.4.5",
        "limit exceeded",
    )
    # The wait counts from the end of the attempt, as a gap does.
    assert row.next_probe_at - row.since == BACKOFF[0]
    assert left <= BACKOFF[0] - timedelta(seconds=1)
    assert await cooldown(world, other) is None


async def test_sends_in_flight_at_the_refusal_change_nothing(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    first = await cool_down(connection, refusal(sender))
    before = await cooldown(world, sender)

    again = await cool_down(connection, refusal(sender, message="another"))

    assert await cooldown(world, sender) == before
    assert timedelta(0) < again <= first


async def test_only_one_of_two_concurrent_refusals_counts(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    async with world.engine.begin() as first, statements.connect() as second:
        await cool_down(first, refusal(sender, message="first"))
        waiting = asyncio.create_task(cool_down(second, refusal(sender, message="second")))

        async def blocked() -> bool:
            rows = await world.sql(
                "SELECT count(*) AS n FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return bool(rows[0].n)

        await eventually(blocked)
        await first.commit()
        left = await waiting

    row = await cooldown(world, sender)
    assert (row.refusals, row.message) == (1, "first")
    assert timedelta(0) < left <= BACKOFF[0]


# The backoff ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusals", "wait"), [(1, BACKOFF[1]), (2, BACKOFF[2]), (3, BACKOFF[2]), (500, BACKOFF[2])]
)
async def test_a_refused_probe_advances_the_backoff_and_its_last_value_repeats(
    world: World, connection: AsyncConnection, refusals: int, wait: timedelta
) -> None:
    sender = await world.sender()
    await cool_down(connection, refusal(sender, message="first", smtp_code=550))
    since = (await cooldown(world, sender)).since
    await move_probe(world, sender, timedelta(seconds=10), refusals)

    left = await cool_down(connection, refusal(sender, began=timedelta(seconds=5)))

    row = await cooldown(world, sender)
    assert (row.refusals, row.since) == (refusals + 1, since)
    assert (row.message, row.smtp_code) == ("no", None)
    assert wait - timedelta(minutes=1) < left <= wait - timedelta(seconds=1)


async def test_an_attempt_that_began_before_the_time_of_the_probe_does_not_advance_the_backoff(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    await cool_down(connection, refusal(sender))
    await move_probe(world, sender, timedelta(seconds=10))
    before = await cooldown(world, sender)

    # A slow reply: the attempt began before the first refusal was known.
    left = await cool_down(connection, refusal(sender, began=timedelta(seconds=15)))

    assert await cooldown(world, sender) == before
    assert left == timedelta(milliseconds=1), "its time has come: a probe may go"


# A daily quota -------------------------------------------------------------------------------


async def test_a_daily_quota_waits_until_the_oldest_send_has_left_the_day(
    world: World, connection: AsyncConnection
) -> None:
    sender, other = await world.sender(), await world.sender()
    for ago in (30, 20, 3):
        await attempt(world, sender, ago * HOUR)
    await attempt(world, sender, 23 * HOUR, AttemptOutcome.PERMANENT_FAILURE)
    await attempt(world, other, 22 * HOUR)

    left = await cool_down(connection, refusal(sender, daily=True))

    assert 4 * HOUR - timedelta(minutes=1) < left <= 4 * HOUR


async def test_a_daily_quota_refused_again_waits_for_the_send_that_is_oldest_then(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    await attempt(world, sender, 10 * HOUR)
    await cool_down(connection, refusal(sender))
    await move_probe(world, sender, timedelta(seconds=10))

    left = await cool_down(connection, refusal(sender, began=timedelta(seconds=5), daily=True))

    assert 14 * HOUR - timedelta(minutes=1) < left <= 14 * HOUR


@pytest.mark.parametrize("hours", [None, 30.0, 24 - 1 / 60])
async def test_a_daily_quota_never_waits_for_less_than_the_backoff(
    world: World, connection: AsyncConnection, hours: float | None
) -> None:
    sender = await world.sender()
    if hours is not None:
        await attempt(world, sender, hours * HOUR)

    left = await cool_down(connection, refusal(sender, daily=True))

    assert BACKOFF[0] - timedelta(minutes=1) < left <= BACKOFF[0]


# The end -------------------------------------------------------------------------------------


async def test_ending_cooldowns_returns_the_senders_that_had_one(
    world: World, connection: AsyncConnection
) -> None:
    cooling, other, stays = [await world.sender() for _ in range(3)]
    for sender in (cooling, stays):
        await cool_down(connection, refusal(sender))

    assert await storage.end_cooldowns(connection, [cooling, other]) == [cooling]
    assert await storage.end_cooldowns(connection, [cooling, other]) == []
    assert await cooldown(world, stays) is not None


async def test_the_next_cooldown_begins_at_the_first_step(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    await cool_down(connection, refusal(sender))
    await move_probe(world, sender, timedelta(seconds=10), refusals=3)
    await storage.end_cooldowns(connection, [sender])

    await cool_down(connection, refusal(sender))

    assert (await cooldown(world, sender)).refusals == 1


# Refusals that match no rule -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("", False),
        ("RR", False),
        ("RRR", True),
        ("RRRR", True),
        ("SRRR", True),
        ("RSRR", False),
        ("RRSR", False),
        ("RRRS", False),
        ("RRRSRR", False),
        # Known refusals neither count nor interrupt the sequence.
        ("RKRTRL", True),
        ("KRKKRK", False),
        ("KKK", False),
        ("RKSKRR", False),
    ],
)
async def test_only_refusals_in_a_row_are_counted(
    world: World, connection: AsyncConnection, kinds: str, found: bool
) -> None:
    sender, other = await world.sender(), await world.sender()
    await attempts(world, sender, kinds)
    await world.sql("UPDATE attempts SET email_job_id = email_job_id + 500000")
    await attempts(world, other, "RRRSSS" if found else "RRR")

    assert await storage.refused_in_a_row(connection, sender, 3) is found


@pytest.mark.parametrize(
    ("kinds", "limit", "found"),
    [
        ("RRR" + "K" * 997, 3, True),
        # The refusals are too long ago: the search is bounded.
        ("RRR" + "K" * 998, 3, False),
        # The maximum of the setting.
        ("R" * 1000, 1000, True),
        ("R" * 999, 1000, False),
    ],
)
async def test_the_search_for_refusals_is_bounded(
    world: World, connection: AsyncConnection, kinds: str, limit: int, found: bool
) -> None:
    sender = await world.sender()
    await attempts(world, sender, kinds)

    assert await storage.refused_in_a_row(connection, sender, limit) is found


async def test_a_deleted_sender_gets_no_cooldown(world: World, connection: AsyncConnection) -> None:
    """The sender's last mail was in flight when it was deleted, and is refused afterwards."""
    sender = await world.sender()
    await world.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)
    assert await try_to_cool_down(connection, refusal(sender)) is None
    assert await cooldown(world, sender) is None


async def test_storing_a_cooldown_does_not_wait_for_a_deletion_under_way(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    other = await world.connect()
    async with other.transaction():
        await other.execute("UPDATE senders SET deleted_at = now() WHERE id = %s", [sender])
        assert await try_to_cool_down(connection, refusal(sender)) is None
    await other.close()
    assert await cooldown(world, sender) is None


async def test_a_deletion_waits_for_a_cooldown_that_is_being_stored(
    world: World,
) -> None:
    sender = await world.sender()
    async with world.engine.begin() as storing:
        assert await cool_down(storing, refusal(sender))
        deletion = asyncio.create_task(
            world.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)
        )
        watcher = await world.connect()

        async def waits() -> bool:
            found = await watcher.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
            return bool(await found.fetchall())

        await eventually(waits)
    await deletion
    await watcher.close()
