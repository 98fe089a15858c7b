"""Reads the input of forecasts for many senders at once, if there is little of it.

A forecast reads all waiting mail of a sender, and its sends of the last hour. That takes longer
than it takes to accept a small batch, unless both are few. Then one statement each reads them for
all the senders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg
from sqlalchemy import (
    BigInteger,
    Select,
    bindparam,
    cast,
    extract,
    func,
    lateral,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import INTERVAL, aggregate_order_by

from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.frequent import FrequentStatement, named_rows
from outbox_server.shared.database.models import Attempt, EmailJob, Sender
from outbox_server.shared.database.pauses import has_paused_batch
from outbox_server.shared.forecast.job_groups import joined
from outbox_server.shared.forecast.pace import PACE_STATEMENT, Rules, SenderPace, pace_of
from outbox_server.shared.forecast.simulation import JobGroup, Sends
from outbox_server.shared.states import JobState

# The maximum numbers of waiting jobs, and of sends in the window, of a sender whose forecast is
# quick.
MOST_QUICK: Final = 64


@dataclass(frozen=True, slots=True)
class QuickBacklog:
    """The pace of a sender, and its waiting jobs in the order of sending, if they are few.

    Each job comes with the id of its batch. None means that a forecast is not quick.
    """

    pace: SenderPace
    jobs: Sequence[tuple[int, JobGroup]] | None

    def groups_with(self, batch_id: int) -> list[JobGroup]:
        """Return the waiting mail; `mine` counts the jobs of a batch."""
        return list(
            joined(
                (batch, replace(job, mine=job.count) if batch == batch_id else job)
                for batch, job in self.jobs or ()
            )
        )


def _us(time: Any) -> Any:
    return cast(extract("epoch", time) * 1_000_000, BigInteger)


def _statement() -> Select[Any]:
    """Return the pace of each sender, its first waiting jobs and its last sends, in arrays."""
    jobs = (
        select(EmailJob.scheduled_at, EmailJob.id, EmailJob.batch_id, EmailJob.expires_at)
        .where(EmailJob.sender_id == Sender.id, waits_of(Sender.id))
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(MOST_QUICK + 1)
        .correlate(Sender)
        .subquery("jobs")
    )
    order = (jobs.c.scheduled_at, jobs.c.id)

    def array(column: Any) -> Any:
        return func.array_agg(aggregate_order_by(column, *order))

    waiting = lateral(
        select(
            array(jobs.c.batch_id).label("batches"),
            array(_us(jobs.c.scheduled_at)).label("dues"),
            array(_us(jobs.c.expires_at)).label("expiries"),
        )
    )
    sends = (
        select(_us(Attempt.ended_at).label("end"))
        .where(
            Attempt.sender_id == Sender.id,
            Attempt.counted,
            Attempt.ended_at > func.statement_timestamp() - bindparam("window", type_=INTERVAL),
        )
        .order_by(Attempt.ended_at.desc())
        .limit(func.least(Sender.hourly_limit, MOST_QUICK + 1))
        .correlate(Sender)
        .subquery("sends")
    )
    sent = lateral(
        select(func.array_agg(aggregate_order_by(sends.c.end, sends.c.end)).label("ends"))
    )
    flying = lateral(
        select(
            func.array_agg(EmailJob.lease_until - bindparam("lease", type_=INTERVAL)).label("began")
        )
        .where(EmailJob.sender_id == Sender.id, in_state(JobState.SENDING))
        .correlate(Sender)
    )
    return (
        PACE_STATEMENT.add_columns(*waiting.c, *sent.c, *flying.c)
        .add_columns(has_paused_batch(Sender.id).label("has_paused"))
        .join(waiting, true())
        .join(sent, true())
        .join(flying, true())
    )


_SELECTED: Final = _statement()
_STATEMENT: Final = FrequentStatement(_SELECTED)
_NAMED: Final = named_rows(_SELECTED.selected_columns.keys())


async def read_quick(
    driver: psycopg.AsyncConnection[Any], sender_ids: Sequence[int], rules: Rules
) -> dict[int, QuickBacklog]:
    """Return the input of these senders' forecasts, from one snapshot."""
    values = {"senders": list(sender_ids), "window": rules.window, "lease": rules.lease}
    rows = await _STATEMENT.run(driver, values)
    return {row.id: _backlog_of(row, rules) for row in map(_NAMED, rows)}


def _backlog_of(row: Any, rules: Rules) -> QuickBacklog:
    ends, waiting = row.ends or (), row.batches or ()
    limits = rules.everyone.overridden(row.user_hourly_limit, row.user_min_gap_ms)
    quick = max(len(ends), len(waiting)) <= MOST_QUICK and not limits and not row.has_paused
    pace = pace_of(row, rules, list(map(Sends, ends)), row.began or ())
    return QuickBacklog(pace, _jobs_of(row) if quick else None)


def _jobs_of(row: Any) -> list[tuple[int, JobGroup]]:
    if not row.batches:
        return []
    each = zip(row.batches, row.dues, row.expiries, strict=True)
    return [
        (batch, JobGroup(due=due, count=1, expire_after=None if ends is None else ends - due))
        for batch, due, ends in each
    ]
