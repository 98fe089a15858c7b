"""Create the tables of jobs, attempts and counts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("last_used_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("revoked_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("kind BETWEEN 1 AND 3", name=op.f("ck_api_keys_kind_known")),
        sa.CheckConstraint(
            "(kind = 1) = (user_id IS NOT NULL)", name=op.f("ck_api_keys_user_of_user_keys")
        ),
        sa.CheckConstraint(
            "octet_length(secret_hash) = 32", name=op.f("ck_api_keys_secret_hash_is_sha256")
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "attempts",
        sa.Column("email_job_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("ended_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("outcome", sa.SmallInteger(), nullable=False),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("late_ms", sa.Integer(), nullable=True),
        sa.Column("smtp_code", sa.SmallInteger(), nullable=True),
        sa.Column("enhanced_code", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.CheckConstraint("ended_at >= started_at", name=op.f("ck_attempts_ends_after_start")),
        sa.CheckConstraint("outcome BETWEEN 1 AND 6", name=op.f("ck_attempts_outcome_known")),
        sa.PrimaryKeyConstraint("email_job_id", "attempt", name=op.f("pk_attempts")),
    )
    op.create_index("ix_attempts_history", "attempts", ["sender_id", "ended_at"], unique=False)
    op.create_table(
        "batch_counts",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("batch_id", "state", name=op.f("pk_batch_counts")),
    )
    op.create_table(
        "count_deltas",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("hour", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_count_deltas")),
    )
    op.create_table(
        "email_jobs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("scheduled_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("lease_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("row_number", sa.Integer(), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("attempt", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("recipient", sa.Text(), nullable=False),
        sa.Column("variables", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(state = 2) = (lease_until IS NOT NULL)",
            name=op.f("ck_email_jobs_lease_while_sending"),
        ),
        sa.CheckConstraint(
            "(state > 2) = (finished_at IS NOT NULL)",
            name=op.f("ck_email_jobs_finished_when_final"),
        ),
        sa.CheckConstraint("state BETWEEN 1 AND 8", name=op.f("ck_email_jobs_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_email_jobs")),
    )
    op.create_index(
        op.f("ix_email_jobs_batch_id_id"), "email_jobs", ["batch_id", "id"], unique=False
    )
    op.create_index(
        "ix_email_jobs_head",
        "email_jobs",
        ["sender_id", "scheduled_at", "id"],
        unique=False,
        postgresql_where=sa.text("state = 1"),
    )
    op.create_index(
        "ix_email_jobs_trouble",
        "email_jobs",
        ["batch_id", "id"],
        unique=False,
        postgresql_where=sa.text("state IN (4, 5)"),
    )
    op.create_index(
        "ix_email_jobs_recipient",
        "email_jobs",
        [sa.text("hashtext(lower(recipient))")],
        unique=False,
    )
    op.create_index(
        "ix_email_jobs_lease",
        "email_jobs",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 2"),
    )
    op.create_table(
        "batch_cancellations",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("cancelled_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("swept_to", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_batch_cancellations")),
    )
    op.create_index(
        op.f("ix_batch_cancellations_sender_id"),
        "batch_cancellations",
        ["sender_id"],
        unique=False,
    )
    op.create_table(
        "head_markers",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_head_markers")),
    )
    op.create_index(op.f("ix_head_markers_sender_id"), "head_markers", ["sender_id"], unique=False)
    op.create_table(
        "sender_counts",
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sender_id", "state", name=op.f("pk_sender_counts")),
    )
    op.create_table(
        "sender_hour_counts",
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("hour", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sender_id", "hour", "state", name=op.f("pk_sender_hour_counts")),
    )
    op.create_table(
        "installation",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column(
            "installation_id",
            sa.Text(),
            server_default=sa.text("substr(md5((gen_random_uuid())::text), 1, 12)"),
            nullable=False,
        ),
        sa.CheckConstraint("singleton", name=op.f("ck_installation_one_row")),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_installation")),
    )
    op.create_table(
        "senders",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("first_email", sa.Text(), nullable=True),
        sa.Column("display_name", sa.Text(), server_default="", nullable=False),
        sa.Column("smtp_host", sa.Text(), nullable=True),
        sa.Column("smtp_port", sa.Integer(), nullable=True),
        sa.Column("smtp_security", sa.SmallInteger(), nullable=True),
        sa.Column("smtp_username", sa.Text(), nullable=True),
        sa.Column("smtp_password", sa.LargeBinary(), nullable=True),
        sa.Column("hourly_limit", sa.Integer(), nullable=False),
        sa.Column("min_gap_ms", sa.Integer(), nullable=True),
        sa.Column("sending_hours", sa.Text(), nullable=True),
        sa.Column("max_in_flight", sa.Integer(), server_default="5", nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("revision", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("deleted_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(smtp_host IS NULL) = (smtp_port IS NULL)",
            name=op.f("ck_senders_smtp_host_and_port_together"),
        ),
        sa.CheckConstraint("hourly_limit > 0", name=op.f("ck_senders_hourly_limit_positive")),
        sa.CheckConstraint("max_in_flight > 0", name=op.f("ck_senders_max_in_flight_positive")),
        sa.CheckConstraint("min_gap_ms >= 0", name=op.f("ck_senders_min_gap_not_negative")),
        sa.CheckConstraint(
            "smtp_security IN (1, 2, 3)", name=op.f("ck_senders_smtp_security_known")
        ),
        sa.CheckConstraint("state IN (1, 2)", name=op.f("ck_senders_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_senders")),
    )
    op.create_index(op.f("ix_senders_user_id_id"), "senders", ["user_id", "id"], unique=False)
    op.create_table(
        "suppressions",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("user_id", "address", name=op.f("pk_suppressions")),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("html", sa.Text(), nullable=True),
        sa.Column(
            "variable_names", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False
        ),
        sa.Column("start_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("spacing_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("duplicates", sa.SmallInteger(), nullable=False),
        sa.Column("mode", sa.SmallInteger(), nullable=False),
        sa.Column("expire_after_ms", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("accepted_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("rejected_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("duplicate_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("suppressed_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("cancelled_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_due_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("spacing_ms >= 0", name=op.f("ck_batches_spacing_not_negative")),
        sa.CheckConstraint("state IN (1, 2)", name=op.f("ck_batches_state_known")),
        sa.ForeignKeyConstraint(["sender_id"], ["senders.id"], name=op.f("fk_batches_sender_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_sender_id_id"), "batches", ["sender_id", "id"], unique=False)
    op.create_index(op.f("ix_batches_user_id_id"), "batches", ["user_id", "id"], unique=False)
    op.create_index(
        op.f("ix_batches_user_id_request_id"), "batches", ["user_id", "request_id"], unique=True
    )
    op.create_table(
        "batch_rejections",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("row_number", sa.BigInteger(), nullable=False),
        sa.Column("column_name", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_batch_rejections_batch_id")
        ),
        sa.PrimaryKeyConstraint("batch_id", "row_number", name=op.f("pk_batch_rejections")),
    )
