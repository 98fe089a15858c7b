"""The table of the changes of jobs, which callers watch."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Identity, Index, SmallInteger, Text
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base


class JobEvent(Base):
    """One change of a job, or the acceptance of a batch. Triggers of PostgreSQL write it.

    It holds no address and no text, so an erasure need not find it. Rows are removed after
    OUTBOX_EVENT_RETENTION (shared/events/storage.py).
    """

    __tablename__ = "job_events"

    # Of two events of one job, the later one has the larger id: it is drawn while the row of the
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
