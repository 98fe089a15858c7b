"""Reads what decides how fast a sender's mail is sent: its limits, and the sends of the window.

At most `_MOST_SENDS` sends are read. So a forecast costs about the same at any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
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
    func,
    lateral,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.cooldowns.columns import COOLDOWN_COLUMNS, cooldown_of
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.counts import in_state, sender_counts
from outbox_server.shared.database.models import (
    Attempt,
    Cooldown,
    EmailJob,
    Sender,
    UserRow,
)
from outbox_server.shared.database.pauses import sender_is_active
from outbox_server.shared.forecast.batch_pauses import read_pauses
from outbox_server.shared.forecast.microseconds import MICROSECOND, to_us
from outbox_server.shared.forecast.openings import Openings
from outbox_server.shared.forecast.simulation import Limiter, Sends
from outbox_server.shared.forecast.user_shares import UserLimiter
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.holds.conditions import NEW_BATCH, sender_may_send
from outbox_server.shared.queue.user_limits import NO_USER_LIMITS, UserSendLimits
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState, SenderState

# The maximum number of sends of the window that are read. If there are more, every n-th is read.
_MOST_SENDS: Final = 2_000
# The number of recent sends from which the duration of a send is computed.
_SAMPLE: Final = 50


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
    # The batches that are paused, with the ends of their pauses; None means that the end is not
    # known.
    pauses: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Whether the sender is paused now."""
        return not self.active or self.limiter.not_before is not None


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


# Built once, because building them takes longer than running them for a sender.
_SENDER: Final[Any] = bindparam("sender_id", type_=BigInteger)
_USER: Final[Any] = bindparam("user_id", type_=Text)
_MOST: Final[Any] = bindparam("most", type_=BigInteger)
_SENDERS_OF_USER: Final = select(Sender.id).where(Sender.user_id == _USER)
# All that the pace of each of `senders` depends on, except its sends.
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
    takes = (row.took or timedelta(0)) // MICROSECOND + (row.late_ms or 0) * 1_000
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
            gap=gap // MICROSECOND,
            window=rules.window // MICROSECOND,
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
        gap=limits.gap // MICROSECOND,
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
