"""Stores the jobs of a spread batch, whose due times are known only after the last row.

The jobs are first copied to a temporary table, which has no index and no log. PostgreSQL keeps it
on disk beyond `temp_buffers`. One statement then moves them into `email_jobs`. A COPY into
`email_jobs` with an UPDATE of the times would write each row and its index entries twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    MetaData,
    Table,
    Text,
    func,
    insert,
    literal,
    null,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import EmailJob

# This is text, because Core has no CREATE TABLE ... AS, which copies the types of `email_jobs`.
_CREATE: Final = text(
    "CREATE TEMPORARY TABLE spread_jobs ON COMMIT DROP AS SELECT 0::bigint AS place, id, batch_id,"
    " sender_id, scheduled_at, expires_at, row_number, recipient,"
    " recipient_key, address_key, variables, external_id, external_key, labels"
    " FROM email_jobs WITH NO DATA"
)
COPY_SPREAD_JOBS: Final = (
    "COPY spread_jobs (id, batch_id, sender_id, place, scheduled_at, expires_at, row_number,"
    " recipient, recipient_key, address_key, variables, external_id, external_key, labels)"
    " FROM STDIN"
)
_TIME: Final = TIMESTAMP(timezone=True)
_jobs: Final = Table(
    "spread_jobs",
    MetaData(),
    # The number of the job in the batch, from 0.
    Column("id", BigInteger),
    Column("batch_id", BigInteger),
    Column("sender_id", BigInteger),
    # The job's place among the jobs without their own time. NULL means that it has its own time.
    Column("place", BigInteger),
    Column("scheduled_at", _TIME),
    Column("expires_at", _TIME),
    Column("row_number", BigInteger),
    Column("recipient", Text),
    Column("recipient_key", Text),
    Column("address_key", Text),
    Column("variables", Text),
    Column("external_id", Text),
    Column("external_key", BigInteger),
    Column("labels", JSONB),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """`count` mails at equal distances, the first at `start` and the last at `until`."""

    start: datetime
    until: datetime
    count: int

    @property
    def spacing(self) -> timedelta:
        """The time between two mails, rounded to microseconds."""
        if self.count <= 1:
            return timedelta(0)
        return (self.until - self.start) / (self.count - 1)

    @property
    def last_due(self) -> datetime:
        """The due time of the last mail."""
        return self.until if self.count > 1 else self.start


async def create_spread_jobs(connection: AsyncConnection) -> None:
    """Create the temporary table. It is dropped when the transaction ends."""
    await connection.execute(_CREATE)


async def move_spread_jobs(
    connection: AsyncConnection, spread: Spread, expire_after: timedelta | None, first_id: int
) -> None:
    """Move all jobs from the temporary table to `email_jobs`, with their ids and times."""
    # `spacing` is not used: its rounding error would grow with the place.
    way = (spread.until - spread.start).total_seconds() / max(spread.count - 1, 1)
    due = func.coalesce(
        _jobs.c.scheduled_at,
        literal(spread.start, _TIME) + _seconds(_jobs.c.place * literal(way, Double)),
    )
    expires = (
        null()
        if expire_after is None
        else func.coalesce(
            _jobs.c.expires_at, due + _seconds(literal(expire_after.total_seconds(), Double))
        )
    )
    await connection.execute(
        insert(EmailJob).from_select(
            [
                "id",
                "batch_id",
                "sender_id",
                "scheduled_at",
                "expires_at",
                "row_number",
                "recipient",
                "recipient_key",
                "address_key",
                "variables",
                "external_id",
                "external_key",
                "labels",
            ],
            select(
                _jobs.c.id + literal(first_id, BigInteger),
                _jobs.c.batch_id,
                _jobs.c.sender_id,
                due,
                expires,
                _jobs.c.row_number,
                _jobs.c.recipient,
                _jobs.c.recipient_key,
                _jobs.c.address_key,
                _jobs.c.variables,
                _jobs.c.external_id,
                _jobs.c.external_key,
                _jobs.c.labels,
            ),
        )
    )


def _seconds(number: Any) -> Any:
    """Return an interval without days, whose length would depend on the session's time zone."""
    return func.make_interval(0, 0, 0, 0, 0, 0, number)
