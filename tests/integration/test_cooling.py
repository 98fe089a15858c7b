"""Cooldowns from the record of an attempt to Redis, with interruptions of any kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.services.dispatcher.cooling import CooldownRules, Signal, record_cooldowns
from outbox_server.services.dispatcher.ended_claims import EndedAttempt
from outbox_server.services.dispatcher.outcomes import OutcomeRules
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.smtp import SendResult
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass
from tests.conftest import Stores
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.lost_answers import LostAnswers
from tests.marked_jobs import mark_refs
from tests.world import World

LEASE = timedelta(minutes=1)
FIRST, SECOND = timedelta(minutes=5), timedelta(minutes=15)
ACCEPTED = (AttemptOutcome.SENT, ReplyClass.SENT)
ACCOUNT = (AttemptOutcome.TEMPORARY_FAILURE, ReplyClass.ACCOUNT)
REFUSED = (AttemptOutcome.PERMANENT_FAILURE, ReplyClass.REFUSED)
RECIPIENT = (AttemptOutcome.PERMANENT_FAILURE, ReplyClass.RECIPIENT)
Sent = tuple[Claim, MarkedJob]


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    values = options(
        database_url,
        redis_url,
        "smtp://127.0.0.1:1",
        lease="60s",
        cooldown="5m,15m,1h",
        refusals_in_a_row=3,
    )
    async with World(settings_of(values)) as world:
        yield world


async def begin(world: World, statements: AsyncEngine, want: int = 1) -> list[Sent]:
    """Claim and mark the mail that may be sent."""
    claims = (await world.queues[0].claim(want)).claims
    async with statements.connect() as connection:
        marked = await mark_refs(connection, [claim.job for claim in claims], LEASE)
    by_job = {each.job: each for each in marked}
    return [(claim, by_job[claim.job]) for claim in claims]


def ended(
    world: World,
    sent: Sent,
    how: tuple[AttemptOutcome, ReplyClass],
    *,
    daily: bool = False,
    began: float = 0.0,
) -> EndedAttempt:
    """Return the outcome of a send that began `began` seconds ago."""
    now = time.monotonic()
    result = SendResult(
        how[0],
        body_begun=False,
        started=now - began,
        ended=now,
        smtp_code=250 if how is ACCEPTED else 550,
        message="the reply",
        reply_class=how[1],
        daily=daily,
    )
    return OutcomeRules(world.settings).ended(*sent, result, late=timedelta(0), server="x.test:25")


async def settle(
    world: World,
    statements: AsyncEngine,
    *outcomes: EndedAttempt,
    transactions: Any = None,
    loader: HeadLoader | None = None,
) -> None:
    settler = Settler(
        statements,
        cast(AsyncEngine, transactions or world.engine),
        loader or world.loader,
        Slots(len(outcomes), unproven=2),
        CooldownRules.from_settings(world.settings),
    )
    for outcome in outcomes:
        settler.settle(outcome)
    settler.close()
    async with asyncio.timeout(PATIENCE):
        await settler.run()


async def cooldown(world: World) -> Any:
    rows = await world.sql("SELECT *, next_probe_at - now() AS wait FROM cooldowns")
    return rows[0] if rows else None


async def probe_in(world: World, sender: int) -> timedelta | None:
    """Return the wait in Redis for the sender's next probe, or None if the sender may send."""
    found = await world.redis.hget(
        world.queues[0].keys.ready.replace("ready", f"sender:{sender}"), "cool"
    )
    if not found or not int(found):
        return None
    return timedelta(milliseconds=int(found) - time.time() * 1000)


async def let_probe(world: World, sender: int) -> None:
    """Move the time of the next probe to now."""
    await world.sql("UPDATE cooldowns SET next_probe_at = now() - interval '1 second'")
    await world.loader.load([sender], committed=True)

    async def known() -> bool:
        return (await world.queues[0].claim(0)).next_look == timedelta(0)

    await eventually(known)


def about(wait: timedelta | None, expected: timedelta) -> bool:
    return wait is not None and expected - timedelta(minutes=1) < wait <= expected


async def test_a_refused_account_cools_down_in_both_stores_and_its_mail_waits(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    [job, _] = await world.schedule(sender, 2)
    [sent] = await begin(world, statements)
    await settle(world, statements, ended(world, sent, ACCOUNT))

    assert about((await cooldown(world)).wait, FIRST)
    assert about(await probe_in(world, sender), FIRST)
    assert await begin(world, statements) == []
    row = await world.job(job)
    assert (row.state, row.failures) == (JobState.SCHEDULED, 0)
    # The marker that requested a load was deleted with it.
    assert await world.sql("TABLE head_markers") == []


async def test_only_one_of_many_refusals_in_flight_counts(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 5)
    sends = await begin(world, statements, 5)
    await settle(world, statements, *(ended(world, sent, ACCOUNT) for sent in sends[:3]))
    await settle(world, statements, ended(world, sends[3], ACCOUNT, began=1.0))
    await settle(world, statements, ended(world, sends[4], ACCEPTED, began=1.0))

    row = await cooldown(world)
    assert row.refusals == 1
    assert about(row.wait, FIRST)
    assert about(await probe_in(world, sender), FIRST)


async def test_a_refused_probe_advances_the_backoff_and_an_accepted_one_ends_the_cooldown(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 3)
    [sent] = await begin(world, statements)
    await settle(world, statements, ended(world, sent, ACCOUNT))
    await let_probe(world, sender)
    [probe] = await begin(world, statements, 5)
    assert probe[0].probe
    # An unknown reply to a probe also concerns the account: its mail does not fail.
    await settle(world, statements, ended(world, probe, REFUSED))
    assert about((await cooldown(world)).wait, SECOND)
    assert about(await probe_in(world, sender), SECOND)
    assert (await world.job(probe[1].job.job_id)).state == JobState.SCHEDULED

    await let_probe(world, sender)
    [probe] = await begin(world, statements, 5)
    await settle(world, statements, ended(world, probe, ACCEPTED))
    assert await cooldown(world) is None
    assert await probe_in(world, sender) is None
    assert len(await begin(world, statements, 5)) == 2


async def test_a_daily_quota_waits_for_the_oldest_send_of_the_day(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 2)
    first, second = await begin(world, statements, 2)
    await settle(world, statements, ended(world, first, ACCEPTED))
    await world.sql(
        "UPDATE attempts SET started_at = started_at - interval '20 hours',"
        " ended_at = ended_at - interval '20 hours'"
    )
    await settle(world, statements, ended(world, second, ACCOUNT, daily=True))

    assert about((await cooldown(world)).wait, timedelta(hours=4))
    assert about(await probe_in(world, sender), timedelta(hours=4))


async def test_the_last_of_the_unknown_refusals_in_a_row_begins_a_cooldown(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 9)
    for how in (REFUSED, REFUSED, ACCEPTED, REFUSED, RECIPIENT, REFUSED):
        [sent] = await begin(world, statements)
        await settle(world, statements, ended(world, sent, how))
        assert await cooldown(world) is None
    [sent] = await begin(world, statements)
    await settle(world, statements, ended(world, sent, REFUSED))

    assert about((await cooldown(world)).wait, FIRST)
    assert about(await probe_in(world, sender), FIRST)
    # Mail that was refused permanently is not retried; waiting mail waits.
    assert (await world.states())[JobState.FAILED] == 6
    assert await begin(world, statements, 5) == []


async def test_refusals_that_are_recorded_together_are_counted_together(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 4)
    sends = await begin(world, statements, 4)
    await settle(world, statements, *(ended(world, sent, REFUSED) for sent in sends))

    assert (await cooldown(world)).refusals == 1
    assert about(await probe_in(world, sender), FIRST)


async def test_a_refused_probe_advances_the_backoff_even_with_an_older_refusal(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 2)
    [sent] = await begin(world, statements)
    await settle(world, statements, ended(world, sent, ACCOUNT))
    await let_probe(world, sender)
    [probe] = await begin(world, statements)
    refused = ended(world, probe, ACCOUNT)
    # The mail was in flight when the sender was first refused.
    older = replace(refused.record, job=sent[1].job, started=refused.record.started - 60)
    async with world.engine.begin() as connection:
        waits = await record_cooldowns(
            connection,
            [(older, Signal(refused=True)), (refused.record, refused.signal)],
            CooldownRules.from_settings(world.settings),
            time.monotonic(),
        )

    assert (await cooldown(world)).refusals == 2
    assert about(waits[probe[1].job], SECOND)


async def test_a_cooldown_whose_commit_got_no_answer_holds_and_is_known_at_once(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 5)
    sends = await begin(world, statements, 3)
    lost = LostAnswers(world.engine)
    outcomes = [ended(world, sent, REFUSED) for sent in sends]
    await settle(world, statements, *outcomes, transactions=lost)

    assert lost.lost == 1
    assert (await cooldown(world)).refusals == 1
    assert len(await world.sql("TABLE attempts")) == 3
    # Without waiting until the marker is old.
    assert about(await probe_in(world, sender), FIRST)


async def test_an_end_of_a_cooldown_whose_commit_got_no_answer_is_known_at_once(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 3)
    [sent] = await begin(world, statements)
    await settle(world, statements, ended(world, sent, ACCOUNT))
    await let_probe(world, sender)
    [probe] = await begin(world, statements)
    lost = LostAnswers(world.engine)
    await settle(world, statements, ended(world, probe, ACCEPTED), transactions=lost)

    assert lost.lost == 1
    assert await cooldown(world) is None
    assert await probe_in(world, sender) is None


async def test_a_cooldown_that_did_not_reach_redis_is_found_by_its_marker(
    world: World, statements: AsyncEngine, stores: Stores
) -> None:
    sender = await world.sender()
    await world.schedule(sender, 3)
    async with TcpProxy(lambda: stores.redis.port) as proxy:
        url = world.settings.redis_url.replace(f":{stores.redis.port}/", f":{proxy.port}/")
        settings = world.settings.model_copy(update={"redis_url": url})
        async with connect(settings) as redis:
            loader = HeadLoader(world.engine, open_queues(redis, settings), settings)
            [sent] = await begin(world, statements)
            proxy.refuse()
            await settle(world, statements, ended(world, sent, ACCOUNT), loader=loader)
    assert await probe_in(world, sender) is None
    assert about((await cooldown(world)).wait, FIRST)

    await world.sql("UPDATE head_markers SET created_at = now() - interval '1 minute'")
    assert await world.loader.load_abandoned() == [sender]
    assert about(await probe_in(world, sender), FIRST)


async def test_two_dispatchers_whose_senders_are_refused_at_once_do_not_wait_for_each_other(
    world: World, statements: AsyncEngine
) -> None:
    senders = [await world.sender() for _ in range(4)]
    for sender in senders:
        await world.schedule(sender, 4)
    sends = await begin(world, statements, 16)
    outcomes = [ended(world, sent, ACCOUNT) for sent in sends]
    # Each dispatcher has mails of all senders, in another order.
    await asyncio.gather(
        settle(world, statements, *outcomes[0::2]),
        settle(world, statements, *reversed(outcomes[1::2])),
    )

    rows = await world.sql("SELECT sender_id, refusals FROM cooldowns ORDER BY 1")
    assert [(row.sender_id, row.refusals) for row in rows] == [(sender, 1) for sender in senders]
