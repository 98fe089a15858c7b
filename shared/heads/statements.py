"""The statements that read senders to load them into Redis (shared/heads/loader.py)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    SQLColumnExpression,
    Subquery,
    and_,
    any_,
    bindparam,
    case,
    cast,
    extract,
    func,
    lateral,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, aggregate_order_by

from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import (
    Attempt,
    Cooldown,
    EmailJob,
    HeadMarker,
    Sender,
    UserRow,
)
from outbox_server.shared.database.pauses import (
    first_end,
    has_paused_batch,
    sendable_of,
    sender_is_active,
)
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.holds.conditions import may_be_sent
from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.smtp.endpoint_columns import OAUTH2_CREDENTIALS_ID
from outbox_server.shared.states import JobState, SenderState

# Statements for many senders take them as one array: with a parameter for each of them, the driver
# and PostgreSQL need longer for the text than for the rows.
_SENDERS: Final[Any] = bindparam("senders", type_=ARRAY(BigInteger))


def _array(column: Any, *order: Any) -> Any:
    return func.array_agg(aggregate_order_by(column, *order))


def _age_ms(time: SQLColumnExpression[Any]) -> ColumnElement[Any]:
    return cast(func.floor(extract("epoch", func.clock_timestamp() - time) * 1000), BigInteger)


def unix_ms_of(time: SQLColumnExpression[Any]) -> ColumnElement[Any]:
    """Convert like shared.database.engine.unix_ms, but in SQL, as heads have many jobs."""
    return cast(func.ceil(extract("epoch", time) * 1000), BigInteger)


def _heads_statement() -> Select[Any]:
    waiting = (
        select(EmailJob.id, EmailJob.attempt, EmailJob.scheduled_at)
        .where(
            EmailJob.sender_id == Sender.id,
            # Nothing of a deleted sender is sent, and a million rows may wait to be cancelled.
            Sender.deleted_at.is_(None),
            sendable_of(Sender.id),
            may_be_sent(),
        )
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(HEAD_SIZE + 1)
        .correlate(Sender)
        .subquery()
    )
    order = (waiting.c.scheduled_at, waiting.c.id)
    jobs = lateral(
        select(
            _array(waiting.c.id, *order).label("ids"),
            _array(waiting.c.attempt, *order).label("attempts"),
            _array(unix_ms_of(waiting.c.scheduled_at), *order).label("dues"),
        )
    )
    markers = lateral(
        select(func.array_agg(HeadMarker.id).label("markers"))
        .where(HeadMarker.sender_id == Sender.id)
        .correlate(Sender)
    )
    cooldown = (
        select(Cooldown.next_probe_at - func.statement_timestamp())
        .where(Cooldown.sender_id == Sender.id)
        .correlate(Sender)
        .scalar_subquery()
    )
    waiting_at_all = (
        select(EmailJob.id)
        .where(EmailJob.sender_id == Sender.id, in_state(JobState.SCHEDULED))
        .correlate(Sender)
        .exists()
    )
    return (
        select(
            Sender.id,
            Sender.user_id,
            Sender.hourly_limit,
            Sender.min_gap_ms,
            Sender.max_in_flight,
            Sender.revision,
            Sender.sending_hours,
            unix_ms_of(func.statement_timestamp()).label("now"),
            Sender.smtp_host,
            Sender.smtp_port,
            Sender.smtp_security,
            Sender.smtp_username,
            Sender.smtp_password,
            OAUTH2_CREDENTIALS_ID.label("oauth2_credentials_id"),
            # A pause until a time is a limit like the sending hours, so that it ends on time.
            and_(
                or_(sender_is_active(), Sender.paused_until.is_not(None)),
                Sender.deleted_at.is_(None),
            ).label("active"),
            case((Sender.state == SenderState.PAUSED, unix_ms_of(Sender.paused_until))).label(
                "paused_until"
            ),
            first_end(Sender.id).label("wake"),
            and_(has_paused_batch(Sender.id), waiting_at_all).label("left_out"),
            cooldown.label("cooldown"),
            Sender.shard_key,
            UserRow.hourly_limit.label("user_hourly_limit"),
            UserRow.min_gap_ms.label("user_min_gap_ms"),
            jobs.c.ids,
            jobs.c.attempts,
            jobs.c.dues,
            markers.c.markers,
        )
        .select_from(Sender)
        .outerjoin(UserRow, UserRow.user_id == Sender.user_id)
        .join(jobs, true())
        .join(markers, true())
        .where(Sender.id == any_(_SENDERS))
    )


def _history_statement() -> Select[Any]:
    reach = bindparam("reach", type_=INTERVAL)
    each = _history(
        Attempt.sender_id == any_(_SENDERS), EmailJob.sender_id == any_(_SENDERS), reach
    )
    return _grouped(each, each.c.sender_id)


def user_history_statement(user_ids: Sequence[str], reach: timedelta) -> Select[Any]:
    """Return the statement for the sends of all senders of these users, by `user_id`."""
    senders = select(Sender.id).where(Sender.user_id.in_(user_ids))
    of_attempt, of_job = Attempt.sender_id.in_(senders), EmailJob.sender_id.in_(senders)
    each = _history(of_attempt, of_job, literal(reach, INTERVAL))
    return _grouped(each, Sender.user_id, Sender.id == each.c.sender_id)


def user_limits_statement(
    user_ids: Sequence[str],
) -> Select[str, int | None, int | None]:
    """Return the statement for the limits that were set for users. Most users have no row."""
    return select(UserRow.user_id, UserRow.hourly_limit, UserRow.min_gap_ms).where(
        UserRow.user_id.in_(user_ids)
    )


def shard_keys_statement(sender_ids: Sequence[int]) -> Select[int, int | None]:
    """Return the statement for the senders that have a shard key."""
    return select(Sender.id, Sender.shard_key).where(
        Sender.id.in_(sender_ids), Sender.shard_key.is_not(None)
    )


def senders_of_users_statement(user_ids: Sequence[str]) -> Select[int, int | None]:
    """Return the statement for the senders with a shard key of these users, even deleted ones."""
    return select(Sender.id, Sender.shard_key).where(
        Sender.user_id.in_(user_ids), Sender.shard_key.is_not(None)
    )


def routing_statement(user_id: str, shard_key: int) -> Select[Any]:
    """Return the statement that gives all senders of a user their shard key, with markers."""
    moved = (
        update(Sender)
        .where(Sender.user_id == user_id, Sender.shard_key.is_(None))
        .values(shard_key=shard_key)
        .returning(Sender.id.label("sender_id"))
        .cte("moved")
    )
    return select(moved.c.sender_id).add_cte(marking_stale(moved))


def _history(
    of_attempt: ColumnElement[bool], of_job: ColumnElement[bool], reach: ColumnElement[timedelta]
) -> Subquery:
    ends = select(
        Attempt.sender_id,
        Attempt.email_job_id,
        Attempt.attempt,
        _age_ms(Attempt.ended_at).label("ms"),
        Attempt.counted,
        literal(False).label("leased"),
    ).where(
        of_attempt,
        Attempt.ended_at > func.statement_timestamp() - reach,
    )
    leases = select(
        EmailJob.sender_id,
        EmailJob.id,
        EmailJob.attempt,
        -_age_ms(EmailJob.lease_until),
        literal(True),
        literal(True),
    ).where(of_job, in_state(JobState.SENDING))
    return ends.union_all(leases).subquery()


def _grouped(each: Subquery, owner: Any, *join: ColumnElement[bool]) -> Select[Any]:
    # As arrays: one row per end would be ten times as expensive to transfer.
    columns = ("email_job_id", "attempt", "ms", "counted")
    arrays = (func.array_agg(each.c[name]).label(name) for name in columns)
    return select(owner, each.c.leased, *arrays).where(*join).group_by(owner, each.c.leased)


# Built once, because that takes longer than to run them for a sender.
# Settings, first waiting jobs and markers of `senders`.
HEADS_STATEMENT: Final = _heads_statement()
# The ends within `reach`, and the leases, of `senders` that Redis lost.
HISTORY_STATEMENT: Final = _history_statement()
