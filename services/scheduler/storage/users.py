"""The statements on the quotas and domains that operators have set for users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import gt, lt
from typing import Any, Final

from sqlalchemy import Select, func, literal, select, union
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

from outbox_server.shared.database.models import ApiKeyRow, Sender, Suppression, UserRow
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.filters.fields import Filter, Value, required_value
from outbox_server.shared.filters.matching import selected
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.quotas.storage import QUOTA_COLUMNS
from outbox_server.shared.user_quotas import QUOTAS


@dataclass(frozen=True, slots=True)
class UserRecord:
    """The settings of a user. `overrides` has None for each quota with its default."""

    user_id: str
    overrides: Mapping[str, int | None]
    # Limits of all its senders together; None means the default.
    hourly_limit: int | None = None
    min_gap_ms: int | None = None
    sender_domains: Sequence[str] = ()
    updated_at: datetime | None = None


_COLUMNS = (
    UserRow.user_id,
    *QUOTA_COLUMNS,
    UserRow.hourly_limit,
    UserRow.min_gap_ms,
    UserRow.sender_domains,
    UserRow.updated_at,
)

# How many users a call reads at most to find those that match.
_MOST_READ: Final = 1_000
_VALUES: Final[Mapping[str, Callable[[UserRecord], Value]]] = {
    "user_id": lambda user: user.user_id,
    "update_time": lambda user: user.updated_at,
}


def _record(row: Any) -> UserRecord:
    overrides = {name: getattr(row, name) for name in QUOTAS}
    return UserRecord(
        row.user_id,
        overrides,
        row.hourly_limit,
        row.min_gap_ms,
        row.sender_domains or (),
        row.updated_at,
    )


async def read_user(connection: AsyncConnection, user_id: str) -> UserRecord:
    """Return a user. One without a row has no overrides."""
    statement = owned_by(select(*_COLUMNS), UserRow.user_id, user_id)
    row = (await connection.execute(statement)).one_or_none()
    return UserRecord(user_id, dict.fromkeys(QUOTAS)) if row is None else _record(row)


def _users_in(
    column: InstrumentedAttribute[Any], after: str, limit: int, *, descending: bool
) -> Select[Any]:
    """Return the statement that reads the first `limit` users of a table after `after`.

    An index must begin with the column. Each step reads one entry of it, the first one after the
    last user (a skip scan), however many rows a user has.
    """
    beyond = lt if descending else gt
    order = column.desc() if descending else column.asc()
    first = select(column.label("user_id")).where(column.is_not(None)).order_by(order).limit(1)
    if after:
        first = first.where(beyond(column, after))
    step = select(first.subquery().c.user_id, literal(1).label("n")).cte(
        f"{column.class_.__tablename__}_users", recursive=True
    )
    following = (
        select(column)
        .where(beyond(column, step.c.user_id))
        .order_by(order)
        .limit(1)
        .correlate(step)
        .scalar_subquery()
    )
    step = step.union_all(
        select(following, step.c.n + 1).where(step.c.user_id.is_not(None), step.c.n < limit)
    )
    return select(step.c.user_id).where(step.c.user_id.is_not(None))


async def list_users(
    connection: AsyncConnection, tree: Filter | None, after: str, limit: int, *, descending: bool
) -> tuple[Sequence[UserRecord], str | None]:
    """Return the first `limit` users after `after` ("": all) that Outbox knows and that match.

    That is a sender, even a deleted one (all batches and jobs have one), a suppression, an API key,
    or what an operator has set. If there are fewer, although more may follow, the id where to
    continue is returned too.
    """
    most = limit if tree is None else max(limit, _MOST_READ)
    columns = (UserRow.user_id, Sender.user_id, Suppression.user_id, ApiKeyRow.user_id)
    named, user_id = required_value(tree, "user_id")
    found = union(
        *(
            select(column).where(column == user_id).limit(1)
            if named
            else _users_in(column, after, most, descending=descending)
            for column in columns
        )
    ).subquery("found")
    user = found.c.user_id
    page = select(user).order_by(user.desc() if descending else user).limit(most).subquery("page")
    place = page.c.user_id
    statement = owned_by(
        select(place, *_COLUMNS[1:])
        .select_from(page)
        .join(UserRow, UserRow.user_id == place, isouter=True)
        .order_by(place.desc() if descending else place),
        place,
        None,
    )
    read = [_record(row) for row in await connection.execute(statement)]
    matching = selected(read, tree, _VALUES)[:limit]
    ended = len(matching) == limit or len(read) < most
    return matching, None if ended else read[-1].user_id


async def update_user(connection: AsyncConnection, user_id: str, values: Mapping[str, Any]) -> None:
    """Change the given columns of a user. None in the column of a quota means the default."""
    changes = {**values, "updated_at": func.now()}
    statement = (
        insert(UserRow)
        .values(user_id=owner_of(user_id), **changes)
        .on_conflict_do_update(index_elements=[UserRow.user_id], set_=changes)
    )
    await connection.execute(statement)


async def mark_senders_stale(connection: AsyncConnection, user_id: str) -> Sequence[int]:
    """Request a load of all senders of a user, because its limits change. Return the senders."""
    statement = owned_by(select(Sender.id).order_by(Sender.id), Sender.user_id, user_id)
    sender_ids = (await connection.execute(statement)).scalars().all()
    if sender_ids:
        await mark_stale(connection, sender_ids)
    return sender_ids
