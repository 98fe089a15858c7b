"""Finds the batches of jobs that may be sent soon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import BigInteger, ColumnElement, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import ARRAY

from outbox_server.shared.database.frequent import FrequentStatement
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.states import BatchState

# Templates with more bytes are not prepared, because they would take the room of many others.
_MOST_BYTES: Final = 64 * 1024


class UpcomingBatch(NamedTuple):
    """A batch whose mail may be sent soon, with the size of its texts in bytes."""

    user_id: str
    size: int


def _texts_size() -> ColumnElement[int]:
    texts = (Batch.subject, Batch.body, Batch.html, cast(Batch.headers, Text))
    first, *others = (func.coalesce(func.octet_length(text), 0) for text in texts)
    return sum(others, first)


_batches_of_jobs = select(EmailJob.batch_id).where(
    EmailJob.id == func.any(bindparam("jobs", type_=ARRAY(BigInteger)))
)
# As an array, not a join: without statistics, the planner would begin with all batches.
FIND: Final = FrequentStatement(
    select(Batch.id, Batch.user_id, _texts_size()).where(
        Batch.id == func.any(func.array(_batches_of_jobs.scalar_subquery())),
        Batch.state == int(BatchState.ACTIVE),
        _texts_size() <= _MOST_BYTES,
    )
)


async def find_upcoming_batches(
    connection: psycopg.AsyncConnection[Any], job_ids: Sequence[int]
) -> dict[int, UpcomingBatch]:
    """Return the batches of jobs by id. Cancelled and long ones are left out."""
    rows = await FIND.run(connection, {"jobs": list(job_ids)})
    return {batch_id: UpcomingBatch(user, size) for batch_id, user, size in rows}
