"""The table of senders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.scheduler.storage.cancelling import end_waiting
from shared.cancellations import waits_of
from shared.counts import in_state
from shared.models import EmailJob, HeadMarker, Sender
from shared.ownership import owned_by, owner_of
from shared.sending_hours import SendingHours
from shared.states import JobState, SenderState, SmtpSecurity


@dataclass(frozen=True, slots=True)
class SenderRecord:
    """A sender as it is stored; of its password only that there is one."""

    sender_id: int
    user_id: str
    email: str
    display_name: str
    smtp_host: str | None
    smtp_port: int | None
    smtp_security: SmtpSecurity | None
    smtp_username: str | None
    password_set: bool
    hourly_limit: int
    min_gap_ms: int | None
    max_in_flight: int
    sending_hours: SendingHours | None
    state: SenderState
    created_at: datetime
    updated_at: datetime


_COLUMNS: Final = (
    Sender.id,
    Sender.user_id,
    Sender.email,
    Sender.display_name,
    Sender.smtp_host,
    Sender.smtp_port,
    Sender.smtp_security,
    Sender.smtp_username,
    Sender.smtp_password.is_not(None).label("password_set"),
    Sender.hourly_limit,
    Sender.min_gap_ms,
    Sender.max_in_flight,
    Sender.sending_hours,
    Sender.state,
    Sender.created_at,
    Sender.updated_at,
)
_THERE: Final = Sender.deleted_at.is_(None)


def _record(row: Any) -> SenderRecord:
    hours = row.sending_hours
    return SenderRecord(
        sender_id=row.id,
        user_id=row.user_id,
        email=row.email,
        display_name=row.display_name,
        smtp_host=row.smtp_host,
        smtp_port=row.smtp_port,
        smtp_security=None if row.smtp_security is None else SmtpSecurity(row.smtp_security),
        smtp_username=row.smtp_username,
        password_set=row.password_set,
        hourly_limit=row.hourly_limit,
        min_gap_ms=row.min_gap_ms,
        max_in_flight=row.max_in_flight,
        sending_hours=None if hours is None else SendingHours.from_text(hours),
        state=SenderState(row.state),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


async def insert_sender(
    connection: AsyncConnection, user_id: str, values: Mapping[str, Any]
) -> SenderRecord:
    """Store a new sender; `values` by the names of columns."""
    statement = insert(Sender).values(user_id=owner_of(user_id), **values).returning(*_COLUMNS)
    return _record((await connection.execute(statement)).one())


async def read_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> SenderRecord | None:
    """Return a sender; None: there is none, or not for this user."""
    statement = owned_by(
        select(*_COLUMNS).where(Sender.id == sender_id, _THERE), Sender.user_id, user_id
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else _record(row)


@dataclass(frozen=True, slots=True)
class SenderEndpoint:
    """Where a sender's mail is handed in; no host: the operator's relay."""

    host: str | None
    port: int | None
    security: SmtpSecurity | None
    username: str | None
    # Encrypted.
    password: bytes | None


async def read_endpoint(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> SenderEndpoint | None:
    """Return the endpoint of a sender; None: there is no such sender, or not for this user."""
    statement = owned_by(
        select(
            Sender.smtp_host,
            Sender.smtp_port,
            Sender.smtp_security,
            Sender.smtp_username,
            Sender.smtp_password,
        ).where(Sender.id == sender_id, _THERE),
        Sender.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    security = None if row.smtp_security is None else SmtpSecurity(row.smtp_security)
    return SenderEndpoint(
        row.smtp_host, row.smtp_port, security, row.smtp_username, row.smtp_password
    )


async def list_senders(
    connection: AsyncConnection,
    user_id: str,
    state: SenderState | None,
    after_id: int,
    limit: int,
) -> Sequence[SenderRecord]:
    """Return the user's first `limit` senders after `after_id`, the oldest first."""
    statement = owned_by(
        select(*_COLUMNS).where(Sender.id > after_id, _THERE).order_by(Sender.id).limit(limit),
        Sender.user_id,
        user_id,
    )
    if state is not None:
        statement = statement.where(Sender.state == state)
    return [_record(row) for row in await connection.execute(statement)]


async def update_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None, values: Mapping[str, Any]
) -> SenderRecord | None:
    """Change a sender, and ask for a load of its head; None: there is none, or not for this user.

    A value that is there already is a change too: the caller says what shall be.
    """
    if "email" in values:
        values = {**values, "first_email": func.coalesce(Sender.first_email, Sender.email)}
    statement = owned_by(
        update(Sender)
        .where(Sender.id == sender_id, _THERE)
        .values(revision=Sender.revision + 1, updated_at=func.now(), **values)
        .returning(*_COLUMNS),
        Sender.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    await connection.execute(insert(HeadMarker).values(sender_id=sender_id))
    return _record(row)


async def set_state(
    connection: AsyncConnection, sender_id: int, user_id: str | None, state: SenderState
) -> tuple[SenderRecord | None, bool]:
    """Pause or resume a sender; return it, and whether that changed anything.

    The lock is the one of an UPDATE and no stronger (FOR NO KEY UPDATE): an open intake holds the
    row by its foreign key, for as long as its upload takes.
    """
    statement = owned_by(
        select(Sender.state).where(Sender.id == sender_id, _THERE).with_for_update(key_share=True),
        Sender.user_id,
        user_id,
    )
    before = (await connection.execute(statement)).scalar_one_or_none()
    if before is None or before == state:
        return await read_sender(connection, sender_id, user_id), False
    return await update_sender(connection, sender_id, user_id, {"state": state}), True


@dataclass(frozen=True, slots=True)
class Deletion:
    """What came of deleting a sender: it is gone, or it has open jobs."""

    deleted: bool
    cancelled: int = 0


async def delete_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None, *, force: bool
) -> Deletion | None:
    """Delete a sender; `force`: with what still waits. None: there is none, or not for this user.

    The row is locked first. An intake looks at it, under a lock too, before it commits: either its
    jobs are there when we look for them, or it finds the sender gone.
    """
    locked = owned_by(
        select(Sender.id).where(Sender.id == sender_id, _THERE).with_for_update(key_share=True),
        Sender.user_id,
        user_id,
    )
    if (await connection.execute(locked)).one_or_none() is None:
        return None
    cancelled = 0
    if force:
        which = EmailJob.sender_id == sender_id
        cancelled = (await end_waiting(connection, which, JobState.CANCELLED)).jobs
    elif await _has_open_jobs(connection, sender_id):
        return Deletion(deleted=False)
    # Nothing will be sent for it any more: its password is of no use but to a thief.
    values = {"deleted_at": func.now(), "smtp_password": None}
    await update_sender(connection, sender_id, user_id, values)
    return Deletion(deleted=True, cancelled=cancelled)


async def _has_open_jobs(connection: AsyncConnection, sender_id: int) -> bool:
    open_jobs = [
        exists().where(EmailJob.sender_id == sender_id, condition)
        for condition in (waits_of(sender_id), in_state(JobState.SENDING))
    ]
    found: bool = (await connection.execute(select(open_jobs[0] | open_jobs[1]))).scalar_one()
    return found
