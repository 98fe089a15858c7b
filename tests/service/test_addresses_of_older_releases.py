"""Addresses are compared exactly, and what an older release has suppressed stays suppressed.

Releases before schema 0014 compared addresses by case folding. Their rows have folded keys alone.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import pytest_asyncio
from outbox.v1 import sender_pb2
from outbox.v1.batch_service_pb2 import ScheduleBatchResponse
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import (
    CreateSuppressionRequest,
    DeleteSuppressionRequest,
    EraseRecipientRequest,
    ListSuppressionsRequest,
)

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.states import JobState
from tests.marked_jobs import mark_refs, refs
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

SHARP, DOUBLE = "info@fußball.de", "info@fussball.de"
BOTH = f"email\n{SHARP}\n{DOUBLE}\n"
# How an older release decides whether a job is suppressed.
_THEIRS = (
    "SELECT count(*) FROM email_jobs j JOIN batches b ON b.id = j.batch_id JOIN suppressions s"
    " ON s.user_id = b.user_id AND s.address = coalesce(j.recipient_key, lower(j.recipient))"
    " WHERE j.recipient = %s"
)


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


async def suppress(scheduler: Scheduler, email: str) -> str:
    request = CreateSuppressionRequest(user_id="ann", suppression=Suppression(email=email))
    return (await scheduler.suppressions.CreateSuppression(request)).email


async def allow(scheduler: Scheduler, email: str) -> None:
    await scheduler.suppressions.DeleteSuppression(
        DeleteSuppressionRequest(user_id="ann", email=email)
    )


async def listed(scheduler: Scheduler) -> list[str]:
    request = ListSuppressionsRequest(user_id="ann")
    answer = await scheduler.suppressions.ListSuppressions(request)
    return [one.email for one in answer.suppressions]


def suppress_as_an_older_release(scheduler: Scheduler, email: str) -> None:
    scheduler.execute(
        "INSERT INTO suppressions (user_id, address) VALUES ('ann', %s) ON CONFLICT DO NOTHING",
        email.casefold(),
    )


def taken(scheduler: Scheduler, answer: ScheduleBatchResponse) -> list[str]:
    rows = scheduler.rows(
        "SELECT recipient FROM email_jobs WHERE batch_id = %s ORDER BY id",
        int(answer.batch.batch_id),
    )
    assert answer.batch.accepted_count == len(rows)
    assert answer.batch.suppressed_count == 2 - len(rows)
    return [recipient for (recipient,) in rows]


async def marked(scheduler: Scheduler, *, of_older_release: bool = False) -> list[str]:
    """Mark all jobs as a dispatcher does, and return the recipients of those that it sends."""
    if of_older_release:
        scheduler.execute("UPDATE email_jobs SET address_key = NULL")
    jobs = dict(scheduler.rows("SELECT id, recipient FROM email_jobs WHERE state = 1"))
    engine = create_engine(scheduler.settings)
    try:
        async with engine.begin() as connection:
            found = await mark_refs(connection, refs(list(jobs)), timedelta(minutes=1))
    finally:
        await engine.dispose()
    return sorted(jobs[each.job.job_id] for each in found)


@pytest.mark.parametrize(("email", "other"), [(SHARP, DOUBLE), (DOUBLE, SHARP)])
async def test_a_suppression_covers_its_address_alone(
    scheduler: Scheduler, sender: sender_pb2.Sender, email: str, other: str
) -> None:
    waiting = await scheduler.schedule(sender, BOTH)
    assert taken(scheduler, waiting) == [SHARP, DOUBLE]
    assert await suppress(scheduler, email.replace("info", "INFO")) == email
    assert await listed(scheduler) == [email]
    # The job that waited, a new batch, and the look of the dispatcher.
    states = dict(scheduler.rows("SELECT recipient, state FROM email_jobs"))
    assert states == {email: JobState.SUPPRESSED, other: JobState.SCHEDULED}
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [other]
    scheduler.execute("UPDATE email_jobs SET state = 1, finished_at = NULL")
    assert set(await marked(scheduler)) == {other}
    await allow(scheduler, email)
    assert await listed(scheduler) == []
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [SHARP, DOUBLE]
    assert scheduler.value("SELECT count(*) FROM suppressions") == 0


async def test_both_addresses_can_be_suppressed_and_allowed_one_by_one(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    for order in ((SHARP, DOUBLE), (DOUBLE, SHARP)):
        for email in order:
            assert await suppress(scheduler, email) == email
        assert await listed(scheduler) == [DOUBLE, SHARP]
        await allow(scheduler, order[0])
        assert await listed(scheduler) == [order[1]]
        assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [order[0]]
        await allow(scheduler, order[1])


@pytest.mark.parametrize("email", [SHARP, DOUBLE])
async def test_what_an_older_release_has_suppressed_stays_suppressed(
    scheduler: Scheduler, sender: sender_pb2.Sender, email: str
) -> None:
    await scheduler.schedule(sender, BOTH)
    suppress_as_an_older_release(scheduler, email)
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == []
    assert await marked(scheduler) == []
    assert await listed(scheduler) == [DOUBLE]
    # It is kept if one of the addresses is suppressed again.
    assert await suppress(scheduler, SHARP) == DOUBLE
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == []


async def test_a_suppression_of_an_older_release_can_be_narrowed_to_one_address(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    suppress_as_an_older_release(scheduler, SHARP)
    await allow(scheduler, SHARP)
    assert await listed(scheduler) == [DOUBLE]
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [SHARP]
    suppress_as_an_older_release(scheduler, SHARP)
    await allow(scheduler, DOUBLE)
    assert await listed(scheduler) == []
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [SHARP, DOUBLE]


async def test_a_job_of_an_older_release_is_covered_as_it_was_there(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.schedule(sender, BOTH)
    scheduler.execute("INSERT INTO suppressions (user_id, address) VALUES ('ann', %s)", DOUBLE)
    assert await marked(scheduler, of_older_release=True) == []
    scheduler.execute("DELETE FROM suppressions")
    scheduler.execute("UPDATE email_jobs SET state = 1, finished_at = NULL")
    await suppress(scheduler, SHARP)
    scheduler.execute("UPDATE email_jobs SET state = 1, finished_at = NULL")
    assert await marked(scheduler, of_older_release=True) == [DOUBLE]


async def test_an_older_release_finds_the_suppressions_of_this_one(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.schedule(sender, BOTH)
    for email in (SHARP, DOUBLE, "jürgen@example.com"):
        await suppress(scheduler, email)
        await scheduler.schedule(sender, f"email\n{email}\nx@example.com\n")
        assert scheduler.value(_THEIRS, email) > 0 or email != SHARP
        await allow(scheduler, email)
        assert scheduler.value(_THEIRS, email) == 0


@pytest.mark.parametrize("stored", [False, True])
async def test_an_erased_address_stays_suppressed_exactly(
    scheduler: Scheduler, sender: sender_pb2.Sender, *, stored: bool
) -> None:
    await scheduler.schedule(sender, BOTH)
    if stored:
        await suppress(scheduler, SHARP)
    erased = await scheduler.suppressions.EraseRecipient(
        EraseRecipientRequest(user_id="ann", email=SHARP)
    )
    assert erased.erased_count == 1
    assert scheduler.rows("SELECT recipient FROM email_jobs ORDER BY id") == [("",), (DOUBLE,)]
    assert [one.startswith("erased:") for one in await listed(scheduler)] == [True]
    plain = "SELECT count(*) FROM suppressions WHERE address LIKE '%%fu%%'"
    assert scheduler.value(plain) == 0
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [DOUBLE]
    await allow(scheduler, SHARP)
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [SHARP, DOUBLE]
    assert scheduler.value("SELECT count(*) FROM suppressions") == 0


async def test_an_erasure_keeps_what_an_older_release_has_suppressed(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    suppress_as_an_older_release(scheduler, SHARP)
    await scheduler.suppressions.EraseRecipient(EraseRecipientRequest(user_id="ann", email=SHARP))
    plain = "SELECT count(*) FROM suppressions WHERE address LIKE '%%fu%%'"
    assert scheduler.value(plain) == 0
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == []


async def test_suppressions_that_come_during_an_intake_are_exact(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    """They are new, so that the check right before the commit looks at them too."""
    await suppress(scheduler, SHARP)
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == [DOUBLE]
    await allow(scheduler, SHARP)
    scheduler.execute(
        "INSERT INTO suppressions (user_id, address, created_at) VALUES ('ann', %s, now())", DOUBLE
    )
    assert taken(scheduler, await scheduler.schedule(sender, BOTH)) == []


async def test_domains_of_private_networks_are_refused_if_the_operator_says_so(
    database_url: str, redis_url: str
) -> None:
    csv = "email\nann@corp.local\nbob@example.com\n"
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender(email="news@nas.home.arpa")
        assert (await scheduler.schedule(sender, csv)).batch.accepted_count == 2
    async with running_scheduler(database_url, redis_url, special_domains="refuse") as scheduler:
        refused = await refusal_of(scheduler.sender(email="news@corp.local"))
        assert (refused.reason, list(refused.violations)) == ("ADDRESS_INVALID", ["sender.email"])
        # The sender exists, and its recipients are checked.
        answer = await scheduler.schedule(sender, csv)
        assert [one.reason for one in answer.rejections] == ["ADDRESS_INVALID"]
