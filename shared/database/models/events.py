"""The tables of the changes of jobs, and of the webhooks to which they are posted."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Identity,
    Index,
    LargeBinary,
    SmallInteger,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base


class JobEvent(Base):
    """One change of a job, or the acceptance of a batch. Triggers of PostgreSQL write it.

    It holds no address and no text, so an erasure need not find it. Rows are removed after
    OUTBOX_EVENT_RETENTION, or when their user has too many (shared/events/removing.py).
    """

    __tablename__ = "job_events"

    # The later of two events of one job has the larger id: it is drawn while the row of the
    # job is locked. Ids of other jobs may be committed in another order.
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    batch_id: Mapped[int] = mapped_column(BigInteger)
    # NULL means all jobs of the batch, which were accepted together.
    email_job_id: Mapped[int | None] = mapped_column(BigInteger)
    happened_at: Mapped[datetime] = mapped_column(TIME)
    # When the job is due. Set in state SCHEDULED only.
    due_at: Mapped[datetime | None] = mapped_column(TIME)
    # How many jobs were accepted. Set without `email_job_id` only.
    job_count: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[int] = mapped_column(SmallInteger)
    # Number of attempts begun.
    attempt: Mapped[int] = mapped_column(SmallInteger)
    user_id: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index(None, "user_id", "id"),)


class JobEventCount(Base):
    """How many events of a user are stored, and which were removed."""

    __tablename__ = "job_event_counts"

    user_id: Mapped[str] = mapped_column(Text, primary_key=True)
    # The stored events of the user up to `JobEventCounting.counted_to`.
    n: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Events of the user were removed up to this id. Those after it are all stored.
    removed_to: Mapped[int] = mapped_column(BigInteger, server_default="0")

    __table_args__ = (CheckConstraint("n >= 0", name="n_not_negative"),)


class JobEventCounting(Base):
    """Up to which event they are counted. Its one row is locked to count and to remove events."""

    __tablename__ = "job_event_counting"

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    counted_to: Mapped[int] = mapped_column(BigInteger, server_default="0")

    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)


class WebhookRow(Base):
    """A URL to which a user's events are posted, and how far that has come."""

    __tablename__ = "webhooks"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    user_id: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    # A Fernet token.
    secret: Mapped[bytes] = mapped_column(LargeBinary)
    # The secret before the last rotation signs too until that time.
    old_secret: Mapped[bytes | None] = mapped_column(LargeBinary)
    old_secret_until: Mapped[datetime | None] = mapped_column(TIME)
    # Which events are posted. NULL or empty means any.
    sender_id: Mapped[int | None] = mapped_column(BigInteger)
    states: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger), server_default="{}")
    disabled: Mapped[bool] = mapped_column(server_default=text("false"))
    # Every change by a caller increases it.
    revision: Mapped[int] = mapped_column(BigInteger, server_default="1")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # The events up to this one were delivered, or are in `webhook_deliveries`.
    after_event: Mapped[int] = mapped_column(BigInteger)
    # When to look for events again. A process that works on the webhook sets it to the end of its
    # lease, which fences its own updates.
    next_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # How many requests in a row failed, since when, and why the last one did.
    failures: Mapped[int] = mapped_column(server_default="0")
    failing_since: Mapped[datetime | None] = mapped_column(TIME)
    error: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("failures >= 0", name="failures_not_negative"),
        Index(None, "user_id", "id"),
        Index("ix_webhooks_next", "next_at", postgresql_where=text("NOT disabled")),
    )


class WebhookDeliveryRow(Base):
    """A request with events that has failed. The events are read again for each try."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    webhook_id: Mapped[int] = mapped_column(BigInteger)
    # It has the webhook's events after the first and up to the second of these ids.
    after_event: Mapped[int] = mapped_column(BigInteger)
    last_event: Mapped[int] = mapped_column(BigInteger)
    event_count: Mapped[int]
    attempts: Mapped[int] = mapped_column(server_default="1")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # When to try again. NULL means that it was given up.
    next_at: Mapped[datetime | None] = mapped_column(TIME)
    http_status: Mapped[int | None]
    error: Mapped[str] = mapped_column(Text)

    __table_args__ = (Index(None, "webhook_id", "id"), Index(None, "created_at"))
