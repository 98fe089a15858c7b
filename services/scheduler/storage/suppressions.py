"""The table of suppressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.services.scheduler.storage.suppressing import (
    EndedPart,
    end_part,
    to_address,
    waiting_to,
)
from outbox_server.shared.database.erased_keys import ERASED_PREFIX, erased_key
from outbox_server.shared.database.models import Suppression
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.filters.fields import Filter
from outbox_server.shared.intake.addresses import address_key, folded_key, keys_of
from outbox_server.shared.quotas.storage import check_suppressions
from outbox_server.shared.states import SuppressionForm
from outbox_server.shared.user_quotas import UserQuotas

# The first half of the keys of the advisory locks on a user's suppressions. Any number would do.
_LOCK_SPACE: Final = 0x5355


@dataclass(frozen=True, slots=True)
class SuppressionRecord:
    """A stored suppression."""

    user_id: str
    address: str
    reason: str
    created_at: datetime


SUPPRESSION_COLUMNS: Final = (
    Suppression.user_id,
    Suppression.address,
    Suppression.reason,
    Suppression.created_at,
)


def suppression_lock(user_id: Any) -> tuple[ColumnElement[int], ColumnElement[int]]:
    """Return the key of the advisory lock on the suppressions of a user."""
    return literal(_LOCK_SPACE, Integer), func.hashtext(user_id)


async def lock_suppressions(
    connection: AsyncConnection, user_id: str, *, shared: bool = False
) -> None:
    """Lock the user's suppressions against new ones, until the end of the transaction.

    A new suppression takes an exclusive lock, and then ends the waiting jobs that it can see, most
    of them in later transactions, without the lock. An intake takes a shared lock right before its
    commit, and then searches for suppressions that it has missed. So at least one of the two sees
    the other.
    """
    lock = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    await connection.execute(select(lock(*suppression_lock(literal(owner_of(user_id))))))


def _plain_or_erased(user_id: str, key: str) -> ColumnElement[bool]:
    return Suppression.address.in_([literal(key, Text), erased_key(user_id, key)])


def _of_older_release(user_id: str, address: str) -> ColumnElement[bool]:
    """Return the condition that a suppression of an older release covers this address.

    It covers every address that case folding makes equal to it.
    """
    return and_(Suppression.form.is_(None), _plain_or_erased(user_id, folded_key(address)))


def _exact(user_id: str, address: str) -> ColumnElement[bool]:
    """Return the condition that a suppression is of exactly this address."""
    return and_(
        Suppression.form == SuppressionForm.EXACT, _plain_or_erased(user_id, address_key(address))
    )


async def store_suppression(
    connection: AsyncConnection,
    user_id: str,
    address: ColumnElement[str],
    form: SuppressionForm | None,
    reason: str = "",
) -> None:
    """Store a suppression. It replaces one that is only for older releases."""
    given: Sequence[Any] = (address.label("address"), literal(reason, Text).label("reason"))
    await store_suppressions(connection, user_id, select(*given), form)


async def store_suppressions(
    connection: AsyncConnection,
    user_id: str,
    rows: Select[Any],
    form: SuppressionForm | None,
) -> None:
    """Store suppressions. They replace those that are only for older releases.

    `rows` selects the address and the reason of each, and no address twice.
    """
    given = rows.subquery("given")
    columns = ("user_id", "address", "form", "reason", "created_at")
    new = insert(Suppression).from_select(
        columns,
        select(
            literal(user_id, Text),
            given.c[0],
            literal(form, SmallInteger),
            given.c[1],
            # Not now(): the transaction may have begun long before it got the lock.
            func.clock_timestamp(),
        ),
    )
    replaced = {name: new.excluded[name] for name in columns[2:]}
    await connection.execute(
        new.on_conflict_do_update(
            index_elements=columns[:2],
            set_=replaced,
            where=(Suppression.form == SuppressionForm.FOR_OLDER_RELEASES)
            & (new.excluded.form.is_distinct_from(SuppressionForm.FOR_OLDER_RELEASES)),
        )
    )


async def suppressed_among(
    connection: AsyncConnection, user_id: str, addresses: Iterable[str], *, erased: bool
) -> set[str]:
    """Return which of the addresses the user has suppressed.

    `erased` says whether the user may have suppressions of erased recipients.
    """
    keys = {address: keys_of(address) for address in addresses}
    given = bindparam("addresses", type_=ARRAY(Text))
    named = select(Suppression.address, Suppression.form).where(
        Suppression.user_id == user_id, Suppression.address == any_(given)
    )
    if erased:
        each = func.unnest(given).column_valued("each")
        named = select(each, Suppression.form).join(
            Suppression,
            and_(
                Suppression.user_id == user_id,
                Suppression.address.in_([each, erased_key(user_id, each)]),
            ),
        )
    texts = sorted({key for both in keys.values() for key in both})
    found = {tuple(row) for row in await connection.execute(named, {"addresses": texts})}
    return {
        address
        for address, (exact, folded) in keys.items()
        if (exact, SuppressionForm.EXACT) in found or (folded, None) in found
    }


async def has_erased(connection: AsyncConnection, user_id: str) -> bool:
    """Return whether the user has a suppression of an erased recipient."""
    hashed = func.starts_with(Suppression.address, ERASED_PREFIX)
    some = select(exists().where(Suppression.user_id == user_id, hashed))
    return bool((await connection.execute(some)).scalar_one())


async def insert_suppression(
    connection: AsyncConnection, user_id: str, address: str, reason: str, quotas: UserQuotas
) -> tuple[SuppressionRecord, EndedPart]:
    """Suppress an address, and end the first waiting jobs to it. `end_part` ends the rest.

    If the address is suppressed already, that suppression is kept, even if it has only the hash of
    the address because the person was erased. `quotas` are the defaults.

    Raises:
        ResourceExhausted: USER_SUPPRESSIONS_EXCEEDED.
    """
    await lock_suppressions(connection, user_id)
    exact, folded = keys_of(address)
    covering = (
        select(Suppression.address)
        .where(or_(_exact(user_id, address), _of_older_release(user_id, address)))
        .order_by(Suppression.form)
        .limit(1)
    )
    stored = await connection.scalar(owned_by(covering, Suppression.user_id, user_id))
    if stored is None:
        stored = exact
        await check_suppressions(connection, user_id, len({exact, folded}), quotas)
        await store_suppression(
            connection, user_id, literal(exact, Text), SuppressionForm.EXACT, reason
        )
        if folded != exact:
            await store_suppression(
                connection, user_id, literal(folded, Text), SuppressionForm.FOR_OLDER_RELEASES
            )
    row = (
        await connection.execute(
            owned_by(
                select(*SUPPRESSION_COLUMNS).where(Suppression.address == stored),
                Suppression.user_id,
                user_id,
            )
        )
    ).one()
    waiting = await waiting_to(connection, user_id, [to_address(user_id, address)])
    return SuppressionRecord(*row), await end_part(connection, waiting)


async def read_suppression(
    connection: AsyncConnection, user_id: str, address: str, *, lock: bool = False
) -> SuppressionRecord | None:
    """Return the suppression of exactly this address; None if there is none.

    With `lock`, nobody changes the user's suppressions until the end of the transaction.
    """
    if lock:
        await lock_suppressions(connection, user_id)
    which = _exact(user_id, address) | _of_older_release(user_id, address)
    found = select(*SUPPRESSION_COLUMNS).where(which).order_by(Suppression.form).limit(1)
    row = (await connection.execute(owned_by(found, Suppression.user_id, user_id))).one_or_none()
    return None if row is None else SuppressionRecord(*row)


async def delete_suppression(connection: AsyncConnection, user_id: str, address: str) -> bool:
    """Delete a suppression. Return False if there was none.

    It takes the lock too: otherwise it could run between the two statements of
    `insert_suppression`.
    """
    await lock_suppressions(connection, user_id)
    exact, folded = keys_of(address)
    which = _exact(user_id, address)
    if exact == folded:
        which |= _of_older_release(user_id, address)
    statements: list[Any] = [delete(Suppression).where(which)]
    if exact != folded:
        # A suppression of an older release may be meant for the other address, so it stays.
        statements.append(
            update(Suppression)
            .where(_of_older_release(user_id, address))
            .values(form=SuppressionForm.EXACT)
        )
    changed = 0
    for statement in statements:
        owned = owned_by(statement, Suppression.user_id, user_id)
        changed += (await connection.execute(owned)).rowcount
    if exact != folded:
        await connection.execute(
            owned_by(
                delete(Suppression).where(
                    Suppression.form == SuppressionForm.FOR_OLDER_RELEASES,
                    _plain_or_erased(user_id, folded),
                ),
                Suppression.user_id,
                user_id,
            )
        )
    return changed > 0


_LEAVES: Final[Mapping[str, Leaf]] = {
    "reason": column(Suppression.reason),
    "create_time": column(Suppression.created_at),
}


async def list_suppressions(
    connection: AsyncConnection,
    user_id: str,
    tree: Filter | None,
    after: str,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[SuppressionRecord], str | None]:
    """Return the user's first `limit` suppressions after an address ("": all) that match.

    If there are fewer, although more may follow, the address where to continue is returned too.
    """
    rows: Any = select(*SUPPRESSION_COLUMNS).where(
        Suppression.form.is_distinct_from(SuppressionForm.FOR_OLDER_RELEASES)
    )
    if after:
        address = Suppression.address
        rows = rows.where(address < after if descending else address > after)
    found = await search(
        connection,
        owned_by(rows, Suppression.user_id, user_id),
        Suppression.address,
        None if tree is None else condition(tree, _LEAVES),
        limit,
        descending=descending,
    )
    records = [
        SuppressionRecord(row.user_id, row.address, row.reason, row.created_at)
        for row in found.rows
    ]
    return records, found.reached
