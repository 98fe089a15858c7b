"""Renews the leases of jobs that are being sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import BigInteger, SmallInteger, bindparam, column, func, select, update
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
_HELD = (
    select(EmailJob.id)
    .join(_leased, _leased.c.id == EmailJob.id)
    .where(EmailJob.state == JobState.SENDING, EmailJob.attempt == _leased.c.attempt)
)
# A row that somebody else has locked is left out, or else no lease would be renewed.
_free = _HELD.with_for_update(of=EmailJob, key_share=True, skip_locked=True).cte("free")
_RENEW = (
    update(EmailJob)
    .values(lease_until=func.clock_timestamp() + bindparam("lease", type_=INTERVAL))
    .where(
        EmailJob.id == _leased.c.id,
        EmailJob.id == _free.c.id,
        EmailJob.state == JobState.SENDING,
        EmailJob.attempt == _leased.c.attempt,
    )
    .returning(EmailJob.id, EmailJob.lease_until)
)


async def renew_leases(
    connection: AsyncConnection, jobs: Sequence[JobRef], lease: timedelta
) -> dict[int, datetime]:
    """Move the end of these leases to `lease` from now; return the new end by job id.

    A job that is missing from the result has no lease any more, because its attempt has ended; or
    its row is locked (see `still_sending`).
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


async def still_sending(connection: AsyncConnection, jobs: Sequence[JobRef]) -> set[int]:
    """Return the ids of those jobs that `renew_leases` left out because their rows were locked."""
    found = await connection.execute(
        _HELD,
        {"ids": [job.job_id for job in jobs], "attempts": [job.attempt for job in jobs]},
    )
    return set(found.scalars())
