"""Erases one person's address, variables and replies from the rows of one user.

A call is several transactions. The first one suppresses the address, so nothing more is sent. Each
later one erases some rows, which the next one does not find again. So a call that was interrupted
is simply repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Text,
    and_,
    any_,
    case,
    cast,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.conditions import (
    is_addressed_to,
    may_be_to,
    senders_of,
)
from outbox_server.services.scheduler.storage.job_filters import LAST_ID
from outbox_server.services.scheduler.storage.suppressing import (
    ByAddress,
    EndedPart,
    end_part,
    waiting_to,
)
from outbox_server.services.scheduler.storage.suppressions import (
    SUPPRESSION_COLUMNS,
    SuppressionRecord,
    lock_suppressions,
    store_suppression,
)
from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.erased_keys import ERASED_PREFIX, erased_key
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import (
    Attempt,
    AuditEvent,
    Batch,
    BatchRejection,
    Cooldown,
    EmailJob,
    ErasureKey,
    Suppression,
)
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.intake.addresses import keys_of
from outbox_server.shared.states import JobState, SuppressionForm

# The number of rows that one transaction changes.
ERASED_AT_ONCE: Final = 1_000
# The number of rejections that one statement reads.
_READ_AT_ONCE: Final = 1_000
# The text that replaces an erased text.
_ERASED: Final = "(erased)"


@dataclass(frozen=True, slots=True)
class ReadRejection:
    """A rejection, with the text that may contain an address."""

    batch_id: int
    row_number: int
    detail: str


async def suppress_erased(
    connection: AsyncConnection, user_id: str, address: str
) -> tuple[SuppressionRecord, EndedPart]:
    """Suppress an address by storing only its hash, and end the first waiting jobs to it."""
    await lock_suppressions(connection, user_id)
    await connection.execute(insert(ErasureKey).on_conflict_do_nothing())
    exact, folded = keys_of(address)
    hashed = erased_key(literal(user_id, Text), literal(exact, Text))
    await store_suppression(connection, user_id, hashed, SuppressionForm.EXACT)
    plain = Suppression.address == exact
    if folded != exact:
        # Older releases find this form. A suppression that they wrote still covers the same
        # addresses.
        theirs = and_(Suppression.address == folded, Suppression.form.is_(None))
        older = await connection.scalar(
            owned_by(select(Suppression.address).where(theirs), Suppression.user_id, user_id)
        )
        form = SuppressionForm.FOR_OLDER_RELEASES if older is None else None
        await store_suppression(
            connection, user_id, erased_key(literal(user_id, Text), literal(folded, Text)), form
        )
        only_theirs = Suppression.form.is_distinct_from(SuppressionForm.EXACT)
        plain = or_(plain, and_(Suppression.address == folded, only_theirs))
    await connection.execute(
        owned_by(delete(Suppression).where(plain), Suppression.user_id, user_id)
    )
    row = (
        await connection.execute(
            owned_by(
                select(*SUPPRESSION_COLUMNS).where(Suppression.address == hashed),
                Suppression.user_id,
                user_id,
            )
        )
    ).one()
    waiting = await waiting_to(connection, user_id, [_to_person(user_id, address)])
    return SuppressionRecord(*row), await end_part(connection, waiting)


async def erase_jobs(
    connection: AsyncConnection, user_id: str, address: str, limit: int = ERASED_AT_ONCE
) -> int:
    """Erase up to `limit` jobs, their attempts' replies, and batches for this person alone.

    Return how many jobs were erased. Jobs in flight are left to a later call.
    """
    which = _to_person(user_id, address).by_index
    erased = await connection.execute(_erase_statement(which, user_id, address, limit))
    return int(erased.scalar_one())


async def count_left(connection: AsyncConnection, user_id: str, address: str) -> int:
    """Return how many mails to the address are not erased, whatever their state is now.

    They were being sent when the others were erased, and may have ended since.
    """
    which = _to_person(user_id, address).by_index
    jobs = select(EmailJob.id).where(which, _owned(user_id)).subquery()
    return int(await connection.scalar(select(func.count()).select_from(jobs)) or 0)


async def erase_cooldowns(connection: AsyncConnection, user_id: str, address: str) -> None:
    """Erase replies that contain the address from the cooldowns of the user's senders."""
    senders = func.array(senders_of(user_id).scalar_subquery())
    await connection.execute(
        update(Cooldown)
        .where(Cooldown.sender_id == any_(senders), _contains(Cooldown.message, address))
        .values(message=_ERASED)
    )


async def read_rejections(
    connection: AsyncConnection, user_id: str, after: tuple[int, int]
) -> tuple[list[ReadRejection], tuple[int, int] | None]:
    """Return the user's next rejections after `after`, and where to go on: None if all are read.

    A part is some batches with few rejections, or some rejections of one batch.
    """
    batch_id, row_number = after
    first = batch_id + 1 if row_number == LAST_ID else batch_id
    # In the order of the index of rejected batches, without an equal sign. Otherwise the planner
    # may read the batches of all users by their ids, in order to end after a few of this one.
    theirs = tuple_(Batch.user_id, Batch.id)
    owner = literal(owner_of(user_id), Text)
    listed = (
        select(Batch.id, Batch.rejected_count)
        .where(
            Batch.rejected_count > 0,
            theirs >= tuple_(owner, literal(first, BigInteger)),
            theirs <= tuple_(owner, literal(LAST_ID, BigInteger)),
        )
        .order_by(Batch.user_id, Batch.id)
        .limit(_READ_AT_ONCE)
    )
    batches = (await connection.execute(listed)).all()
    if not batches:
        return [], None
    sizes = accumulate(batch.rejected_count for batch in batches)
    ids = [batch.id for batch, size in zip(batches, sizes, strict=True) if size <= _READ_AT_ONCE]
    ids = ids or [batches[0].id]
    key = (BatchRejection.batch_id, BatchRejection.row_number)
    # In the order of the key with an equal sign for one batch: LIMIT ends the read.
    which = key[0] == ids[0] if len(ids) == 1 else key[0] == any_(literal(ids, ARRAY(BigInteger)))
    place = tuple_(*(literal(part, BigInteger) for part in (batch_id, row_number)))
    statement = (
        select(*key, BatchRejection.detail)
        .where(which, tuple_(*key) > place)
        .order_by(*key)
        .limit(_READ_AT_ONCE)
    )
    rows = [ReadRejection(*row) for row in await connection.execute(statement)]
    if len(rows) == _READ_AT_ONCE:
        return rows, (rows[-1].batch_id, rows[-1].row_number)
    return rows, (ids[-1], LAST_ID)


async def erase_rejections(connection: AsyncConnection, found: list[ReadRejection]) -> None:
    """Erase the texts of these rejections. Their rows, columns and reasons stay."""
    keys = [(one.batch_id, one.row_number) for one in found]
    await connection.execute(
        update(BatchRejection)
        .where(tuple_(BatchRejection.batch_id, BatchRejection.row_number).in_(keys))
        .values(detail=_ERASED)
    )


def _to_person(user_id: str, address: str) -> ByAddress:
    """Return the condition that a job goes to the person, in any spelling of the address."""
    exact, folded = keys_of(address)
    # A job of an older release has only the folded key.
    same = func.coalesce(EmailJob.address_key, exact) == exact
    has_key = and_(func.coalesce(EmailJob.recipient_key, "") == folded, same)
    by_row = or_(is_addressed_to(address), has_key)
    return ByAddress(and_(may_be_to(address, senders_of(user_id)), by_row), by_row)


def _owned(user_id: str) -> ColumnElement[bool]:
    owned = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    return owned.correlate(EmailJob).exists()


def _contains(text: Any, address: str) -> ColumnElement[bool]:
    return func.strpos(func.lower(text), func.lower(address)) > 0


def _erase_statement(which: ColumnElement[bool], user_id: str, address: str, limit: int) -> Any:
    # Open jobs are left: they are SUPPRESSED already, or in flight. Rows of a cancelled batch that
    # still say SCHEDULED are not open.
    ended = ~in_state(JobState.SENDING) & ~is_now(JobState.SCHEDULED)
    picked = (
        select(EmailJob.id, EmailJob.batch_id)
        .where(which, ended, _owned(user_id))
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update()
        .cte("picked")
    )
    jobs = (
        update(EmailJob)
        .where(is_looked_up(EmailJob.id, picked.c.id))
        .values(
            recipient="",
            recipient_key=null(),
            address_key=null(),
            variables=null(),
            external_id=null(),
            external_key=null(),
            labels=null(),
        )
        .returning(EmailJob.id)
        .cte("jobs")
    )
    replies = (
        update(Attempt)
        .where(is_looked_up(Attempt.email_job_id, picked.c.id), Attempt.message.is_not(None))
        .values(message=null())
        .returning(Attempt.email_job_id)
        .cte("replies")
    )
    # The texts of a batch with one recipient may have been written for this person.
    batches = (
        update(Batch)
        .where(is_looked_up(Batch.id, picked.c.batch_id), Batch.accepted_count == 1)
        .values(
            subject=null(),
            body=null(),
            html=null(),
            reply_to=null(),
            headers=null(),
            external_id=null(),
            labels=null(),
            request_id=case(
                (
                    _contains(Batch.request_id, address),
                    literal(ERASED_PREFIX, Text) + cast(Batch.id, Text),
                ),
                else_=Batch.request_id,
            ),
        )
        .returning(Batch.id)
        .cte("own_batches")
    )
    # Events about these jobs lose their texts, and so do those about a batch for this person alone.
    about = [
        literal(f"{kind}/", Text) + cast(rows.c.id, Text)
        for kind, rows in (("email-jobs", picked), ("batches", batches))
    ]
    targets = union_all(*(select(target) for target in about))
    events = (
        update(AuditEvent)
        # An array, so that PostgreSQL uses the index, however many jobs are picked.
        .where(AuditEvent.target == any_(func.array(targets.scalar_subquery())))
        .values(before=null(), after=null(), identity="", reason="")
        .returning(AuditEvent.id)
        .cte("events")
    )
    return select(func.count()).select_from(jobs).add_cte(replies, batches, events)
