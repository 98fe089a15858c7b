"""The tables of the changes that calls and operators made."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Identity, Index, LargeBinary, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from outbox_server.shared.database.models.base import TIME, Base, time_and_sequence


class AuditEvent(Base):
    """One change that somebody made: who, when, what, and the values before and after."""

    __tablename__ = "audit_events"

    # Operators may keep exports of the log, so no id may come again.
    id: Mapped[int] = mapped_column(
        BigInteger,
        Identity(),
        primary_key=True,
        default=time_and_sequence("audit_events_id_seq"),
    )
    happened_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())
    # Who did it: `key:` and the id of an API key, `local`, or `root@host` for a command.
    actor: Mapped[str] = mapped_column(Text)
    # Who asked for it and why, in the caller's words. May be empty.
    identity: Mapped[str] = mapped_column(Text, server_default="")
    reason: Mapped[str] = mapped_column(Text, server_default="")
    # The action, such as `settings.set` or `UpdateSender`, and its target, which may be empty.
    action: Mapped[str] = mapped_column(Text)
    target: Mapped[str] = mapped_column(Text, server_default="")
    # The user that owns the target. NULL means that none does.
    user_id: Mapped[str | None] = mapped_column(Text)
    # The recipient that the change is about, in the form of `address_key`.
    address_key: Mapped[str | None] = mapped_column(Text)
    # The changed values by name. NULL means that there were none.
    before: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSONB)

    __table_args__ = (
        Index(None, "action", "id"),
        # Lists, the newest first.
        Index(None, "happened_at", "id"),
        Index(None, "user_id", "happened_at", "id"),
        Index(None, "target", "happened_at", "id"),
    )


class ChangeRequest(Base):
    """A request that changed something, by which a repeated call is recognised for a day."""

    __tablename__ = "change_requests"

    # The user that the call acted for; empty for a caller that named none.
    scope: Mapped[str] = mapped_column(Text, primary_key=True)
    request_id: Mapped[str] = mapped_column(Text, primary_key=True)
    # A keyed hash of the method and the request.
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    # The serialized answer. NULL means that there is none yet.
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    # The owner of the changed resource, and the recipient that the request is about, in the form of
    # `address_key`. NULL means that there is none.
    user_id: Mapped[str | None] = mapped_column(Text)
    address_key: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(TIME, server_default=func.now())

    __table_args__ = (
        Index(None, "created_at"),
        Index(None, "scope", "created_at"),
        Index(None, "user_id", "address_key"),
    )
