"""The dispatcher's statements for use in tests: mark jobs, settle them, recover their leases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.database.frequent import driver_of
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.world import TEST_LIFE, TEST_SHARD, World

LEASE = timedelta(minutes=1)
# The length of a lease that has expired when it begins.
OVER = timedelta(milliseconds=-1)


# A shard that no queue has, with one life, which is valid for ever.
_BEGIN_LIFE = text(
    f"INSERT INTO shard_lives (shard, life) SELECT {TEST_SHARD}, '{TEST_LIFE}'"
    f" WHERE NOT EXISTS (SELECT FROM shard_lives WHERE shard = {TEST_SHARD})"
)
_SENDERS = text("SELECT id, sender_id FROM email_jobs WHERE id = ANY(:ids)")


def refs(jobs: Sequence[int], attempt: int = 1) -> list[JobRef]:
    return [JobRef(job, attempt) for job in jobs]


async def raw(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """Return the driver's connection, in a transaction that SQLAlchemy commits."""
    if not connection.in_transaction():
        await connection.begin()
    return await driver_of(connection)


async def mark(
    connection: AsyncConnection,
    jobs: Sequence[int],
    attempt: int = 1,
    lease: timedelta = LEASE,
    seen: int = 0,
) -> dict[int, MarkedJob]:
    marked = await mark_refs(connection, refs(jobs, attempt), lease, seen=seen)
    return {each.job.job_id: each for each in marked}


async def claims_of(connection: AsyncConnection, jobs: Sequence[JobRef]) -> list[Claim]:
    """Return claims of jobs as the queues of their senders hand them out, in a valid life."""
    await connection.execute(_BEGIN_LIFE)
    found = await connection.execute(_SENDERS, {"ids": [job.job_id for job in jobs]})
    senders = {row.id: row.sender_id for row in found}
    return [
        Claim(senders.get(job.job_id, 0), job, timedelta(0), 0, 0, life=TEST_LIFE) for job in jobs
    ]


async def mark_refs(
    connection: AsyncConnection,
    jobs: Sequence[JobRef],
    lease: timedelta,
    key_space: str = "",
    seen: int = 0,
) -> list[MarkedJob]:
    """Mark jobs SENDING, as if they had been claimed in a valid life."""
    claims = await claims_of(connection, jobs)
    marking = storage.Marking(claims, lease, TEST_SHARD, key_space, seen)
    return await storage.mark_sending(await raw(connection), marking)


def record_of(marked: MarkedJob, state: JobState = JobState.SENT, **changes: Any) -> AttemptRecord:
    now = time.monotonic()
    record = AttemptRecord(
        job=marked.job,
        sender_id=marked.sender_id,
        state=state,
        failures=marked.failures,
        outcome=AttemptOutcome.SENT,
        counted=True,
        started=now - 0.2,
        ended=now - 0.1,
        smtp_code=250,
        enhanced_code="2.0.0",
        message="taken",
    )
    return replace(record, **changes)


async def settle(connection: AsyncConnection, records: Sequence[AttemptRecord]) -> dict[int, int]:
    return await storage.settle(await raw(connection), records, time.monotonic())


async def whole_row(world: World, job: int) -> Any:
    return (await world.job(job), await world.attempts(job))


async def recover(world: World, next_state: JobState = JobState.SCHEDULED) -> list[int]:
    async with world.engine.begin() as connection:
        return list(await storage.recover_expired(connection, LEASE, next_state))
