"""Reads the input of a forecast from PostgreSQL: a sender's limits, past sends and waiting mail.

The past sends are at most those of the window. Waiting mail is read job by job if it is little, and
otherwise computed from its batches. So a forecast costs about the same at any size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Interval,
    Row,
    Select,
    Text,
    any_,
    bindparam,
    cast,
    func,
    lateral,
    literal,
    select,
    true,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.cooldowns.columns import COOLDOWN_COLUMNS, cooldown_of
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import in_state, sender_counts
from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    BatchCount,
    Cooldown,
    CountDelta,
    EmailJob,
    Sender,
    UserRow,
)
from outbox_server.shared.database.pauses import sendable_of, sender_is_active
from outbox_server.shared.forecast.batch_pauses import after_pauses, read_pauses
from outbox_server.shared.forecast.job_groups import first_of, in_order
from outbox_server.shared.forecast.openings import Openings
from outbox_server.shared.forecast.simulation import JobGroup, Limiter, Sends
from outbox_server.shared.forecast.user_shares import UserLimiter
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.holds.conditions import NEW_BATCH, sender_may_send
from outbox_server.shared.queue.user_limits import NO_USER_LIMITS, UserSendLimits
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import BatchState, JobState, SenderState

# The most jobs that are read one by one, in about 20 ms.
MOST_JOBS: Final = 20_000
# The most sends of the window that are read. If there are more, every n-th is read.
_MOST_SENDS: Final = 2_000
# The number of recent sends from which the duration of a send is computed.
_SAMPLE: Final = 50
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Rules:
    """The operator's settings: `OUTBOX_MIN_GAP`, `OUTBOX_RATE_WINDOW`, `OUTBOX_LEASE`.

    `everyone` has `OUTBOX_USER_HOURLY_LIMIT` and `OUTBOX_USER_GAP`.
    """

    floor: timedelta
    window: timedelta
    lease: timedelta
    everyone: UserSendLimits = NO_USER_LIMITS

    @classmethod
    def from_settings(cls, settings: Settings) -> Rules:
        """Return the rules of an installation."""
        everyone = UserSendLimits.from_settings(settings)
        return cls(settings.min_gap, settings.rate_window, settings.lease, everyone)


@dataclass(frozen=True, slots=True)
class SenderPace:
    """What decides how fast a sender's mail is sent, as of `now`."""

    now: int
    # Whether it sends, now or after a pause that ends by itself.
    active: bool
    limiter: Limiter
    # Number of jobs that wait.
    waiting: int = 0
    cooldown: CooldownRecord | None = None
    # The limits that its user has for all its senders together.
    user: UserLimiter | None = None
    # Whether a hold keeps new mail from being sent.
    held: bool = False
    # The batches that are paused, with the ends of their pauses; None: nobody knows when.
    pauses: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Whether the sender is paused now."""
        return not self.active or self.limiter.not_before is not None


@dataclass(frozen=True, slots=True)
class BacklogPosition:
    """The position of a job in the order of sending."""

    due: datetime
    job_id: int

    def before(self) -> ColumnElement[bool]:
        """Return the condition that a job comes before this one; the head's index serves it."""
        return tuple_(EmailJob.scheduled_at, EmailJob.id) < tuple_(
            literal(self.due, EmailJob.scheduled_at.type), literal(self.job_id)
        )


def to_us(time: datetime) -> int:
    """Return the time in whole microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def from_us(microseconds: int) -> datetime:
    """Return the UTC time of `microseconds` since 1970.

    Raises:
        OverflowError: it is beyond the year 9999.
    """
    return _EPOCH + microseconds * _MICROSECOND


def _pace_statement() -> Select[Any]:
    last_end = (
        select(func.max(Attempt.ended_at)).where(Attempt.sender_id == Sender.id).scalar_subquery()
    )
    recent = (
        select((Attempt.ended_at - Attempt.started_at).label("took"), Attempt.late_ms)
        .where(Attempt.sender_id == Sender.id, Attempt.counted)
        .order_by(Attempt.ended_at.desc())
        .limit(_SAMPLE)
        .correlate(Sender)
        .subquery()
    )
    takes = lateral(
        select(
            type_coerce(func.avg(recent.c.took), Interval()).label("took"),
            func.percentile_disc(0.5).within_group(recent.c.late_ms).label("late_ms"),
        )
    )
    return (
        select(
            func.statement_timestamp().label("now"),
            Sender.id,
            Sender.state,
            Sender.paused_until,
            Sender.deleted_at,
            Sender.hourly_limit,
            Sender.min_gap_ms,
            Sender.max_in_flight,
            Sender.sending_hours,
            Sender.user_id,
            UserRow.hourly_limit.label("user_hourly_limit"),
            UserRow.min_gap_ms.label("user_min_gap_ms"),
            last_end.label("last_end"),
            takes.c.took,
            takes.c.late_ms,
            sender_may_send(Sender.id, NEW_BATCH).label("may_send"),
            *COOLDOWN_COLUMNS,
        )
        .outerjoin_from(Sender, Cooldown, Cooldown.sender_id == Sender.id)
        .outerjoin(UserRow, UserRow.user_id == Sender.user_id)
        .join(takes, true())
        .where(Sender.id == any_(bindparam("senders", type_=ARRAY(BigInteger))))
    )


def _sends_statement(of_senders: ColumnElement[bool]) -> Select[Any]:
    ends = (
        select(
            Attempt.ended_at,
            func.row_number().over(order_by=Attempt.ended_at.desc()).label("rank"),
            func.least(func.count().over(), _MOST).label("total"),
        )
        .where(
            of_senders,
            Attempt.counted,
            # Not clock_timestamp(): PostgreSQL uses no index for a value that changes meanwhile.
            Attempt.ended_at > func.statement_timestamp() - bindparam("window", type_=INTERVAL),
        )
        .subquery()
    )
    every = func.div(ends.c.total - 1, _MOST_SENDS) + 1
    return (
        select(ends.c.ended_at, ends.c.rank, ends.c.total)
        .where(ends.c.rank <= _MOST, (ends.c.rank - 1) % every == 0)
        .order_by(ends.c.rank.desc())
    )


def _in_flight_statement(of_senders: ColumnElement[bool]) -> Select[Any]:
    return (
        select(EmailJob.lease_until - bindparam("lease", type_=INTERVAL))
        .where(of_senders, in_state(JobState.SENDING))
        .order_by(EmailJob.lease_until)
    )


# Built once, because that takes longer than to run them for a sender.
_SENDER: Final[Any] = bindparam("sender_id", type_=BigInteger)
_USER: Final[Any] = bindparam("user_id", type_=Text)
_MOST: Final[Any] = bindparam("most", type_=BigInteger)
_SENDERS_OF_USER: Final = select(Sender.id).where(Sender.user_id == _USER)
# What the pace of each of `senders` depends on, except for its sends.
PACE_STATEMENT: Final = _pace_statement()
_SENDS: Final = _sends_statement(Attempt.sender_id == _SENDER)
_USER_SENDS: Final = _sends_statement(Attempt.sender_id.in_(_SENDERS_OF_USER))
_IN_FLIGHT: Final = _in_flight_statement(EmailJob.sender_id == _SENDER)
_USER_IN_FLIGHT: Final = _in_flight_statement(EmailJob.sender_id.in_(_SENDERS_OF_USER))


async def read_pace(connection: AsyncConnection, sender_id: int, rules: Rules) -> SenderPace:
    """Return the pace of a sender, even of a deleted one. The caller has checked its owner."""
    own = {"sender_id": sender_id}
    row = (await connection.execute(PACE_STATEMENT, {"senders": [sender_id]})).one()
    sent: list[Sends] = []
    if row.last_end:
        values = own | {"most": row.hourly_limit, "window": rules.window}
        sent = await _read_sends(connection, _SENDS, values)
    began = await _read_in_flight(connection, _IN_FLIGHT, own | {"lease": rules.lease})
    pace = pace_of(row, rules, sent, began)
    limits = rules.everyone.overridden(row.user_hourly_limit, row.user_min_gap_ms)
    user = None
    if limits:
        user = await _read_user(
            connection, row.user_id, limits, rules, (pace.now, pace.limiter.takes)
        )
    counts = await sender_counts(connection, [sender_id])
    pauses = {
        batch_id: None if end is None else to_us(end)
        for batch_id, end in (await read_pauses(connection, sender_id)).items()
    }
    return replace(pace, waiting=counts[sender_id].scheduled, user=user, pauses=pauses)


def pace_of(
    row: Row[Any], rules: Rules, sent: Sequence[Sends], in_flight: Iterable[datetime]
) -> SenderPace:
    """Return the pace of a sender, without its waiting jobs and the limits of its user.

    `row` is of `PACE_STATEMENT`, `sent` has the sends of the window, and `in_flight` the starts of
    the leases of its jobs in SENDING.
    """
    now = to_us(row.now)
    cooldown = cooldown_of(row)
    # How long recent sends took, from the instant at which they were allowed to their end: the mean
    # duration of SMTP plus the median lateness. The median ignores a few long waits, such as those
    # for a dispatcher that was down.
    takes = (row.took or timedelta(0)) // _MICROSECOND + (row.late_ms or 0) * 1_000
    flying = [max(now, to_us(began) + takes) for began in in_flight]
    ends = [*([to_us(row.last_end)] if row.last_end else []), *flying]
    gap = effective_gap(row.min_gap_ms, rules.floor)
    end = None
    if row.state == SenderState.PAUSED and row.paused_until is not None:
        end = to_us(row.paused_until)
    return SenderPace(
        now=now,
        active=row.deleted_at is None and (row.state == SenderState.ACTIVE or end is not None),
        held=not row.may_send,
        limiter=Limiter(
            limit=row.hourly_limit,
            gap=gap // _MICROSECOND,
            window=rules.window // _MICROSECOND,
            max_in_flight=row.max_in_flight,
            takes=takes,
            hours=None if row.sending_hours is None else Openings.from_text(row.sending_hours),
            next_probe=None if cooldown is None else to_us(cooldown.next_probe_at),
            not_before=end if end is not None and end > now else None,
            sent=[*sent, *map(Sends, flying)],
            last_end=max(ends, default=None),
        ),
        cooldown=cooldown,
    )


async def _read_user(
    connection: AsyncConnection,
    user_id: str,
    limits: UserSendLimits,
    rules: Rules,
    pace: tuple[int, int],
) -> UserLimiter:
    """Return the limiter of a user; `pace` has the present time and the duration of a send."""
    now, takes = pace
    own: dict[str, Any] = {"user_id": user_id}
    most = limits.hourly_limit or 1
    sent = await _read_sends(connection, _USER_SENDS, own | {"most": most, "window": rules.window})
    ends = [sends.first + (sends.count - 1) * sends.step for sends in sent]
    for began in await _read_in_flight(connection, _USER_IN_FLIGHT, own | {"lease": rules.lease}):
        end = max(now, to_us(began) + takes)
        sent.append(Sends(end))
        ends.append(end)
    first_due = (
        select(EmailJob.scheduled_at)
        .where(EmailJob.sender_id == Sender.id, in_state(JobState.SCHEDULED))
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(1)
        .correlate(Sender)
        .scalar_subquery()
    )
    competing = select(func.count()).where(
        Sender.user_id == user_id,
        sender_is_active(),
        first_due <= func.statement_timestamp(),
    )
    return UserLimiter(
        limit=limits.hourly_limit,
        gap=limits.gap // _MICROSECOND,
        senders=max(1, await connection.scalar(competing) or 0),
        sent=sent,
        last_end=max(ends, default=None),
    )


async def _read_sends(
    connection: AsyncConnection, statement: Select[Any], values: Mapping[str, Any]
) -> list[Sends]:
    """Return the ends in the window, at most `most`; if they are many, from every n-th one."""
    rows = (await connection.execute(statement, values)).all()
    if not rows:
        return []
    sends = []
    if rows[0].rank < rows[0].total:
        sends.append(Sends(to_us(rows[0].ended_at), rows[0].total - rows[0].rank))
    for one, other in pairwise(rows):
        first, count = to_us(one.ended_at), one.rank - other.rank
        sends.append(Sends(first, count, (to_us(other.ended_at) - first) // count))
    sends.append(Sends(to_us(rows[-1].ended_at)))
    return sends


async def _read_in_flight(
    connection: AsyncConnection, statement: Select[Any], values: Mapping[str, Any]
) -> Sequence[datetime]:
    """Return the start of the lease of each job in SENDING."""
    rows = await connection.execute(statement, values)
    return [began for began in rows.scalars() if began]


async def read_backlog(
    connection: AsyncConnection, sender_id: int, pace: SenderPace, batch_id: int | None
) -> list[JobGroup]:
    """Return a sender's waiting mail in the order of sending; `mine` counts jobs of `batch_id`."""
    if pace.waiting <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, pace, batch_id)
    return await _read_batches(connection, sender_id, pace, batch_id)


async def count_ahead(
    connection: AsyncConnection,
    sender_id: int,
    place: BacklogPosition,
    most: int,
    *,
    paused: bool = False,
) -> int:
    """Return how many waiting jobs of a sender come before `place`, at most `most`.

    Jobs of paused batches do not count, unless the job at `place` is of one (`paused`).
    """
    waits = waits_of(sender_id) if paused else sendable_of(sender_id)
    jobs = (
        select(EmailJob.id)
        .where(EmailJob.sender_id == sender_id, waits, place.before())
        .limit(most)
        .subquery()
    )
    return int(await connection.scalar(select(func.count()).select_from(jobs)) or 0)


async def read_ahead(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    place: BacklogPosition,
    ahead: int,
) -> list[JobGroup]:
    """Return the `ahead` waiting jobs before `place`, in the order of sending."""
    if ahead <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, pace, None, place)
    return first_of(await _read_batches(connection, sender_id, pace, None), ahead)


def _jobs_statement(until: ColumnElement[bool]) -> Select[Any]:
    order = (EmailJob.scheduled_at, EmailJob.id)
    place = func.row_number().over(order_by=order)
    place_in_batch = func.row_number().over(
        partition_by=(EmailJob.scheduled_at, EmailJob.batch_id, EmailJob.expires_at),
        order_by=EmailJob.id,
    )
    # Neighbours of one batch and due time have the same difference. A retry moves the due time, but
    # not the time at which the job expires.
    jobs = (
        select(
            EmailJob.id,
            EmailJob.scheduled_at,
            EmailJob.expires_at,
            EmailJob.batch_id,
            (place - place_in_batch).label("group"),
        )
        .where(EmailJob.sender_id == _SENDER, waits_of(_SENDER), until)
        .order_by(*order)
        .limit(2 * MOST_JOBS)
        .subquery()
    )
    return (
        select(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, func.count().label("n"))
        .group_by(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, jobs.c.group)
        .order_by(jobs.c.scheduled_at, func.min(jobs.c.id))
    )


_JOBS: Final = _jobs_statement(true())


async def _read_jobs(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    batch_id: int | None,
    until: BacklogPosition | None = None,
) -> list[JobGroup]:
    """Return groups from the jobs; each group is of one batch, due time and expiry."""
    statement = _JOBS if until is None else _jobs_statement(until.before())
    rows = await connection.execute(statement, {"sender_id": sender_id})
    return after_pauses(
        (
            (
                row.batch_id,
                JobGroup(
                    due=to_us(row.scheduled_at),
                    count=row.n,
                    mine=row.n if row.batch_id == batch_id else 0,
                    expire_after=row.expires_at
                    and (row.expires_at - row.scheduled_at) // _MICROSECOND,
                ),
            )
            for row in rows
        ),
        pace.pauses,
    )


async def _read_batches(
    connection: AsyncConnection, sender_id: int, pace: SenderPace, batch_id: int | None
) -> list[JobGroup]:
    """Return groups computed from the batches: the last jobs of each, evenly spaced."""
    state = int(JobState.SCHEDULED)
    parts = union_all(
        select(BatchCount.batch_id, BatchCount.n)
        .join(Batch, Batch.id == BatchCount.batch_id)
        .where(Batch.sender_id == sender_id, BatchCount.state == state),
        select(CountDelta.batch_id, CountDelta.n).where(
            CountDelta.sender_id == sender_id, CountDelta.state == state
        ),
    ).subquery("part")
    waiting = (
        select(parts.c.batch_id, cast(func.sum(parts.c.n), BigInteger).label("n"))
        .group_by(parts.c.batch_id)
        .having(func.sum(parts.c.n) > literal(0))
        .subquery("waiting")
    )
    rows = await connection.execute(
        select(
            Batch.id,
            Batch.start_at,
            Batch.last_due_at,
            func.coalesce(Batch.spread_count, Batch.accepted_count).label("spread"),
            Batch.expire_after_ms,
            waiting.c.n,
        )
        .join(waiting, waiting.c.batch_id == Batch.id)
        .where(Batch.state == BatchState.ACTIVE)
        .order_by(Batch.id)
    )
    groups = []
    for row in rows:
        last_due = to_us(row.last_due_at or row.start_at)
        step = (last_due - to_us(row.start_at)) // max(row.spread - 1, 1)
        group = JobGroup(
            due=last_due - (row.n - 1) * step,
            count=row.n,
            step=step,
            mine=row.n if row.id == batch_id else 0,
            expire_after=row.expire_after_ms and row.expire_after_ms * 1_000,
        )
        groups.append((row.id, group))
    # A user may have very many batches.
    return await asyncio.to_thread(_ordered, groups, pace.pauses)


def _ordered(
    groups: Sequence[tuple[int, JobGroup]], pauses: Mapping[int, int | None]
) -> list[JobGroup]:
    return after_pauses(groups, pauses) if pauses else in_order(group for _, group in groups)
