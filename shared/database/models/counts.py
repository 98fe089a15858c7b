"""The tables of job counts: the changes, and the sums into which `services.stats` folds them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Identity,
    SmallInteger,
)
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base


class CountDelta(Base):
    """A change of a count, appended in the transaction that moved the jobs.

    `state` SCHEDULED counts all open jobs, including those in SENDING. These are always few and are
    counted directly, so that a claim writes no delta.
    """

    __tablename__ = "count_deltas"

    # A plain sequence: nobody keeps an id longer than the transaction that folds the row.
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    batch_id: Mapped[int] = mapped_column(BigInteger)
    hour: Mapped[datetime] = mapped_column(TIME)
    state: Mapped[int] = mapped_column(SmallInteger)
    n: Mapped[int] = mapped_column(BigInteger)


class SenderCount(Base):
    """The folded count of a sender's jobs by state."""

    __tablename__ = "sender_counts"

    sender_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    state: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)


class BatchCount(Base):
    """The folded count of a batch's jobs by state."""

    __tablename__ = "batch_counts"

    batch_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    state: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)


class SenderHourCount(Base):
    """The folded count of a sender's jobs by the hour (UTC) in which they reached a state."""

    __tablename__ = "sender_hour_counts"

    sender_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    hour: Mapped[datetime] = mapped_column(TIME, primary_key=True)
    state: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)


class PurgedCount(Base):
    """The number of jobs whose rows were removed after OUTBOX_RETENTION, by the hour of their end.

    Counts that callers see never change by a removal. With this table, the audit can still compare
    them with a recount of the rows. `batch_id` is 0 for batches that were removed as well.
    """

    __tablename__ = "purged_counts"

    batch_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sender_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    hour: Mapped[datetime] = mapped_column(TIME, primary_key=True)
    state: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)
