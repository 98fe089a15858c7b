"""Jobs of a batch that is spread: when each is due is known once all have come.

They wait in a temporary table, which has no index and no log, and which PostgreSQL keeps on disk
beyond `temp_buffers`; one statement then moves them into `email_jobs`. To COPY them there at once
and to UPDATE their times would write every row and all of its index entries twice.
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
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import EmailJob

# Core has no CREATE TABLE ... AS; the types are those of `email_jobs`.
_CREATE: Final = text(
    "CREATE TEMPORARY TABLE spread_jobs ON COMMIT DROP AS SELECT 0::bigint AS place, batch_id,"
    " sender_id, scheduled_at, expires_at, row_number, recipient,"
    " recipient_key, variables FROM email_jobs WITH NO DATA"
)
COPY_SPREAD_JOBS: Final = (
    "COPY spread_jobs (batch_id, sender_id, place, scheduled_at, expires_at, row_number, recipient,"
    " recipient_key, variables) FROM STDIN"
)
_TIME: Final = TIMESTAMP(timezone=True)
_jobs: Final = Table(
    "spread_jobs",
    MetaData(),
    Column("batch_id", BigInteger),
    Column("sender_id", BigInteger),
    # Where it stands among those without a time of their own; NULL: it has one.
    Column("place", BigInteger),
    Column("scheduled_at", _TIME),
    Column("expires_at", _TIME),
    Column("row_number", BigInteger),
    Column("recipient", Text),
    Column("recipient_key", Text),
    Column("variables", Text),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """`count` mails between two times, the first at the one and the last at the other."""

    start: datetime
    until: datetime
    count: int

    @property
    def spacing(self) -> timedelta:
        """The time between two of them, to the microsecond."""
        if self.count < 2:  # noqa: PLR2004 - between two
            return timedelta(0)
        return (self.until - self.start) / (self.count - 1)

    @property
    def last_due(self) -> datetime:
        """When the last of them is due."""
        return self.until if self.count > 1 else self.start


async def create_spread_jobs(connection: AsyncConnection) -> None:
    """Make the temporary table; it is gone with the transaction."""
    await connection.execute(_CREATE)


async def move_spread_jobs(
    connection: AsyncConnection, spread: Spread, expire_after: timedelta | None
) -> None:
    """Move all jobs from the temporary table to where they wait, each with its times."""
    # Not `spacing`: the error of its microseconds would grow with the place.
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
                "batch_id",
                "sender_id",
                "scheduled_at",
                "expires_at",
                "row_number",
                "recipient",
                "recipient_key",
                "variables",
            ],
            select(
                _jobs.c.batch_id,
                _jobs.c.sender_id,
                due,
                expires,
                _jobs.c.row_number,
                _jobs.c.recipient,
                _jobs.c.recipient_key,
                _jobs.c.variables,
            ),
        )
    )


def _seconds(number: Any) -> Any:
    """Return an interval of seconds alone: days would follow the clocks of the session's zone."""
    return func.make_interval(0, 0, 0, 0, 0, 0, number)
