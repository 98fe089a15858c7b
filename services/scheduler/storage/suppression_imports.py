"""Suppresses many addresses at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Select, Text, any_, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY, array
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.conditions import hash_is_in, senders_of
from outbox_server.services.scheduler.storage.suppressing import (
    EndedPart,
    WaitingJobs,
    end_part,
)
from outbox_server.services.scheduler.storage.suppressions import (
    has_erased,
    lock_suppressions,
    store_suppressions,
    suppressed_among,
)
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import EmailJob, Sender
from outbox_server.shared.intake.addresses import folded_key, keys_of
from outbox_server.shared.quotas.storage import check_suppressions
from outbox_server.shared.states import JobState, SuppressionForm
from outbox_server.shared.user_quotas import UserQuotas

# If the user has more jobs to an address, its index is not used: most of them may not be waiting.
_MOST_OF_ADDRESS: Final = 200
# The index is used for each pair of address and sender.
_MOST_LOOKUPS: Final = 200_000


async def suppress_all(
    connection: AsyncConnection, user_id: str, reasons: Mapping[str, str], quotas: UserQuotas
) -> tuple[int, EndedPart]:
    """Suppress addresses, and end the first waiting jobs to them. `reasons` are by address.

    Each is suppressed as by `insert_suppression`, and `end_part` ends the rest. Return how many
    were not suppressed before. `quotas` are the defaults.

    Raises:
        ResourceExhausted: USER_SUPPRESSIONS_EXCEEDED; none of them is suppressed.
    """
    await lock_suppressions(connection, user_id)
    keys = {address: keys_of(address) for address in reasons}
    erased = await has_erased(connection, user_id)
    known = await suppressed_among(connection, user_id, keys, erased=erased)
    # Different spellings of one address have the same key.
    new = {keys[each][0]: each for each in reversed([*reasons]) if each not in known}
    folded = {both[1]: "" for each in new.values() if (both := keys[each])[0] != both[1]}
    if new:
        await check_suppressions(connection, user_id, len({*new, *folded}), quotas)
        exact = {key: reasons[address] for key, address in new.items()}
        await store_suppressions(connection, user_id, _rows(exact), SuppressionForm.EXACT)
    if folded:
        form = SuppressionForm.FOR_OLDER_RELEASES
        await store_suppressions(connection, user_id, _rows(folded), form)
    spellings = sorted({text for each in reasons for text in (each, keys[each][0])})
    return len(new), await end_part(connection, await _waiting_to(connection, user_id, spellings))


async def _waiting_to(
    connection: AsyncConnection, user_id: str, spellings: Sequence[str]
) -> WaitingJobs:
    has_waiting = (
        select(EmailJob.id)
        .where(EmailJob.sender_id == Sender.id, in_state(JobState.SCHEDULED))
        .limit(1)
        .correlate(Sender)
        .scalar_subquery()
        .is_not(None)
    )
    senders = (await connection.scalars(senders_of(user_id).where(has_waiting))).all()
    if not senders:
        return WaitingJobs(user_id, (), None)
    if len(senders) * len(spellings) > _MOST_LOOKUPS:
        return WaitingJobs(user_id, (), _is_to_any(spellings))
    these = select(Sender.id).where(Sender.id == any_(literal(senders, ARRAY(BigInteger))))
    given = _texts(spellings).table_valued("spelling", name="given").render_derived()
    keys = array([func.lower(given.c.spelling)])
    jobs = select(EmailJob.id).where(hash_is_in(keys, these)).correlate(given)
    more = jobs.offset(_MOST_OF_ADDRESS).limit(1).scalar_subquery()
    many = set(await connection.scalars(select(given.c.spelling).where(more.is_not(None))))
    few = [each for each in spellings if each not in many]
    return WaitingJobs(
        user_id,
        (_is_to_any(few, these),) if few else (),
        _is_to_any(sorted(many)) if many else None,
    )


def _texts(texts: Sequence[str]) -> Any:
    return func.unnest(literal(texts, ARRAY(Text)))


def _rows(reasons: Mapping[str, str]) -> Select[Any]:
    # Sorted, so that two transactions cannot deadlock.
    addresses = sorted(reasons)
    given = (
        func.unnest(
            literal(addresses, ARRAY(Text)),
            literal([reasons[address] for address in addresses], ARRAY(Text)),
        )
        .table_valued("address", "reason", name="each")
        .render_derived()
    )
    return select(given.c.address, given.c.reason)


def _is_to_any(spellings: Sequence[str], senders: Select[int] | None = None) -> ColumnElement[bool]:
    """Return the condition that a job goes to one of the addresses, as `is_to` does for one.

    With `senders`, it is by an index.
    """
    text = _texts(spellings).column_valued("spelling")
    wanted = select(func.lower(text)).scalar_subquery()
    is_to = func.lower(EmailJob.recipient) == any_(func.array(wanted))
    if senders is None:
        return is_to
    folded = [folded_key(each) for each in spellings if not each.isascii()]
    lowered = func.array(
        select(func.lower(_texts(spellings).column_valued("each"))).scalar_subquery()
    )
    keys = func.array_cat(lowered, literal(folded, ARRAY(Text)))
    return hash_is_in(keys, senders) & is_to
