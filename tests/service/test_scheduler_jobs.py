"""EmailJobService and SuppressionService, over a real channel, on real stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import batch_pb2, email_job_pb2, sender_pb2, suppression_pb2
from outbox.v1.batch_service_pb2 import GetBatchRequest
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobRequest,
    GetEmailJobRequest,
    ListAttemptsRequest,
    ListEmailJobsRequest,
)
from outbox.v1.sender_service_pb2 import UpdateSenderRequest
from outbox.v1.suppression_service_pb2 import (
    CreateSuppressionRequest,
    DeleteSuppressionRequest,
    ListSuppressionsRequest,
)
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.stats.storage import fold_once
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.message_ids import installation_id, message_id_for
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.states import FINAL_STATES, JobState, ReplyClass
from tests.eventually import eventually
from tests.for_each import for_each_case
from tests.marked_jobs import mark_refs
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

SCHEDULED = email_job_pb2.EMAIL_JOB_STATE_SCHEDULED
CANCELLED = email_job_pb2.EMAIL_JOB_STATE_CANCELLED
FAILED = email_job_pb2.EMAIL_JOB_STATE_FAILED


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


@pytest_asyncio.fixture
async def engine(scheduler: Scheduler) -> AsyncIterator[AsyncEngine]:
    """A connection to PostgreSQL like a dispatcher's."""
    engine = create_engine(scheduler.settings)
    yield engine
    await engine.dispose()


@pytest_asyncio.fixture
async def queue(scheduler: Scheduler, engine: AsyncEngine, redis: Redis) -> AsyncIterator[Queue]:
    """The queue of a dispatcher, with a complete shard."""
    del redis
    client = connect(scheduler.settings)
    (only,) = open_queues(client, scheduler.settings)
    assert await HeadLoader(engine, [only], scheduler.settings).rebuild(only)
    yield only
    await client.aclose()


async def make_jobs(
    scheduler: Scheduler, sender: sender_pb2.Sender, count: int = 1, **options: Any
) -> list[str]:
    """Schedule a batch of `count` jobs; return their ids."""
    csv = "email\n" + "".join(f"user{i}@b.org\n" for i in range(count))
    batch = (await scheduler.schedule(sender, csv, **options)).batch
    return [
        str(job)
        for (job,) in scheduler.rows(
            "SELECT id FROM email_jobs WHERE batch_id = %s ORDER BY id", int(batch.batch_id)
        )
    ]


async def list_all(
    scheduler: Scheduler, page_size: int = 2, **filters: Any
) -> list[email_job_pb2.EmailJob]:
    """Return the jobs of all pages."""
    seen: list[email_job_pb2.EmailJob] = []
    token = ""
    while True:
        page = await scheduler.jobs.ListEmailJobs(
            ListEmailJobsRequest(page_size=page_size, page_token=token, **filters)
        )
        assert len(page.email_jobs) <= page_size
        seen += page.email_jobs
        token = page.next_page_token
        if not token:
            return seen


def get(scheduler: Scheduler, job: str, **fields: Any) -> Awaitable[email_job_pb2.EmailJob]:
    return scheduler.jobs.GetEmailJob(GetEmailJobRequest(email_job_id=job, **fields))


def cancel(scheduler: Scheduler, job: str, **fields: Any) -> Awaitable[email_job_pb2.EmailJob]:
    return scheduler.jobs.CancelEmailJob(CancelEmailJobRequest(email_job_id=job, **fields))


async def test_a_job_has_all_its_known_fields(
    scheduler: Scheduler, sender: sender_pb2.Sender, engine: AsyncEngine
) -> None:
    answer = await scheduler.schedule(sender, "email\n\n\nAnna@B.org\n")
    (job_id,) = scheduler.rows("SELECT id FROM email_jobs")[0]
    job = await get(scheduler, str(job_id))
    assert (job.batch_id, job.sender_id) == (answer.batch.batch_id, sender.sender_id)
    assert (job.user_id, job.recipient, job.row_number) == ("ann", "Anna@b.org", 3)
    assert (job.state, job.attempt_count) == (SCHEDULED, 0)
    assert job.schedule_time == answer.batch.create_time
    assert not job.HasField("send_time")
    async with engine.begin() as connection:
        installation = await installation_id(connection)
    assert job.message_id == message_id_for(job_id, sender.email, installation)


async def test_a_job_shows_its_last_attempt_and_lists_all(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    (job_id,) = await make_jobs(scheduler, sender)
    ended = datetime(2026, 11, 24, 12, tzinfo=UTC)
    for number, outcome, code, message in (
        (1, 4, None, "refused"),
        (2, 2, 451, "later"),
        (3, 1, 250, "ok"),
    ):
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, smtp_code, enhanced_code, message, reply_class)"
            " VALUES (%s, %s, %s, %s, %s, %s, true, %s, %s, %s, %s)",
            int(job_id),
            number,
            int(sender.sender_id),
            ended - timedelta(seconds=1),
            ended + timedelta(minutes=number),
            outcome,
            code,
            "4.7.1" if code == 451 else None,
            message,
            {None: None, 451: ReplyClass.DEFERRED, 250: ReplyClass.SENT}[code],
        )
        scheduler.execute("UPDATE email_jobs SET attempt = %s", number)
        job = await get(scheduler, job_id)
        assert (job.attempt_count, job.last_outcome) == (number, outcome)
        assert job.last_error == ("" if outcome == 1 else message)
    scheduler.execute("UPDATE email_jobs SET state = 3, finished_at = %s", ended)
    job = await get(scheduler, job_id)
    assert job.send_time.ToDatetime(UTC) == job.finish_time.ToDatetime(UTC) == ended

    page = await scheduler.jobs.ListAttempts(ListAttemptsRequest(email_job_id=job_id, page_size=2))
    first, second = page.attempts
    assert (first.attempt_number, first.HasField("smtp_code"), first.message) == (
        1,
        False,
        "refused",
    )
    assert (second.smtp_code, second.enhanced_code) == (451, "4.7.1")
    assert second.end_time.ToDatetime(UTC) == ended + timedelta(minutes=2)
    rest = await scheduler.jobs.ListAttempts(
        ListAttemptsRequest(email_job_id=job_id, page_size=2, page_token=page.next_page_token)
    )
    assert [attempt.attempt_number for attempt in rest.attempts] == [3]
    assert [attempt.reply_class for attempt in (first, second, *rest.attempts)] == [
        email_job_pb2.REPLY_CLASS_UNSPECIFIED,
        email_job_pb2.REPLY_CLASS_DEFERRED,
        email_job_pb2.REPLY_CLASS_SENT,
    ]
    assert rest.next_page_token == ""


@pytest.mark.parametrize("folded", [False, True])
async def test_every_filter_lists_jobs_in_the_order_of_acceptance(
    scheduler: Scheduler, sender: sender_pb2.Sender, engine: AsyncEngine, *, folded: bool
) -> None:
    other, foreign = await scheduler.sender(), await scheduler.sender("bob")
    first = await make_jobs(scheduler, sender, 3)
    second = await make_jobs(scheduler, other, 3)
    third = await make_jobs(scheduler, sender, 2)
    theirs = await make_jobs(scheduler, foreign, 3)
    scheduler.end_jobs(JobState.FAILED, "id = %s", int(first[1]))
    if folded:
        await fold_once(engine)
    (batch,) = scheduler.rows("SELECT batch_id FROM email_jobs WHERE id = %s", int(third[0]))[0]

    # The ids of batches that arrive at the same time interleave.
    late = str(int(theirs[-1]) + 1_000)
    scheduler.execute("UPDATE email_jobs SET id = %s WHERE id = %s", int(late), int(first[2]))
    first[2] = late

    async def ids(**filters: Any) -> list[str]:
        return [job.email_job_id for job in await list_all(scheduler, **filters)]

    assert await ids(user_id="ann") == first + second + third
    assert await ids(user_id="bob") == theirs
    assert await ids(sender_id=sender.sender_id) == first + third
    assert await ids(batch_id=str(batch)) == third
    assert await ids(user_id="ann", state=FAILED) == [first[1]]
    assert await ids(sender_id=sender.sender_id, state=SCHEDULED) == [first[0], first[2], *third]
    assert await ids(user_id="ann", recipient="USER0@B.ORG") == [first[0], second[0], third[0]]
    assert await ids(sender_id=other.sender_id, recipient="user1@b.org") == [second[1]]
    assert await ids(user_id="ann", recipient="user1@b.org", state=FAILED) == [first[1]]
    for nothing in (
        {"user_id": "ann", "recipient": "nobody@b.org"},
        {"user_id": "ann", "recipient": "no address"},
        {"user_id": "ann", "sender_id": foreign.sender_id},
        {"user_id": "bob", "batch_id": str(batch)},
        {"user_id": "bob", "recipient": "user9@b.org"},
        {"sender_id": "x"},
        {"sender_id": other.sender_id, "batch_id": str(batch)},
    ):
        assert await ids(**nothing) == []


async def test_jobs_to_one_address_in_one_batch_are_listed_in_pages(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    keep_all = batch_pb2.DUPLICATE_POLICY_KEEP_ALL
    await scheduler.schedule(sender, "email\na@b.org\nA@b.org\na@B.org\n", duplicates=keep_all)
    seen = await list_all(scheduler, 1, user_id="ann", recipient="a@b.org")
    assert [job.recipient for job in seen] == ["a@b.org", "A@b.org", "a@b.org"]


async def test_listing_jobs_without_a_user_is_refused(scheduler: Scheduler) -> None:
    refusal = await refusal_of(scheduler.jobs.ListEmailJobs(ListEmailJobsRequest()))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "USER_ID_REQUIRED")


async def test_a_page_token_is_valid_only_for_its_filters(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await make_jobs(scheduler, sender, 2)
    page = await scheduler.jobs.ListEmailJobs(ListEmailJobsRequest(user_id="ann", page_size=1))
    for request in (
        ListEmailJobsRequest(user_id="ann", state=SCHEDULED, page_token=page.next_page_token),
        ListEmailJobsRequest(user_id="bob", page_token=page.next_page_token),
        ListEmailJobsRequest(user_id="ann", page_token="x"),
    ):
        refusal = await refusal_of(scheduler.jobs.ListEmailJobs(request))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")


async def test_a_cancelled_job_is_never_claimed(
    scheduler: Scheduler, sender: sender_pb2.Sender, queue: Queue
) -> None:
    first, second = await make_jobs(scheduler, sender, 2)
    job = await cancel(scheduler, first)
    assert job.state == CANCELLED
    assert job.HasField("finish_time")
    assert not job.HasField("send_time")
    claims = (await queue.claim(10)).claims
    assert [str(claim.job.job_id) for claim in claims] == [second]
    assert await cancel(scheduler, first) == job  # idempotent
    counted = scheduler.rows("SELECT state, sum(n) FROM count_deltas GROUP BY 1 ORDER BY 1")
    assert counted == [(1, 1), (6, 1)]


@for_each_case(
    "state name",
    [
        (2, "SENDING"),
        (3, "SENT"),
        (4, "FAILED"),
        (5, "UNCERTAIN"),
        (7, "SUPPRESSED"),
        (8, "EXPIRED"),
    ],
)
async def test_only_a_scheduled_job_can_be_cancelled(
    scheduler: Scheduler, sender: sender_pb2.Sender, state: int, name: str
) -> None:
    (job,) = await make_jobs(scheduler, sender)
    scheduler.execute(
        "UPDATE email_jobs SET state = %s, lease_until = %s, finished_at = %s WHERE id = %s",
        state,
        datetime.now(UTC) if state == 2 else None,
        datetime.now(UTC) if state in FINAL_STATES else None,
        int(job),
    )
    refusal = await refusal_of(cancel(scheduler, job))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TOO_LATE_TO_CANCEL")
    assert refusal.metadata["state"] == name
    assert scheduler.value("SELECT state FROM email_jobs WHERE id = %s", int(job)) == state


async def test_exactly_one_of_a_concurrent_cancel_and_claim_wins(
    scheduler: Scheduler, sender: sender_pb2.Sender, engine: AsyncEngine
) -> None:
    jobs = await make_jobs(scheduler, sender, 60)

    async def mark(job: str) -> bool:
        async with engine.begin() as connection:
            marked = await mark_refs(connection, [JobRef(int(job), 1)], timedelta(seconds=60))
        return bool(marked)

    async def try_cancel(job: str) -> bool:
        try:
            return bool(await cancel(scheduler, job))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return False

    won = {"cancel": 0, "claim": 0}
    for number, job in enumerate(jobs):
        if number % 2:
            marked, cancelled = await asyncio.gather(mark(job), try_cancel(job))
        else:
            cancelled, marked = await asyncio.gather(try_cancel(job), mark(job))
        assert marked != cancelled
        won["claim" if marked else "cancel"] += 1
        state = scheduler.value("SELECT state FROM email_jobs WHERE id = %s", int(job))
        assert state == (2 if marked else 6)
    batch = scheduler.value("SELECT id FROM batches")
    counts = (await scheduler.batches.GetBatch(GetBatchRequest(batch_id=str(batch)))).counts
    assert (counts.sending_count, counts.cancelled_count) == (won["claim"], won["cancel"])


async def test_a_job_of_another_user_is_not_found(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    (job,) = await make_jobs(scheduler, sender)
    for job_id in (job, "999999", "x"):
        attempts = ListAttemptsRequest(email_job_id=job_id, user_id="bob")
        for call in (
            get(scheduler, job_id, user_id="bob"),
            cancel(scheduler, job_id, user_id="bob"),
            scheduler.jobs.ListAttempts(attempts),
        ):
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "EMAIL_JOB_NOT_FOUND")
            assert refusal.message == (
                f"there is no e-mail job {job_id!r}, or it was removed after OUTBOX_RETENTION"
            )
    assert scheduler.value("SELECT state FROM email_jobs") == 1


async def suppress(
    scheduler: Scheduler, email: str, user_id: str = "ann", reason: str = ""
) -> suppression_pb2.Suppression:
    return await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(
            user_id=user_id, suppression=suppression_pb2.Suppression(email=email, reason=reason)
        )
    )


async def test_a_suppression_ends_the_users_waiting_jobs_to_the_address(
    scheduler: Scheduler, sender: sender_pb2.Sender, queue: Queue
) -> None:
    foreign = await scheduler.sender("bob")
    mine = await make_jobs(scheduler, sender, 2)
    theirs = await make_jobs(scheduler, foreign, 1)
    created = await suppress(scheduler, "USER0@b.org", reason="asked to stop")
    assert (created.user_id, created.email, created.reason) == (
        "ann",
        "user0@b.org",
        "asked to stop",
    )
    claimed = {str(claim.job.job_id) for claim in (await queue.claim(10)).claims}
    assert claimed == {mine[1], theirs[0]}
    job = await get(scheduler, mine[0])
    assert job.state == email_job_pb2.EMAIL_JOB_STATE_SUPPRESSED
    counts = (await scheduler.batches.GetBatch(GetBatchRequest(batch_id=job.batch_id))).counts
    assert (counts.scheduled_count, counts.suppressed_count) == (1, 1)


async def test_no_spelling_of_a_suppressed_address_passes_the_last_check(
    scheduler: Scheduler, sender: sender_pb2.Sender, engine: AsyncEngine
) -> None:
    spellings = ["Straße@b.org", "ÄNNE@b.org", "Info@b.org"]
    csv = "\n".join(["email", *spellings, "Ännchen@b.org"])
    until = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    for options in ({}, {"spread_until": until}):  # rows are copied in two ways
        await scheduler.schedule(sender, csv, **options)
    for suppressed in ("STRAßE@b.org", "änne@b.org", "iNFO@b.org"):
        await suppress(scheduler, suppressed)

    waiting = scheduler.rows(
        "UPDATE email_jobs SET scheduled_at = now() WHERE state = 1 RETURNING id"
    )
    async with engine.begin() as connection:
        refs = [JobRef(job, 1) for (job,) in waiting]
        marked = await mark_refs(connection, refs, timedelta(minutes=1))

    assert [job.recipient for job in marked] == ["Ännchen@b.org"] * 2
    assert scheduler.value("SELECT count(*) FROM email_jobs WHERE state = 7") == 6


async def test_a_suppression_keeps_its_first_reason_and_can_be_removed(
    scheduler: Scheduler,
) -> None:
    first = await suppress(scheduler, "a@b.org", reason="one")
    assert await suppress(scheduler, "A@B.org", reason="two") == first
    request = DeleteSuppressionRequest(user_id="ann", email="A@b.ORG")
    foreign = DeleteSuppressionRequest(user_id="bob", email="a@b.org")
    no_address = DeleteSuppressionRequest(user_id="ann", email="a\0b")
    for wrong in (foreign, no_address):
        refusal = await refusal_of(scheduler.suppressions.DeleteSuppression(wrong))
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SUPPRESSION_NOT_FOUND")
    await scheduler.suppressions.DeleteSuppression(request)
    refusal = await refusal_of(scheduler.suppressions.DeleteSuppression(request))
    assert refusal.reason == "SUPPRESSION_NOT_FOUND"


async def test_a_suppression_is_not_removed_while_one_is_being_created(
    scheduler: Scheduler,
) -> None:
    await suppress(scheduler, "a@b.org")
    request = DeleteSuppressionRequest(user_id="ann", email="a@b.org")

    async def waits() -> bool:
        return bool(scheduler.value("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    with psycopg.connect(scheduler.settings.database_url) as making:
        making.execute("SELECT pg_advisory_xact_lock(%s, hashtext('ann'))", (0x5355,))
        deletion = asyncio.ensure_future(scheduler.suppressions.DeleteSuppression(request))
        await eventually(waits)
    await deletion


async def test_an_invalid_suppression_is_refused(scheduler: Scheduler) -> None:
    for email in ("", "x", "a@b.org\n", "a@b.org, c@d.org"):
        refusal = await refusal_of(suppress(scheduler, email))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "ADDRESS_INVALID")
        assert list(refusal.violations) == ["suppression.email"]
    refusal = await refusal_of(suppress(scheduler, "a@b.org", reason="x" * 501))
    assert refusal.reason == "SUPPRESSION_REASON_INVALID"
    refusal = await refusal_of(suppress(scheduler, "a@b.org", user_id=""))
    assert refusal.reason == "USER_ID_REQUIRED"
    assert scheduler.value("SELECT count(*) FROM suppressions") == 0


async def test_suppressions_are_listed_in_pages_in_the_order_of_addresses(
    scheduler: Scheduler,
) -> None:
    for address in ("c@b.org", "a@b.org", "b@b.org"):
        await suppress(scheduler, address)
    await suppress(scheduler, "d@b.org", user_id="bob")
    seen, token = [], ""
    for _ in range(2):
        page = await scheduler.suppressions.ListSuppressions(
            ListSuppressionsRequest(user_id="ann", page_size=2, page_token=token)
        )
        seen += [each.email for each in page.suppressions]
        token = page.next_page_token
    assert (seen, token) == (["a@b.org", "b@b.org", "c@b.org"], "")


async def test_a_job_keeps_its_message_id_when_its_sender_changes_its_address(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    await scheduler.schedule(sender, "email\na@b.org\n")
    job_id = str(scheduler.value("SELECT id FROM email_jobs"))
    before = await get(scheduler, job_id)
    for email in ("new@elsewhere.example", "newer@somewhere.example"):
        await scheduler.senders.UpdateSender(
            UpdateSenderRequest(
                sender=sender_pb2.Sender(sender_id=sender.sender_id, email=email),
                update_mask=FieldMask(paths=["email"]),
            )
        )

    assert (await get(scheduler, job_id)).message_id == before.message_id
