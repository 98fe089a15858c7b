"""Retries failed jobs in parts, as RetryEmailJobs does, without a server."""

from __future__ import annotations

from functools import partial

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.services.scheduler.storage.job_sets import SetChange, change_part
from outbox_server.shared.filters.fields import FieldTest, both
from outbox_server.shared.states import JobChangeKind, JobState


async def retry_failed(engine: AsyncEngine, field: str, resource_id: int) -> int:
    """Retry the failed jobs of one `sender_id` or `batch_id`. Return how many there were."""
    tree = both(FieldTest(field, "=", resource_id), FieldTest("state", "=", int(JobState.FAILED)))
    which, change = JobFilter(None, tree), SetChange(JobChangeKind.RETRY)
    position: JobPosition | None = which.start
    jobs = 0
    while position is not None:
        part = partial(change_part, which=which, after=position, change=change)
        done = await in_transaction(engine, part)
        assert not done.waits
        jobs, position = jobs + done.jobs, done.reached
    return jobs
