"""Suppresses many addresses at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, any_, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.cancelling import EndedJobs, end_waiting
from outbox_server.services.scheduler.storage.suppressions import (
    has_erased,
    lock_suppressions,
    store_suppressions,
    suppressed_among,
)
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.intake.addresses import keys_of
from outbox_server.shared.states import JobState, SuppressionForm


async def suppress_all(
    connection: AsyncConnection, user_id: str, reasons: Mapping[str, str]
) -> tuple[int, EndedJobs]:
    """Suppress addresses, and end the waiting jobs to them. `reasons` are by address.

    Each is suppressed as by `insert_suppression`. Return how many were not suppressed before.
    """
    await lock_suppressions(connection, user_id)
    keys = {address: keys_of(address) for address in reasons}
    erased = await has_erased(connection, user_id)
    known = await suppressed_among(connection, user_id, keys, erased=erased)
    # Two spellings of one address have one key.
    new = {keys[each][0]: each for each in reversed([*reasons]) if each not in known}
    if new:
        exact = {key: reasons[address] for key, address in new.items()}
        await store_suppressions(connection, user_id, _rows(exact), SuppressionForm.EXACT)
    folded = {both[1]: "" for each in new.values() if (both := keys[each])[0] != both[1]}
    if folded:
        form = SuppressionForm.FOR_OLDER_RELEASES
        await store_suppressions(connection, user_id, _rows(folded), form)
    owned = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    spellings = sorted({text for each in reasons for text in (each, keys[each][0])})
    to_them = _is_to_any(spellings) & owned.correlate(EmailJob).exists()
    return len(new), await end_waiting(connection, to_them, JobState.SUPPRESSED)


def _texts(texts: Sequence[str]) -> Any:
    return func.unnest(literal(texts, ARRAY(Text)))


def _rows(reasons: Mapping[str, str]) -> Select[Any]:
    # Sorted, so that no two transactions wait for one another.
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


def _is_to_any(spellings: Sequence[str]) -> ColumnElement[bool]:
    """Return the condition that a job goes to one of the addresses, as `is_to` does for one."""
    lowered = func.lower(EmailJob.recipient)
    text = _texts(spellings).column_valued("spelling")
    hashes = select(func.hashtext(func.lower(text))).scalar_subquery()
    wanted = select(func.lower(text)).scalar_subquery()
    by_index = func.hashtext(lowered) == any_(func.array(hashes))
    return by_index & (lowered == any_(func.array(wanted)))
