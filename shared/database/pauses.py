"""Decides whether a sender or a batch is paused now.

A pause is one change of one row, however many jobs wait. A pause until a time ends without any
write: its row stays as it is, and each statement compares the time with PostgreSQL's clock. So no
process has to be alive at that time, and the end is never late. A load of the sender's head at that
time brings the jobs of a batch back (`first_end`, `wake` in load_head.lua).

Marks lock the batch FOR SHARE and check these conditions on the locked row, so a pause, which
changes that row, waits for the marks under way, and later marks see it.

Jobs of a paused batch are left out of the heads. They stay where they are in the index of heads: a
load passes over them, about 0.2 s for a million.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, and_, any_, func, or_, select, true

from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.models import Batch, EmailJob, Sender
from outbox_server.shared.states import SenderState

# The paused batches that a sender may have. Each is compared with every job that a load reads.
MOST_PAUSED_BATCHES: Final = 100


def sender_is_active() -> ColumnElement[bool]:
    """Return the condition that a sender is not paused, or that its pause has ended."""
    return or_(
        Sender.state == SenderState.ACTIVE,
        and_(Sender.paused_until.is_not(None), Sender.paused_until <= func.clock_timestamp()),
    )


def _may_be_paused() -> ColumnElement[bool]:
    # The condition of the index `ix_batches_paused`.
    return or_(Batch.paused_at.is_not(None), Batch.respreading)


def pause_lasts() -> ColumnElement[bool]:
    """Return the condition that PauseBatch keeps the mail of a batch back now."""
    until = Batch.paused_until
    return and_(Batch.paused_at.is_not(None), or_(until.is_(None), until > func.clock_timestamp()))


def batch_is_paused() -> ColumnElement[bool]:
    """Return the condition that nothing of a batch may be sent now.

    It is paused, or new due times of its jobs are being written.
    """
    return and_(_may_be_paused(), or_(Batch.respreading, pause_lasts()))


def _paused_batches(sender: Any) -> Any:
    return (
        select(Batch.id)
        .where(Batch.sender_id == sender, batch_is_paused())
        .correlate_except(Batch)
        .scalar_subquery()
    )


def in_paused_batch(sender: Any) -> ColumnElement[bool]:
    """Return the condition that the batch of a job is paused; `sender` is the job's sender."""
    # `+ 0`: see `waits_of`.
    return EmailJob.batch_id + 0 == any_(func.array(_paused_batches(sender)))


def has_paused_batch(sender: Any) -> ColumnElement[bool]:
    """Return the condition that a sender has a paused batch."""
    found: ColumnElement[bool] = (
        select(Batch.id)
        .where(Batch.sender_id == sender, batch_is_paused())
        .correlate_except(Batch)
        .exists()
    )
    return found


def sendable_of(sender: Any) -> ColumnElement[bool]:
    """Return the condition that a job waits and that its batch is not paused."""
    return waits_of(sender) & in_paused_batch(sender).is_not(true())


def first_end(sender: Any) -> Any:
    """Return the time until the first pause of a batch of the sender ends; NULL if none does."""
    return (
        select(func.min(Batch.paused_until) - func.clock_timestamp())
        .where(
            Batch.sender_id == sender,
            _may_be_paused(),
            Batch.paused_until > func.clock_timestamp(),
        )
        .correlate_except(Batch)
        .scalar_subquery()
    )
