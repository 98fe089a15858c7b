"""The tables of senders, of their OAuth 2.0 credentials, and of their cooldowns."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    SmallInteger,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base, time_and_sequence


class Sender(Base):
    """A From address with its SMTP endpoint and limits. It belongs to one user."""

    __tablename__ = "senders"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[str] = mapped_column(Text)
    email: Mapped[str] = mapped_column(Text)
    # `email` before its first change. Its domain is in the Message-IDs of all jobs, which must
    # never change.
    first_email: Mapped[str | None] = mapped_column(Text)
    display_name: Mapped[str] = mapped_column(Text, server_default="")
    # NULL means the relay of OUTBOX_SMTP_URL.
    smtp_host: Mapped[str | None] = mapped_column(Text)
    smtp_port: Mapped[int | None]
    smtp_security: Mapped[int | None] = mapped_column(SmallInteger)
    smtp_username: Mapped[str | None] = mapped_column(Text)
    # A Fernet token. The password is stored only in this form.
    smtp_password: Mapped[bytes | None] = mapped_column(LargeBinary)
    # PEM of CAs that may sign this endpoint's certificate, in addition to the machine's CAs.
    smtp_ca: Mapped[str | None] = mapped_column(Text)
    hourly_limit: Mapped[int]
    # NULL means the operator's floor. The effective gap is never below the floor.
    min_gap_ms: Mapped[int | None]
    # In the format of shared/sending_hours.py. NULL means at any time.
    sending_hours: Mapped[str | None] = mapped_column(Text)
    max_in_flight: Mapped[int] = mapped_column(server_default="5")
    state: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    # PAUSED only: when the pause ends by itself. Then the sender is active, although `state` stays
    # (shared/database/pauses.py). NULL means that only a call ends the pause.
    paused_until: Mapped[datetime | None] = mapped_column(TIME)
    # Every change increments it, so that caches of a sender know when to read it again.
    revision: Mapped[int] = mapped_column(BigInteger, server_default="1")
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # Decides the sender's shard of the queue instead of the id. All senders of a user with limits
    # of its own have the same. Once set, it never changes.
    shard_key: Mapped[int | None] = mapped_column(BigInteger)
    # If set, callers do not see the sender any more. Its history stays.
    deleted_at: Mapped[datetime | None] = mapped_column(TIME)

    __table_args__ = (
        CheckConstraint("hourly_limit > 0", name="hourly_limit_positive"),
        CheckConstraint("min_gap_ms >= 0", name="min_gap_not_negative"),
        CheckConstraint("max_in_flight > 0", name="max_in_flight_positive"),
        CheckConstraint("state IN (1, 2)", name="state_known"),
        CheckConstraint("smtp_security IN (1, 2, 3)", name="smtp_security_known"),
        CheckConstraint(
            "(smtp_host IS NULL) = (smtp_port IS NULL)", name="smtp_host_and_port_together"
        ),
        Index(None, "user_id", "id"),
    )


class OAuth2CredentialsRow(Base):
    """The OAuth 2.0 credentials of a sender's endpoint, and the access token that all share.

    They are written with the endpoint. Credentials that replace others get a new id, so that a
    dispatcher that still has the old endpoint cannot present a new token to the old host.
    """

    __tablename__ = "oauth2_credentials"

    id: Mapped[int] = mapped_column(
        BigInteger,
        Identity(),
        primary_key=True,
        default=time_and_sequence("oauth2_credentials_id_seq"),
    )
    sender_id: Mapped[int] = mapped_column(ForeignKey("senders.id"))
    token_url: Mapped[str] = mapped_column(Text)
    client_id: Mapped[str] = mapped_column(Text)
    scope: Mapped[str] = mapped_column(Text)
    # These three are encrypted (Fernet). Without a refresh token the grant is client credentials.
    client_secret: Mapped[bytes | None] = mapped_column(LargeBinary)
    # The newest refresh token: some providers return a new one with each access token.
    refresh_token: Mapped[bytes | None] = mapped_column(LargeBinary)
    access_token: Mapped[bytes | None] = mapped_column(LargeBinary)
    # Changes with each access token, so that of two tokens requested at once only one is stored.
    version: Mapped[UUID] = mapped_column(Uuid, server_default=func.gen_random_uuid())
    # When to request the next access token, and when this one expires.
    refresh_at: Mapped[datetime | None] = mapped_column(TIME)
    expires_at: Mapped[datetime | None] = mapped_column(TIME)
    # Set while one process requests an access token. After this time another process may do so.
    lease_until: Mapped[datetime | None] = mapped_column(TIME)
    # Requests since the last access token: how many failed, when the next one may be made, the last
    # error, and whether that was a refusal by the provider (else it could not be reached).
    failures: Mapped[int] = mapped_column(server_default="0")
    retry_at: Mapped[datetime | None] = mapped_column(TIME)
    error: Mapped[str | None] = mapped_column(Text)
    refused: Mapped[bool] = mapped_column(server_default=text("false"))

    __table_args__ = (
        CheckConstraint(
            "(access_token IS NULL) = (expires_at IS NULL)"
            " AND (access_token IS NULL) = (refresh_at IS NULL)",
            name="token_and_times_together",
        ),
        CheckConstraint("(error IS NULL) = (retry_at IS NULL)", name="error_and_retry_together"),
        CheckConstraint("failures >= 0", name="failures_not_negative"),
        Index(None, "sender_id", unique=True),
    )


class Cooldown(Base):
    """The cooldown of a sender whose account was refused (quota, block).

    Its mail waits, except for one probe at a time. An accepted probe or ResumeSender deletes the
    row.
    """

    __tablename__ = "cooldowns"

    sender_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    # When the first refusal ended.
    since: Mapped[datetime] = mapped_column(TIME)
    # When the next probe may begin. A refused attempt that began before it changes nothing.
    next_probe_at: Mapped[datetime] = mapped_column(TIME)
    # Number of refusals in a row: the position in the waits of OUTBOX_COOLDOWN.
    refusals: Mapped[int] = mapped_column(server_default="1")
    # The reply of the last refusal.
    smtp_code: Mapped[int | None] = mapped_column(SmallInteger)
    enhanced_code: Mapped[str | None] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)

    __table_args__ = (CheckConstraint("refusals > 0", name="refusals_positive"),)
