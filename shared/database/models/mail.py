"""The tables of users, batches, jobs and attempts."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    SmallInteger,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base, time_and_sequence
from outbox_server.shared.states import PURGEABLE, JobState


class ApiKeyRow(Base):
    """An API key, with only the hash of its secret (see `shared.auth.keys`)."""

    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    # SHA-256 of the caller's secret of 256 random bits.
    secret_hash: Mapped[bytes] = mapped_column(LargeBinary)
    kind: Mapped[int] = mapped_column(SmallInteger)
    user_id: Mapped[str | None] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text, server_default="")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    last_used_at: Mapped[datetime | None] = mapped_column(TIME)
    revoked_at: Mapped[datetime | None] = mapped_column(TIME)
    # From then on it is not accepted. NULL means that it never expires.
    expires_at: Mapped[datetime | None] = mapped_column(TIME)
    # It may call only methods that change nothing (shared/rpc/reads.py).
    read_only: Mapped[bool] = mapped_column(server_default=text("false"))

    __table_args__ = (
        CheckConstraint("kind BETWEEN 1 AND 3", name="kind_known"),
        CheckConstraint("(kind = 1) = (user_id IS NOT NULL)", name="user_of_user_keys"),
        CheckConstraint("octet_length(secret_hash) = 32", name="secret_hash_is_sha256"),
        Index("ix_api_keys_user_id", "user_id", "key_id"),
    )


class UserRow(Base):
    """What an operator has set for a user, and what is counted for it. Most users have no row.

    NULL in the column of a quota means the default, `OUTBOX_USER_...`.
    """

    __tablename__ = "users"

    user_id: Mapped[str] = mapped_column(Text, primary_key=True)
    waiting_jobs: Mapped[int | None] = mapped_column(BigInteger)
    senders: Mapped[int | None] = mapped_column(BigInteger)
    calls: Mapped[int | None] = mapped_column(BigInteger)
    uploads: Mapped[int | None] = mapped_column(BigInteger)
    watches: Mapped[int | None] = mapped_column(BigInteger)
    stored_rejections: Mapped[int | None] = mapped_column(BigInteger)
    unproven_endpoints: Mapped[int | None] = mapped_column(BigInteger)
    stored_events: Mapped[int | None] = mapped_column(BigInteger)
    suppressions: Mapped[int | None] = mapped_column(BigInteger)
    webhooks: Mapped[int | None] = mapped_column(BigInteger)
    # Limits of all its senders together; 0 means none, NULL the default.
    hourly_limit: Mapped[int | None] = mapped_column(BigInteger)
    min_gap_ms: Mapped[int | None] = mapped_column(BigInteger)
    # Normalised by shared/sender_domains.py. Used under OUTBOX_SENDER_POLICY=domains.
    sender_domains: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    # How many rows of `batch_rejections` the user's batches have.
    stored_rejections_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # When an operator last changed the user. NULL means never: the row has only the count.
    updated_at: Mapped[datetime | None] = mapped_column(TIME)

    __table_args__ = (
        CheckConstraint(
            "least(waiting_jobs, senders, calls, uploads, watches, stored_rejections) >= 0",
            name="quotas_not_negative",
        ),
        CheckConstraint("stored_rejections_count >= 0", name="count_not_negative"),
    )


class Batch(Base):
    """One accepted request. One transaction writes it with all its jobs."""

    __tablename__ = "batches"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[str] = mapped_column(Text)
    sender_id: Mapped[int] = mapped_column(ForeignKey("senders.id"))
    request_id: Mapped[str] = mapped_column(Text)
    # SHA-256 of the options and the payload. It distinguishes a repeated request from a reused id.
    request_hash: Mapped[bytes] = mapped_column(LargeBinary)
    # Liquid sources. NULL means the row's own column of that name, unchanged.
    subject: Mapped[str | None] = mapped_column(Text)
    body: Mapped[str | None] = mapped_column(Text)
    html: Mapped[str | None] = mapped_column(Text)
    # The names of the values in `email_jobs.variables`, in the same order.
    # The column of the CSV that has the addresses. NULL: rows, or a batch of an older release.
    email_column: Mapped[str | None] = mapped_column(Text)
    variable_names: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    start_at: Mapped[datetime] = mapped_column(TIME)
    spacing_ms: Mapped[int] = mapped_column(BigInteger, server_default="0")
    duplicates: Mapped[int] = mapped_column(SmallInteger)
    mode: Mapped[int] = mapped_column(SmallInteger)
    expire_after_ms: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    accepted_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    rejected_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    duplicate_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    suppressed_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    cancelled_at: Mapped[datetime | None] = mapped_column(TIME)
    # The latest first due time of its jobs, for forecasts. NULL means that it has no jobs.
    last_due_at: Mapped[datetime | None] = mapped_column(TIME)
    # The span of the call that brought it (W3C's `traceparent`). NULL means no trace.
    trace_parent: Mapped[str | None] = mapped_column(Text)
    # A Liquid source for Reply-To, and [name, Liquid source] of each further header.
    reply_to: Mapped[str | None] = mapped_column(Text)
    headers: Mapped[list[list[str]] | None] = mapped_column(JSONB(none_as_null=True))
    # The name of the variable with the recipient's name. NULL means none.
    name_column: Mapped[str | None] = mapped_column(Text)
    # The caller's own id of the batch. NULL means none.
    external_id: Mapped[str | None] = mapped_column(Text)
    labels: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))
    # Whether some of its jobs have labels of their own.
    row_labels: Mapped[bool] = mapped_column(server_default="false")
    # Whether SendTestEmail made it. Its one mail has a header that says so.
    test: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    # When it was paused, and when the pause ends by itself (shared/database/pauses.py). Without
    # `paused_at` it is not paused; without `paused_until` only a call ends the pause.
    paused_at: Mapped[datetime | None] = mapped_column(TIME)
    paused_until: Mapped[datetime | None] = mapped_column(TIME)
    # Whether new due times are being written (`BatchRespread`). None of its mail is sent meanwhile.
    respreading: Mapped[bool] = mapped_column(server_default=text("false"))
    # The number of jobs between `start_at` and `last_due_at` since the last change of the times.
    # NULL means `accepted_count`.
    spread_count: Mapped[int | None] = mapped_column(BigInteger)
    # Every change by a call increments it, so that dispatchers read the templates again.
    revision: Mapped[int] = mapped_column(BigInteger, server_default="1")

    __table_args__ = (
        CheckConstraint("state IN (1, 2)", name="state_known"),
        CheckConstraint("spacing_ms >= 0", name="spacing_not_negative"),
        CheckConstraint("octet_length(trace_parent) = 55", name="trace_parent_length"),
        Index(None, "user_id", "request_id", unique=True),
        Index(None, "user_id", "id"),
        Index(None, "sender_id", "id"),
        # Finds the batches of a user that have rejections, for an erasure.
        Index("ix_batches_rejected", "user_id", "id", postgresql_where=text("rejected_count > 0")),
        # Finds the batches of a sender whose jobs are left out of its head. Few rows are in it.
        Index(
            "ix_batches_paused",
            "sender_id",
            postgresql_where=text("paused_at IS NOT NULL OR respreading"),
        ),
    )


class BatchRejection(Base):
    """A CSV row that was not accepted. Rows are numbered from 1, without the header."""

    __tablename__ = "batch_rejections"

    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    row_number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    # The wrong column. Empty means the row as a whole.
    column_name: Mapped[str] = mapped_column(Text)
    # UPPER_SNAKE_CASE and stable. `detail` is for people.
    reason: Mapped[str] = mapped_column(Text)
    detail: Mapped[str] = mapped_column(Text)


class BatchCancellation(Base):
    """A cancelled batch whose rows are not all CANCELLED yet (shared/database/cancellations.py)."""

    __tablename__ = "batch_cancellations"

    batch_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    cancelled_at: Mapped[datetime] = mapped_column(TIME)
    # The rows up to this id are done.
    swept_to: Mapped[int] = mapped_column(BigInteger, server_default="0")

    __table_args__ = (Index(None, "sender_id"),)


class BatchRespread(Base):
    """A batch whose waiting jobs get new due times (services/scheduler/respreading.py)."""

    __tablename__ = "batch_respreads"

    batch_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    start_at: Mapped[datetime] = mapped_column(TIME)
    spacing_ms: Mapped[int] = mapped_column(BigInteger)
    # The rows up to this id are done, and this many jobs have a new time.
    done_to: Mapped[int] = mapped_column(BigInteger, server_default="0")
    placed: Mapped[int] = mapped_column(BigInteger, server_default="0")


class EmailJob(Base):
    """One mail to one recipient. Its id is its identity everywhere."""

    __tablename__ = "email_jobs"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    batch_id: Mapped[int] = mapped_column(BigInteger)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    # The due time. A retry moves it.
    scheduled_at: Mapped[datetime] = mapped_column(TIME)
    # From this time on it must not be sent any more. NULL means that it never expires.
    expires_at: Mapped[datetime | None] = mapped_column(TIME)
    # SENDING only: when the dispatcher's lease expires.
    lease_until: Mapped[datetime | None] = mapped_column(TIME)
    # When it reached its final state.
    finished_at: Mapped[datetime | None] = mapped_column(TIME)
    row_number: Mapped[int]
    state: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    # Number of attempts begun. The number of the attempt in flight is the fencing token.
    attempt: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    # Number of attempts that failed and may be repeated: the position in OUTBOX_RETRY_BACKOFF.
    failures: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    recipient: Mapped[str] = mapped_column(Text)
    # When the server first deferred it (reply class DEFERRED). NULL means that it has not.
    deferred_since: Mapped[datetime | None] = mapped_column(TIME)
    # The case-folded address, by which releases before schema 0014 compare. NULL means that
    # `recipient` is all ASCII. The lower case of other letters depends on PostgreSQL's locale.
    recipient_key: Mapped[str | None] = mapped_column(Text)
    # The address for comparison with suppressions, if it has letters beyond ASCII. NULL beside a
    # `recipient_key`: a job of an older release (shared/database/recipient_keys.py).
    address_key: Mapped[str | None] = mapped_column(Text)
    # A JSON array of strings, in the order of `batches.variable_names`. NULL means none. It is text
    # instead of jsonb: SQL never reads into it, and jsonb would be parsed at every COPY.
    variables: Mapped[str | None] = mapped_column(Text)
    # The caller's own id of the job. NULL means none. `external_key` contains the user, so that a
    # search reads no jobs of others (shared/intake/tags.py).
    external_id: Mapped[str | None] = mapped_column(Text)
    external_key: Mapped[int | None] = mapped_column(BigInteger)
    # They take precedence over those of the batch. No index: each label would cost about as much as
    # the job's row. A list reads jobs of the batches that may have matches.
    labels: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))

    __table_args__ = (
        CheckConstraint("state BETWEEN 1 AND 8", name="state_known"),
        CheckConstraint("(state = 2) = (lease_until IS NOT NULL)", name="lease_while_sending"),
        CheckConstraint("(state > 2) = (finished_at IS NOT NULL)", name="finished_when_final"),
        # For a sender's head: the first waiting jobs by (due, id).
        Index(
            "ix_email_jobs_head",
            "sender_id",
            "scheduled_at",
            "id",
            postgresql_where=text(f"state = {JobState.SCHEDULED:d}"),
        ),
        Index(None, "batch_id", "id"),
        # Finds failed jobs in large batches. It is empty as long as all goes well.
        Index(
            "ix_email_jobs_trouble",
            "batch_id",
            "id",
            postgresql_where=text(f"state IN ({JobState.FAILED:d}, {JobState.UNCERTAIN:d})"),
        ),
        # Finds the jobs of one sender to one address, so that nothing of others is read. An index
        # of a hash makes COPY 18 % slower and costs 30 bytes per row; one of the text would cost 42
        # % and 75 bytes. Statements must compare the address and the sender too.
        Index(
            "ix_email_jobs_address",
            text("hashtextextended(COALESCE(recipient_key, lower(recipient)), sender_id)"),
        ),
        Index(
            "ix_email_jobs_lease",
            "lease_until",
            postgresql_where=text(f"state = {JobState.SENDING:d}"),
        ),
        # For retention: the oldest finished jobs. UNCERTAIN ones wait for a caller's decision.
        Index(
            "ix_email_jobs_finished",
            "finished_at",
            postgresql_where=text("state IN (" + ", ".join(map(str, PURGEABLE)) + ")"),
        ),
        # In the order of lists.
        Index(
            "ix_email_jobs_external_key",
            "external_key",
            "batch_id",
            "id",
            postgresql_where=text("external_key IS NOT NULL"),
        ),
    )


class Attempt(Base):
    """One try to hand a job to SMTP. It is kept as long as its job."""

    __tablename__ = "attempts"

    email_job_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[datetime] = mapped_column(TIME)
    ended_at: Mapped[datetime] = mapped_column(TIME)
    outcome: Mapped[int] = mapped_column(SmallInteger)
    # Whether it takes an entry of the window: its body was begun, or may have been.
    counted: Mapped[bool]
    # Its start minus the earliest instant at which the limits allowed it. NULL means unknown.
    late_ms: Mapped[int | None]
    smtp_code: Mapped[int | None] = mapped_column(SmallInteger)
    # RFC 3463, such as 5.1.1.
    enhanced_code: Mapped[str | None] = mapped_column(Text)
    message: Mapped[str | None] = mapped_column(Text)
    # The meaning of the server's reply (`shared.states.ReplyClass`). NULL means no reply.
    reply_class: Mapped[int | None] = mapped_column(SmallInteger)
    # `dispatchers.id` of the process that made it. NULL means unknown.
    dispatcher: Mapped[int | None]
    # host:port, or `relay` for the operator's. NULL means that no server was chosen yet, or
    # unknown.
    endpoint: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("outcome BETWEEN 1 AND 6", name="outcome_known"),
        CheckConstraint("ended_at >= started_at", name="ends_after_start"),
        # The limiter's history, which is loaded into an empty Redis.
        Index("ix_attempts_history", "sender_id", "ended_at"),
    )


class HeadMarker(Base):
    """A request to load a sender's head again.

    The transaction that changes what the head depends on writes it, and the load deletes it. An old
    marker means that a process died in between.
    """

    __tablename__ = "head_markers"

    id: Mapped[int] = mapped_column(
        BigInteger,
        Identity(),
        primary_key=True,
        default=time_and_sequence("head_markers_id_seq"),
    )
    sender_id: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.clock_timestamp())

    __table_args__ = (Index(None, "sender_id"),)


class Suppression(Base):
    """An address that a user's mail must never go to."""

    __tablename__ = "suppressions"

    user_id: Mapped[str] = mapped_column(Text, primary_key=True)
    # In lower case, because addresses are compared without regard to case. Of an erased person only
    # the hash of the address is kept (shared/database/erased_keys.py).
    address: Mapped[str] = mapped_column(Text, primary_key=True)
    # What the address covers (`shared.states.SuppressionForm`). NULL: every address that case
    # folding makes equal to it, as in the older release that wrote it.
    form: Mapped[int | None] = mapped_column(SmallInteger)
    reason: Mapped[str] = mapped_column(Text, server_default="")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())


class SuppressionCount(Base):
    """How many rows of `suppressions` a user has. Triggers of PostgreSQL keep it exact.

    It has no row before the first call that is limited by the quota, which counts them.
    """

    __tablename__ = "suppression_counts"

    user_id: Mapped[str] = mapped_column(Text, primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (CheckConstraint("n >= 0", name="n_not_negative"),)
