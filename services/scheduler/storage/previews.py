"""Reads the stored parts of the mail of one job."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.mail.content import BatchContent, read_batches


@dataclass(frozen=True, slots=True)
class JobContent:
    """The row of a job, and the data of its batch. An erased recipient is empty."""

    job_id: int
    recipient: str
    variables: str | None
    batch: BatchContent


async def read_job_content(
    connection: AsyncConnection, job_id: int, user_id: str | None
) -> JobContent | None:
    """Return the content of a job, or None if it does not exist or belongs to another user."""
    statement = owned_by(
        select(EmailJob.batch_id, EmailJob.recipient, EmailJob.variables)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(EmailJob.id == job_id),
        Batch.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    batches = await read_batches(connection, [row.batch_id])
    content = batches.get(row.batch_id)
    if content is None:  # removed at this moment
        return None
    return JobContent(job_id, row.recipient, row.variables, content)
