"""The tables of changes of many jobs whose rows are written later."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import BigInteger, CheckConstraint, Identity, Index, SmallInteger
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base


class JobChange(Base):
    """A change of some jobs of a batch whose rows are not all written yet.

    See services/scheduler/storage/job_changes.py.
    """

    __tablename__ = "job_changes"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    batch_id: Mapped[int] = mapped_column(BigInteger)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    # A `shared.states.JobChangeKind`.
    kind: Mapped[int] = mapped_column(SmallInteger)
    changed_at: Mapped[datetime] = mapped_column(TIME)
    # The new due time. If it is NULL, the jobs become due `delay` later than they were.
    due_at: Mapped[datetime | None] = mapped_column(TIME)
    delay: Mapped[timedelta | None] = mapped_column(INTERVAL)
    # The number of jobs whose rows are not written yet.
    n: Mapped[int] = mapped_column(BigInteger)
    # How many blocks one transaction writes.
    step: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (
        CheckConstraint("kind BETWEEN 1 AND 3", name="kind_known"),
        Index(None, "batch_id"),
        Index(None, "sender_id"),
    )


class JobChangeBlock(Base):
    """Which of 64 jobs with consecutive ids a change means. It is deleted when they are written."""

    __tablename__ = "job_change_blocks"

    change_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # The id of a job without its last 6 bits.
    block: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # Bit k, from 0 and the lowest first, is the job whose id ends in these 6 bits.
    bits: Mapped[int] = mapped_column(BigInteger)
