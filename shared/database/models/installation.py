"""The tables about the installation as a whole, most of them with one row."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base


class Installation(Base):
    """One row with the unique id of this installation, which is part of all Message-IDs."""

    __tablename__ = "installation"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    installation_id: Mapped[str] = mapped_column(
        Text, server_default=text("substr(md5((gen_random_uuid())::text), 1, 12)")
    )

    __table_args__ = (CheckConstraint("singleton", name="one_row"),)


class Heartbeat(Base):
    """One row, which dispatchers write every few seconds: where and when mail could last be sent.

    It tells a restored database from the one that was in use (`shared.holds`).
    """

    __tablename__ = "heartbeat"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    # Grows with every write, and never goes back.
    number: Mapped[int] = mapped_column(BigInteger)
    beat_at: Mapped[datetime] = mapped_column(TIME)
    # The transaction that wrote the row. In a restored dump, another one has written it.
    written_by: Mapped[int] = mapped_column(BigInteger)
    # The identifier of the PostgreSQL cluster. NULL means that the role may not read it.
    system_identifier: Mapped[int | None] = mapped_column(BigInteger)
    timeline: Mapped[int]

    __table_args__ = (CheckConstraint("singleton", name="one_row"),)


class DispatcherRow(Base):
    """A dispatcher process, and the last report about itself. Attempts have its `id`."""

    __tablename__ = "dispatchers"

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    # Unique for each process.
    dispatcher_id: Mapped[str] = mapped_column(Text)
    concurrency: Mapped[int]
    started_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # When it last reported.
    seen_at: Mapped[datetime] = mapped_column(TIME)
    # NULL means that it runs, or was killed.
    stopped_at: Mapped[datetime | None] = mapped_column(TIME)
    draining: Mapped[bool]
    in_flight: Mapped[int]
    # When the oldest send in flight was claimed. NULL means that there is none.
    oldest_lease_at: Mapped[datetime | None] = mapped_column(TIME)
    sent_per_second: Mapped[float] = mapped_column(Double)
    attempts_per_second: Mapped[float] = mapped_column(Double)

    __table_args__ = (Index(None, "dispatcher_id", unique=True), Index(None, "seen_at"))


class EndpointReportRow(Base):
    """The counts of a dispatcher at one SMTP endpoint, of the last 5 to 10 minutes."""

    __tablename__ = "endpoint_reports"

    # Empty for the operator's relay.
    user_id: Mapped[str] = mapped_column(Text, primary_key=True)
    host: Mapped[str] = mapped_column(Text, primary_key=True)
    port: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    # `dispatchers.id`.
    dispatcher: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    # Attempts by `shared.states.ReplyClass`; the first number counts attempts without a reply.
    replies: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    # Attempts by bucket of `shared.smtp.latencies`.
    latencies: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    # NULL means that the circuit is closed.
    circuit_open_at: Mapped[datetime | None] = mapped_column(TIME)
    next_probe_at: Mapped[datetime | None] = mapped_column(TIME)

    __table_args__ = (Index(None, "dispatcher"),)


class HoldRow(Base):
    """One row while the installation is held: dispatchers mark only jobs that were released."""

    __tablename__ = "hold"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    held_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # `shared.states.HoldReason`.
    reason: Mapped[int] = mapped_column(SmallInteger)
    # Why the hold began, in a sentence for operators.
    detail: Mapped[str] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("singleton", name="one_row"),
        CheckConstraint("reason BETWEEN 1 AND 3", name="reason_known"),
    )


class HeldSend(Base):
    """A job that was SENDING when the hold began: nobody knows whether it was sent."""

    __tablename__ = "held_sends"

    email_job_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)


class HoldRelease(Base):
    """A filter of mail that may be sent although the installation is held. NULL means any."""

    __tablename__ = "hold_releases"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(Text)
    sender_id: Mapped[int | None] = mapped_column(BigInteger)
    batch_id: Mapped[int | None] = mapped_column(BigInteger)
    due_from: Mapped[datetime | None] = mapped_column(TIME)
    due_before: Mapped[datetime | None] = mapped_column(TIME)
    # True: only jobs of `held_sends`. False: only the others.
    sending: Mapped[bool | None]
    released_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())


class ErasureKey(Base):
    """One row, since the first erasure: the key of the hashes that replace erased addresses."""

    __tablename__ = "erasure_key"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    key: Mapped[str] = mapped_column(
        Text,
        server_default=text("((gen_random_uuid())::text || (gen_random_uuid())::text)"),
    )

    __table_args__ = (CheckConstraint("singleton", name="one_row"),)


class AgreedSettingsRow(Base):
    """One row, since the first start: the settings that are the same in every process.

    See `shared.agreed.values`. Every mark compares `key_space`, so that a process that works by
    older values sends nothing.
    """

    __tablename__ = "agreed_settings"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    shards: Mapped[int]
    rate_window_ms: Mapped[int] = mapped_column(BigInteger)
    min_gap_ms: Mapped[int] = mapped_column(BigInteger)
    user_hourly_limit: Mapped[int] = mapped_column(BigInteger)
    user_gap_ms: Mapped[int] = mapped_column(BigInteger)
    uncertain_policy: Mapped[str] = mapped_column(Text)
    # The name of the keys in Redis that depend on these values, and the earlier names.
    key_space: Mapped[str] = mapped_column(Text, server_default="")
    old_key_spaces: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    # When a window or a gap last changed: earlier sends kept other limits. NULL means never.
    limits_changed_at: Mapped[datetime | None] = mapped_column(TIME)

    __table_args__ = (
        CheckConstraint("singleton", name="one_row"),
        CheckConstraint("shards BETWEEN 1 AND 4096", name="shards_in_bounds"),
        CheckConstraint("rate_window_ms > 0", name="rate_window_positive"),
        CheckConstraint(
            "least(min_gap_ms, user_hourly_limit, user_gap_ms) >= 0", name="limits_not_negative"
        ),
        CheckConstraint("uncertain_policy IN ('resend', 'hold')", name="uncertain_policy_known"),
    )


class ShardLife(Base):
    """The life of Redis that is valid for a shard: only jobs that were claimed in it are marked.

    See shared/heads/lives.py.
    """

    __tablename__ = "shard_lives"

    shard: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # Unique, so that PostgreSQL treats it as part of a key. A mark locks the row FOR KEY SHARE, so
    # a change of the life waits for marks in progress, and a change of `seen_at` does not.
    life: Mapped[str] = mapped_column(Text, unique=True)
    begun_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # When a dispatcher last found this life in Redis.
    seen_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
