"""The table of senders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    Select,
    Text,
    case,
    delete,
    exists,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.cancelling import cancel_batches_of
from outbox_server.services.scheduler.storage.changes import next_revision
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.services.scheduler.storage.oauth2_credentials import (
    VISIBLE_CREDENTIALS,
    replace_credentials,
    request_new_token,
)
from outbox_server.shared.cooldowns.columns import COOLDOWN_COLUMNS, cooldown_of
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import Cooldown, EmailJob, Sender
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.database.pauses import sender_is_active
from outbox_server.shared.filters.fields import Filter
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.id_source import ID_TRIES, IdSource
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.smtp.endpoint import StoredEndpoint
from outbox_server.shared.smtp.endpoint_columns import ENDPOINT_COLUMNS, endpoint_of
from outbox_server.shared.states import JobState, SenderState, SmtpSecurity, enum_or_none


@dataclass(frozen=True, slots=True)
class OAuth2Record:
    """Stored OAuth 2.0 credentials without their secrets."""

    token_url: str
    client_id: str
    scope: str
    client_secret_set: bool
    refresh_token_set: bool


@dataclass(frozen=True, slots=True)
class SenderRecord:
    """A stored sender. It says only whether a password is set, not which."""

    sender_id: int
    user_id: str
    email: str
    display_name: str
    smtp_host: str | None
    smtp_port: int | None
    smtp_security: SmtpSecurity | None
    smtp_username: str | None
    password_set: bool
    # None in lists.
    smtp_ca: str | None
    oauth2: OAuth2Record | None
    hourly_limit: int
    min_gap_ms: int | None
    max_in_flight: int
    sending_hours: SendingHours | None
    state: SenderState
    # When the pause ends by itself. None means that it is not paused, or that only a call ends the
    # pause.
    paused_until: datetime | None
    created_at: datetime
    updated_at: datetime
    revision: int
    cooldown: CooldownRecord | None


_STATE: Final = case((sender_is_active(), int(SenderState.ACTIVE)), else_=int(SenderState.PAUSED))
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
    VISIBLE_CREDENTIALS.label("oauth2"),
    Sender.hourly_limit,
    Sender.min_gap_ms,
    Sender.max_in_flight,
    Sender.sending_hours,
    _STATE.label("state"),
    case((sender_is_active(), null()), else_=Sender.paused_until).label("paused_until"),
    Sender.created_at,
    Sender.updated_at,
    Sender.revision,
)
# All columns except the only large one.
_LISTED: Final = (*_COLUMNS, literal(None, Text).label("smtp_ca"))
_ALL: Final = (*_COLUMNS, Sender.smtp_ca)
# A new sender has no credentials yet. In the RETURNING of an INSERT, a subquery is not correlated:
# it would read the credentials of other senders.
_NEW: Final = tuple(
    literal(None, JSONB).label("oauth2") if column.name == "oauth2" else column for column in _ALL
)
_NOT_DELETED: Final = Sender.deleted_at.is_(None)


def _read(columns: tuple[Any, ...]) -> Select[Any]:
    """Return the statement that reads these columns of senders, with their cooldowns."""
    senders = select(*columns, *COOLDOWN_COLUMNS)
    return senders.outerjoin(Cooldown, Cooldown.sender_id == Sender.id).where(_NOT_DELETED)


def _oauth2(shown: Mapping[str, Any] | None) -> OAuth2Record | None:
    return None if shown is None else OAuth2Record(**shown)


def _record(row: Any, cooldown: CooldownRecord | None) -> SenderRecord:
    hours = row.sending_hours
    return SenderRecord(
        sender_id=row.id,
        user_id=row.user_id,
        email=row.email,
        display_name=row.display_name,
        smtp_host=row.smtp_host,
        smtp_port=row.smtp_port,
        smtp_security=enum_or_none(SmtpSecurity, row.smtp_security),
        smtp_username=row.smtp_username,
        password_set=row.password_set,
        smtp_ca=row.smtp_ca,
        oauth2=_oauth2(row.oauth2),
        hourly_limit=row.hourly_limit,
        min_gap_ms=row.min_gap_ms,
        max_in_flight=row.max_in_flight,
        sending_hours=None if hours is None else SendingHours.from_text(hours),
        state=SenderState(row.state),
        paused_until=row.paused_until,
        created_at=row.created_at,
        updated_at=row.updated_at,
        revision=row.revision,
        cooldown=cooldown,
    )


async def insert_sender(
    connection: AsyncConnection, ids: IdSource, user_id: str, values: Mapping[str, Any]
) -> SenderRecord:
    """Store a new sender. `values` has its columns by name, and `oauth2` (see `update_sender`)."""
    columns = dict(values)
    oauth2 = columns.pop("oauth2", None)
    for _ in range(ID_TRIES):
        statement = (
            insert(Sender)
            .values(id=ids.issue(), user_id=owner_of(user_id), **columns)
            .on_conflict_do_nothing(index_elements=["id"])
            .returning(*_NEW)
        )
        row = (await connection.execute(statement)).one_or_none()
        if row is not None:
            break
    else:
        raise RuntimeError(f"no sender has an id of its own after {ID_TRIES} tries")
    created = _record(row, None)
    if oauth2 is None:
        return created
    return await _with_credentials(connection, created, oauth2)


async def _with_credentials(
    connection: AsyncConnection, sender: SenderRecord, oauth2: Mapping[str, Any] | None
) -> SenderRecord:
    """Replace the credentials of a sender, whose row is locked, and return the new record."""
    await replace_credentials(connection, sender.sender_id, oauth2)
    stored = select(VISIBLE_CREDENTIALS).select_from(Sender).where(Sender.id == sender.sender_id)
    return replace(sender, oauth2=_oauth2((await connection.execute(stored)).scalar_one()))


async def read_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> SenderRecord | None:
    """Return a sender, or None if it does not exist or belongs to another user."""
    statement = owned_by(_read(_ALL).where(Sender.id == sender_id), Sender.user_id, user_id)
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else _record(row, cooldown_of(row))


async def lock_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> SenderRecord | None:
    """Lock a sender's row and return it; None if it is missing or belongs to another user.

    The lock is FOR NO KEY UPDATE, the lock of an UPDATE. A stronger one would wait for uploads,
    because an open intake holds a key share lock on the row.
    """
    statement = owned_by(
        _read(_ALL).where(Sender.id == sender_id).with_for_update(key_share=True, of=Sender),
        Sender.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else _record(row, cooldown_of(row))


async def read_endpoint(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> tuple[str, StoredEndpoint] | None:
    """Return a sender's address and endpoint.

    Return None if the sender does not exist or belongs to another user.
    """
    statement = owned_by(
        select(Sender.email, *ENDPOINT_COLUMNS).where(Sender.id == sender_id, _NOT_DELETED),
        Sender.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else (row.email, endpoint_of(row))


_LEAVES: Final[Mapping[str, Leaf]] = {
    "state": column(_STATE),
    "email": column(Sender.email),
    "create_time": column(Sender.created_at),
    "update_time": column(Sender.updated_at),
}


async def list_senders(
    connection: AsyncConnection,
    user_id: str,
    tree: Filter | None,
    after_id: int,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[SenderRecord], int | None]:
    """Return the user's first `limit` senders after an id that match, in the order of ids.

    If there are fewer, although more may follow, the id where to continue is returned too.
    """
    after = Sender.id < after_id if descending else Sender.id > after_id
    rows = owned_by(_read(_LISTED).where(after), Sender.user_id, user_id)
    matches = None if tree is None else condition(tree, _LEAVES)
    found = await search(connection, rows, Sender.id, matches, limit, descending=descending)
    return [_record(row, cooldown_of(row)) for row in found.rows], found.reached


@dataclass(frozen=True, slots=True)
class SenderChange:
    """The result of changing a sender.

    `sender` is None if it does not exist or belongs to another user. `ended` is the cooldown that
    the change ended.
    """

    sender: SenderRecord | None
    changed: bool = False
    ended: CooldownRecord | None = None


async def update_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None, values: Mapping[str, Any]
) -> SenderChange:
    """Change a sender, and mark its head to be loaded.

    A value that equals the stored one counts as a change too. `oauth2` in `values` is not a column:
    it has the columns of the new credentials, or is None to delete the present ones. A change of
    the endpoint ends the cooldown, because another account is used from now on.
    """
    columns = dict(values)
    replaces_credentials = "oauth2" in columns
    oauth2 = columns.pop("oauth2", None)
    sender = await _update(connection, sender_id, user_id, columns)
    if sender is None:
        return SenderChange(None)
    if replaces_credentials:
        sender = await _with_credentials(connection, sender, oauth2)
    ended = await _end_cooldown(connection, sender_id) if "smtp_host" in columns else None
    return SenderChange(replace(sender, cooldown=None) if ended else sender, True, ended)


async def _update(
    connection: AsyncConnection, sender_id: int, user_id: str | None, columns: Mapping[str, Any]
) -> SenderRecord | None:
    if "email" in columns:
        columns = {**columns, "first_email": func.coalesce(Sender.first_email, Sender.email)}
    changed = owned_by(
        update(Sender)
        .where(Sender.id == sender_id, _NOT_DELETED)
        .values(revision=next_revision(Sender.revision), updated_at=func.now(), **columns)
        .returning(*_ALL),
        Sender.user_id,
        user_id,
    ).cte("changed")
    statement = select(*changed.c, *COOLDOWN_COLUMNS).outerjoin_from(
        changed, Cooldown, Cooldown.sender_id == changed.c.id
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    await mark_stale(connection, [sender_id])
    return _record(row, cooldown_of(row))


async def _end_cooldown(connection: AsyncConnection, sender_id: int) -> CooldownRecord | None:
    """End the cooldown of a sender, whose row is locked. Return it, or None if there was none."""
    statement = delete(Cooldown).where(Cooldown.sender_id == sender_id).returning(*COOLDOWN_COLUMNS)
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else cooldown_of(row)


async def set_state(
    connection: AsyncConnection,
    sender: SenderRecord,
    state: SenderState,
    until: datetime | None = None,
) -> SenderChange:
    """Pause or resume a sender, whose row is locked.

    A pause ends by itself at `until`; None means never. A resume ends the sender's cooldown,
    whether or not it was paused.
    """
    sender_id = sender.sender_id
    ended = None
    if state is SenderState.ACTIVE:
        # The cooldown ends before its next probe, because the provider may accept mail again.
        await request_new_token(connection, sender_id)
        ended = await _end_cooldown(connection, sender_id)
    if sender.state == state and sender.paused_until == until and ended is None:
        return SenderChange(sender)
    values = {"state": state, "paused_until": until}
    updated = await _update(connection, sender_id, sender.user_id, values)
    return SenderChange(updated, changed=True, ended=ended)


@dataclass(frozen=True, slots=True)
class Deletion:
    """The result of deleting a sender. `deleted` is False if it has open jobs."""

    deleted: bool
    cancelled: int = 0
    # The cooldown that the deletion ended.
    ended: CooldownRecord | None = None


async def delete_sender(
    connection: AsyncConnection, sender: SenderRecord, *, force: bool
) -> Deletion:
    """Delete a sender, whose row is locked. With `force`, its waiting jobs are cancelled.

    An intake locks and checks the row before its commit. So either its jobs are found here, or it
    finds that the sender is deleted.
    """
    sender_id = sender.sender_id
    cancelled = 0
    if force:
        cancelled = await cancel_batches_of(connection, sender_id)
    elif await _has_open_jobs(connection, sender_id):
        return Deletion(deleted=False)
    # Nothing will be sent for it any more, so its secrets are deleted.
    values = {"deleted_at": func.now(), "smtp_password": None, "smtp_ca": None}
    await _update(connection, sender_id, sender.user_id, values)
    await replace_credentials(connection, sender_id, None)
    ended = await _end_cooldown(connection, sender_id)
    return Deletion(deleted=True, cancelled=cancelled, ended=ended)


async def _has_open_jobs(connection: AsyncConnection, sender_id: int) -> bool:
    open_jobs = [
        exists().where(EmailJob.sender_id == sender_id, condition)
        for condition in (waits_of(sender_id), in_state(JobState.SENDING))
    ]
    found: bool = (await connection.execute(select(open_jobs[0] | open_jobs[1]))).scalar_one()
    return found
