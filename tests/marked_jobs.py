"""The dispatcher's statements for use in tests: mark jobs, settle them, recover their leases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.world import World

LEASE = timedelta(minutes=1)
# The length of a lease that has expired when it begins.
OVER = timedelta(milliseconds=-1)


def refs(jobs: Sequence[int], attempt: int = 1) -> list[JobRef]:
    return [JobRef(job, attempt) for job in jobs]


async def mark(
    connection: AsyncConnection, jobs: Sequence[int], attempt: int = 1, lease: timedelta = LEASE
) -> dict[int, MarkedJob]:
    marked = await storage.mark_sending(connection, refs(jobs, attempt), lease)
    return {each.job.job_id: each for each in marked}


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
    return await storage.settle(connection, records, time.monotonic())


async def whole_row(world: World, job: int) -> Any:
    return (await world.job(job), await world.attempts(job))


async def recover(world: World, next_state: JobState = JobState.SCHEDULED) -> list[int]:
    async with world.engine.begin() as connection:
        return list(await storage.recover_expired(connection, LEASE, next_state))
