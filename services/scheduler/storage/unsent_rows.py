"""Reads the rows of a batch that may still be sent, to check new templates with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.batches import stored_headers
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.states import JobState
from outbox_server.shared.templates.head import HeadTexts

# Jobs that failed may be retried.
_UNSENT: Final = (
    in_state(JobState.SCHEDULED)
    | in_state(JobState.SENDING)
    | in_state(JobState.FAILED)
    | in_state(JobState.UNCERTAIN)
)


@dataclass(frozen=True, slots=True)
class UnsentRow:
    """The stored parts of a job's mail."""

    job_id: int
    row_number: int
    variables: str | None


@dataclass(frozen=True, slots=True)
class StoredTemplates:
    """The templates of a batch, and the names of the values that its rows have."""

    user_id: str
    subject: str | None
    body: str | None
    html: str | None
    variable_names: tuple[str, ...]
    head: HeadTexts


async def read_templates(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> StoredTemplates | None:
    """Return the templates of a batch; None if it is missing or belongs to another user."""
    statement = owned_by(
        select(
            *(Batch.user_id, Batch.subject, Batch.body, Batch.html, Batch.variable_names),
            *(Batch.reply_to, Batch.name_column, Batch.headers),
        ).where(Batch.id == batch_id),
        Batch.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    head = HeadTexts(row.reply_to, row.name_column or "", stored_headers(row.headers))
    names = tuple(row.variable_names)
    return StoredTemplates(row.user_id, row.subject, row.body, row.html, names, head)


async def longest_row(connection: AsyncConnection, batch_id: int) -> int:
    """Return the size of the largest values of an unsent row, in bytes."""
    size = func.max(func.octet_length(EmailJob.variables))
    found = await connection.scalar(select(size).where(EmailJob.batch_id == batch_id, _UNSENT))
    return int(found or 0)


async def count_unsent(connection: AsyncConnection, batch_id: int, most: int) -> int:
    """Return how many rows may still be sent; stop counting at `most`."""
    rows = select(EmailJob.id).where(EmailJob.batch_id == batch_id, _UNSENT).limit(most).subquery()
    return int(await connection.scalar(select(func.count()).select_from(rows)) or 0)


async def read_unsent(
    connection: AsyncConnection, batch_id: int, after: int, limit: int
) -> Sequence[UnsentRow]:
    """Return the first `limit` unsent rows with ids beyond `after`."""
    statement = (
        select(EmailJob.id, EmailJob.row_number, EmailJob.variables)
        .where(EmailJob.batch_id == batch_id, EmailJob.id > after, _UNSENT)
        .order_by(EmailJob.id)
        .limit(limit)
    )
    return [UnsentRow(*row) for row in await connection.execute(statement)]
