"""EraseRecipient: no table and no key in Redis has data of the person, and counts do not change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from outbox.v1 import (
    batch_service_pb2,
    email_job_service_pb2,
    sender_pb2,
    suppression_service_pb2,
)
from outbox.v1.suppression_pb2 import Suppression
from psycopg import sql
from redis.asyncio import Redis

from outbox_server.services.scheduler.erasing import contains_address
from outbox_server.services.scheduler.storage.erasing import erase_jobs, suppress_erased
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import JobState
from tests import cooldowns
from tests.marked_jobs import mark_refs
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

ADDRESS = "Ann.Secret@example.com"
SPELLINGS = (ADDRESS, "ann.secret@EXAMPLE.com", "ANN.SECRET@example.com")
# Texts that must not be found, in lower case: parts of the address, and a variable of the person.
TRACES = ("ann.secret", "annas-city")


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url) as scheduler:
        yield scheduler


async def erase(
    scheduler: Scheduler, email: str = ADDRESS, user_id: str = "ann"
) -> suppression_service_pb2.EraseRecipientResponse:
    return await scheduler.suppressions.EraseRecipient(
        suppression_service_pb2.EraseRecipientRequest(user_id=user_id, email=email)
    )


def traces_in_postgresql(scheduler: Scheduler) -> list[str]:
    """Return the rows of all tables that contain a trace, as text or bytes."""
    found = []
    tables = scheduler.rows(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    )
    assert len(tables) > 15
    for (table,) in tables:
        statement = sql.SQL("SELECT lower(t::text) FROM {} t").format(sql.Identifier(table))
        for (row,) in scheduler.rows(statement.as_string()):
            wanted = [*TRACES, *(trace.encode().hex() for trace in TRACES)]
            found += [f"{table}: {row}" for trace in wanted if trace in row]
    return found


async def traces_in_redis(redis: Redis) -> list[str]:
    """Return the keys and values of Redis that contain a trace."""
    texts = []
    read: dict[bytes, Any] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        b"set": redis.smembers,
        b"list": lambda key: redis.lrange(key, 0, -1),
    }
    async for key in redis.scan_iter():
        kind: Any = await redis.type(key)
        texts.append(f"{key!r} {await read[kind](key)!r}".lower())
    assert texts
    return [text for text in texts if any(trace in text for trace in TRACES)]


async def schedule_her(scheduler: Scheduler, sender: sender_pb2.Sender) -> list[int]:
    """Schedule mail to the person in several ways, and to others; return the person's jobs."""
    rows = "".join(f"{email},Annas-City,\n" for email in SPELLINGS)
    csv = f"email,city,\n{rows}bo@example.com,Rome,\n"
    csv += f'"{ADDRESS}, bo@example.com",Annas-City,\n'
    shared = await scheduler.schedule(sender, csv, subject="{{ city }}", duplicates=2)
    assert shared.batch.rejected_count == 1
    for cancelled in (False, True):
        single = await scheduler.schedule(
            sender,
            f"email\n{ADDRESS}\n",
            subject=f"For {ADDRESS}",
            body=f"Dear {ADDRESS}",
            html=f"<p>{ADDRESS}</p>",
            request_id=f"welcome-{ADDRESS}-{cancelled}",
        )
        if cancelled:
            await scheduler.batches.CancelBatch(
                batch_service_pb2.CancelBatchRequest(batch_id=single.batch.batch_id)
            )
    found = scheduler.rows(
        "SELECT id FROM email_jobs WHERE sender_id = %s AND lower(recipient) = %s ORDER BY id",
        int(sender.sender_id),
        ADDRESS.lower(),
    )
    return [job_id for (job_id,) in found]


def end(scheduler: Scheduler, job_id: int, state: JobState) -> None:
    """End a job with a reply that contains the address."""
    scheduler.end_jobs(state, "id = %s", job_id)
    scheduler.refuse_jobs(f"<{ADDRESS}>: no such user", "id = %s", job_id)


async def counts(scheduler: Scheduler, sender: sender_pb2.Sender) -> list[Any]:
    listed = await scheduler.batches.ListBatches(
        batch_service_pb2.ListBatchesRequest(user_id="ann", sender_id=sender.sender_id)
    )
    return [(batch.batch_id, batch.accepted_count, batch.counts) for batch in listed.batches]


async def test_nothing_of_an_erased_person_is_left(scheduler: Scheduler, redis: Redis) -> None:
    sender = await scheduler.sender("ann")
    waiting, failed, uncertain, sent, *_ = await schedule_her(scheduler, sender)
    end(scheduler, failed, JobState.FAILED)
    end(scheduler, uncertain, JobState.UNCERTAIN)
    end(scheduler, sent, JobState.SENT)
    cooldowns.begin(scheduler.execute, sender.sender_id, message=f"no quota for {ADDRESS}")
    await scheduler.suppressions.CreateSuppression(
        suppression_service_pb2.CreateSuppressionRequest(
            user_id="ann", suppression=Suppression(email=ADDRESS, reason=f"{ADDRESS} asked")
        )
    )
    before = await counts(scheduler, sender)
    assert traces_in_postgresql(scheduler)

    answer = await erase(scheduler, SPELLINGS[1])

    assert traces_in_postgresql(scheduler) == []
    assert await traces_in_redis(redis) == []
    assert (answer.erased_count, answer.rejection_count, answer.in_flight_count) == (5, 1, 0)
    assert await counts(scheduler, sender) == before
    # All data of the other recipients remains.
    others = scheduler.rows("SELECT recipient, variables FROM email_jobs WHERE recipient <> ''")
    assert others == [("bo@example.com", '["Rome"]')]
    job = await scheduler.jobs.GetEmailJob(
        email_job_service_pb2.GetEmailJobRequest(email_job_id=str(sent))
    )
    assert (job.recipient, job.attempt_count) == ("", 1)
    attempts = await scheduler.jobs.ListAttempts(
        email_job_service_pb2.ListAttemptsRequest(email_job_id=str(failed))
    )
    assert [attempt.smtp_code for attempt in attempts.attempts] == [550]
    assert scheduler.value("SELECT state FROM email_jobs WHERE id = %s", waiting) == 7
    again = await erase(scheduler)
    assert (again.erased_count, again.rejection_count) == (0, 0)
    assert again.suppression == answer.suppression


async def test_waiting_mail_to_an_erased_person_is_never_sent(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.schedule(sender, f"email\n{ADDRESS}\nbo@example.com\n")
    answer = await erase(scheduler)
    assert (answer.suppressed_count, answer.erased_count) == (1, 1)
    states = scheduler.rows("SELECT recipient, state FROM email_jobs ORDER BY id")
    assert states == [("", JobState.SUPPRESSED), ("bo@example.com", JobState.SCHEDULED)]


@pytest.mark.parametrize("email", SPELLINGS)
async def test_an_erased_address_stays_suppressed(scheduler: Scheduler, email: str) -> None:
    sender = await scheduler.sender("ann")
    await erase(scheduler)
    accepted = await scheduler.schedule(sender, f"email\n{email}\nbo@example.com\n")
    assert (accepted.batch.suppressed_count, accepted.batch.accepted_count) == (1, 1)
    # The address is checked again when a job is marked, in case an intake missed it.
    scheduler.execute("UPDATE email_jobs SET recipient = %s", email)
    job_id = scheduler.value("SELECT id FROM email_jobs")
    engine = create_engine(scheduler.settings, lookups_only=True)
    async with engine.begin() as connection:
        lease = scheduler.settings.lease
        assert await mark_refs(connection, [JobRef(job_id, 1)], lease) == []
    await engine.dispose()
    assert scheduler.value("SELECT state FROM email_jobs") == JobState.SUPPRESSED


async def test_an_erasure_by_one_user_does_not_affect_another_user(scheduler: Scheduler) -> None:
    bob = await scheduler.sender("bob")
    await scheduler.schedule(bob, f"email\n{ADDRESS}\n")
    await erase(scheduler)
    assert scheduler.rows("SELECT recipient, state FROM email_jobs") == [
        ("Ann.Secret@example.com", JobState.SCHEDULED)
    ]
    accepted = await scheduler.schedule(bob, f"email\n{ADDRESS}\n")
    assert accepted.batch.suppressed_count == 0
    await erase(scheduler, user_id="bob")
    assert traces_in_postgresql(scheduler) == []
    hashes = scheduler.rows("SELECT user_id, address FROM suppressions ORDER BY 1")
    assert [user for user, _ in hashes] == ["ann", "bob"]
    assert len({address for _, address in hashes}) == 2


async def test_a_suppression_can_be_removed_by_its_address(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    kept = (await erase(scheduler)).suppression
    made = await scheduler.suppressions.CreateSuppression(
        suppression_service_pb2.CreateSuppressionRequest(
            user_id="ann", suppression=Suppression(email=ADDRESS)
        )
    )
    # The hash is sufficient: the address is not stored again.
    assert made == kept
    await scheduler.suppressions.DeleteSuppression(
        suppression_service_pb2.DeleteSuppressionRequest(user_id="ann", email=ADDRESS)
    )
    accepted = await scheduler.schedule(sender, f"email\n{ADDRESS}\n")
    assert accepted.batch.accepted_count == 1


async def test_mail_that_is_being_sent_is_erased_by_the_next_call(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.schedule(sender, f"email\n{ADDRESS}\n")
    scheduler.execute(
        "UPDATE email_jobs SET state = 2, lease_until = now() + interval '1 minute', attempt = 1"
    )
    answer = await erase(scheduler)
    assert (answer.erased_count, answer.in_flight_count) == (0, 1)
    end(scheduler, scheduler.value("SELECT id FROM email_jobs"), JobState.SENT)
    answer = await erase(scheduler)
    assert (answer.erased_count, answer.in_flight_count) == (1, 0)
    assert traces_in_postgresql(scheduler) == []


async def test_mail_that_ends_during_the_call_is_erased_by_the_next_call(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.schedule(sender, f"email\n{ADDRESS}\n")
    scheduler.execute(
        "UPDATE email_jobs SET state = 2, lease_until = now() + interval '1 minute', attempt = 1"
    )
    # The call erases replies of cooldowns after the jobs: by then the mail is sent.
    await scheduler.define(
        "CREATE FUNCTION end_mail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now()"
        " WHERE state = 2; RETURN NULL; END $$"
    )
    try:
        await scheduler.define(
            "CREATE TRIGGER ends AFTER UPDATE ON cooldowns EXECUTE FUNCTION end_mail()"
        )
        answer = await erase(scheduler)
    finally:
        await scheduler.define("DROP FUNCTION end_mail CASCADE")
    assert (answer.erased_count, answer.in_flight_count) == (0, 1)
    answer = await erase(scheduler)
    assert (answer.erased_count, answer.in_flight_count) == (1, 0)
    assert traces_in_postgresql(scheduler) == []


async def test_an_erased_job_is_never_sent_again(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    accepted = await scheduler.schedule(sender, f"email\n{ADDRESS}\n{ADDRESS}\n", duplicates=2)
    failed, uncertain = (
        job_id for (job_id,) in scheduler.rows("SELECT id FROM email_jobs ORDER BY id")
    )
    end(scheduler, failed, JobState.FAILED)
    end(scheduler, uncertain, JobState.UNCERTAIN)
    await erase(scheduler)
    retried = await scheduler.jobs.RetryEmailJobs(
        email_job_service_pb2.RetryEmailJobsRequest(batch_id=accepted.batch.batch_id)
    )
    assert retried.retried_count == 0
    resend = email_job_service_pb2.UNCERTAIN_RESOLUTION_RESEND
    refusal = await refusal_of(
        scheduler.jobs.ResolveEmailJob(
            email_job_service_pb2.ResolveEmailJobRequest(
                email_job_id=str(uncertain), resolution=resend
            )
        )
    )
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RECIPIENT_ERASED")


async def test_letters_beyond_ascii_are_found_in_any_case(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    await scheduler.schedule(
        sender, "email\nÄnn.Secret@example.com\nänn.Secret@example.com\n", duplicates=2
    )
    answer = await erase(scheduler, "ÄNN.secret@example.com")
    assert answer.erased_count == 2
    assert scheduler.value("SELECT count(*) FROM email_jobs WHERE recipient <> ''") == 0


async def test_an_interrupted_erasure_continues(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    rows = f"{ADDRESS}\n" * 5
    await scheduler.schedule(sender, f"email\n{rows}", duplicates=2)
    engine = create_engine(load_settings(database_url=scheduler.settings.database_url))
    async with engine.begin() as connection:
        await suppress_erased(connection, "ann", ADDRESS)
    async with engine.begin() as connection:
        assert await erase_jobs(connection, "ann", ADDRESS, 2) == 2
    await engine.dispose()
    # Here the process died.
    answer = await erase(scheduler)
    assert (answer.erased_count, answer.suppressed_count) == (3, 0)
    assert traces_in_postgresql(scheduler) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"'{ADDRESS}': no", True),
        ("ANN.SECRET@EXAMPLE.COM", True),
        ("'some words, ann.secret@exa...' is too long", True),
        ("'some words, ann.sec...' is too long", False),
        ("bo@example.com", False),
    ],
)
def test_a_cut_address_is_recognized(text: str, found: bool) -> None:
    assert contains_address(text, ADDRESS) is found
