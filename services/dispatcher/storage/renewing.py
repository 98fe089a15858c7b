"""Renews the leases of jobs that are being sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import BigInteger, SmallInteger, bindparam, column, func, update
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage.fragments import array
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import JobState

_leased = (
    func.unnest(array("ids", BigInteger), array("attempts", SmallInteger))
    .table_valued(column("id", BigInteger), column("attempt", SmallInteger), name="leased")
    .render_derived()
)

# The attempt number is the fencing token. The end of the old lease is not compared, because a
# renewal whose answer was lost has already moved it.
_RENEW = (
    update(EmailJob)
    .values(lease_until=func.clock_timestamp() + bindparam("lease", type_=INTERVAL))
    .where(
        EmailJob.id == _leased.c.id,
        EmailJob.state == JobState.SENDING,
        EmailJob.attempt == _leased.c.attempt,
    )
    .returning(EmailJob.id, EmailJob.lease_until)
)


async def renew_leases(
    connection: AsyncConnection, jobs: Sequence[JobRef], lease: timedelta
) -> dict[int, datetime]:
    """Move the end of these leases to `lease` from now; return the new end by job id.

    A job that is missing from the result has no lease any more: its attempt has ended. Rows are
    locked in the order of their ids, as in `settle` and `give_back`, to avoid deadlocks: a job that
    has just ended may be in a renewal and in a group that is being recorded.
    """
    jobs = sorted(jobs)
    rows = await connection.execute(
        _RENEW,
        {
            "ids": [job.job_id for job in jobs],
            "attempts": [job.attempt for job in jobs],
            "lease": lease,
        },
    )
    return {row.id: row.lease_until for row in rows}
