"""Finds the batches of jobs that may be sent soon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import BigInteger, ColumnElement, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY

from outbox_server.shared.database.frequent import FrequentStatement
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.states import BatchState

# Longer templates (bytes) are not prepared: they would take the room of many others.
_MOST_BYTES: Final = 64 * 1024


def _texts_size() -> ColumnElement[int]:
    texts = (Batch.subject, Batch.body, Batch.html)
    first, *others = (func.coalesce(func.octet_length(text), 0) for text in texts)
    return sum(others, first)


_batches_of_jobs = select(EmailJob.batch_id).where(
    EmailJob.id == func.any(bindparam("jobs", type_=ARRAY(BigInteger)))
)
# As an array, not a join: without statistics, the planner would begin with all batches.
FIND: Final = FrequentStatement(
    select(Batch.id, Batch.user_id).where(
        Batch.id == func.any(func.array(_batches_of_jobs.scalar_subquery())),
        Batch.state == int(BatchState.ACTIVE),
        _texts_size() <= _MOST_BYTES,
    )
)


async def find_upcoming_batches(
    connection: psycopg.AsyncConnection[Any], job_ids: Sequence[int]
) -> dict[int, str]:
    """Return the batches of jobs, with their users. Cancelled and long ones are left out."""
    return dict(await FIND.run(connection, {"jobs": list(job_ids)}))
