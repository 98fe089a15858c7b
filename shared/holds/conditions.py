"""The conditions of statements on jobs that may be sent although the installation is held.

While nothing is held, they cost one look at an empty table.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, SQLColumnExpression, and_, or_, select
from sqlalchemy.orm import aliased

from outbox_server.shared.database.models import (
    Attempt,
    EmailJob,
    HeldSend,
    HoldRelease,
    HoldRow,
    Sender,
)

# No batch has this id.
NEW_BATCH: Final = 0


def was_sending() -> ColumnElement[bool]:
    """Return the condition that a job was SENDING when the hold began."""
    found: ColumnElement[bool] = (
        select(HeldSend.email_job_id)
        .where(HeldSend.email_job_id == EmailJob.id)
        .correlate(EmailJob)
        .exists()
    )
    return found


def may_be_sent() -> ColumnElement[bool]:
    """Return the condition that no hold keeps a job from being sent."""
    released = (
        select(HoldRelease.id)
        .where(
            *_of_sender(EmailJob.sender_id),
            _any_or(HoldRelease.batch_id, HoldRelease.batch_id == EmailJob.batch_id),
            _any_or(HoldRelease.due_from, EmailJob.scheduled_at >= HoldRelease.due_from),
            _any_or(HoldRelease.due_before, EmailJob.scheduled_at < HoldRelease.due_before),
            _any_or(HoldRelease.sending, HoldRelease.sending == was_sending()),
        )
        .correlate(EmailJob)
        .exists()
    )
    # A retry moves the due time. A job that was released by its due time stays released.
    begun = (
        select(Attempt.attempt)
        .where(
            Attempt.email_job_id == EmailJob.id,
            Attempt.started_at >= select(HoldRow.held_at).scalar_subquery(),
        )
        .correlate(EmailJob)
        .exists()
    )
    return or_(nothing_is_held(), released, and_(EmailJob.attempt > 0, begun))


def sender_may_send(
    sender: SQLColumnExpression[int], batch: int | None = None
) -> ColumnElement[bool]:
    """Return the condition that some mail of a sender may be sent, as far as holds decide.

    `batch` restricts it to mail of one batch; NEW_BATCH is none that exists.
    """
    release = select(HoldRelease.id).where(*_of_sender(sender))
    if batch is not None:
        release = release.where(_any_or(HoldRelease.batch_id, HoldRelease.batch_id == batch))
    return or_(nothing_is_held(), release.correlate_except(HoldRelease).exists())


def nothing_is_held() -> ColumnElement[bool]:
    """Return the condition that the installation is not held."""
    held: ColumnElement[bool] = select(HoldRow.singleton).exists()
    return ~held


def _of_sender(sender: SQLColumnExpression[int]) -> tuple[ColumnElement[bool], ...]:
    # The table has an alias, because `sender` may be a column of the statement's own table.
    row = aliased(Sender)
    owner = select(row.user_id).where(row.id == sender).correlate_except(row).scalar_subquery()
    return (
        _any_or(HoldRelease.sender_id, HoldRelease.sender_id == sender),
        _any_or(HoldRelease.user_id, HoldRelease.user_id == owner),
    )


def _any_or(column: Any, condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return or_(column.is_(None), condition)
