"""Erases a person's data, part by part (see the storage module of the same name)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage import erasing as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.changes import forget_address
from outbox_server.services.scheduler.storage.erasing import ReadRejection
from outbox_server.services.scheduler.storage.suppressions import SuppressionRecord
from outbox_server.services.scheduler.suppressing import end_rest
from outbox_server.shared.callers import next_part
from outbox_server.shared.database.audit_events import erase_changes
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.intake.addresses import folded_key

# The number of rejections that are compared with an address before other calls run.
_COMPARED_AT_ONCE: Final = 20


@dataclass(frozen=True, slots=True)
class ErasedRecipient:
    """The result of an erasure. Mails `in_flight` are erased by a later call."""

    suppression: SuppressionRecord
    suppressed: int
    erased: int
    rejections: int
    in_flight: int


async def erase_recipient(
    engine: AsyncEngine, loader: HeadLoader, user_id: str, address: str
) -> ErasedRecipient:
    """Erase the data about the person with this address from a user's rows."""
    suppression, first = await in_transaction(
        engine, lambda connection: storage.suppress_erased(connection, user_id, address)
    )
    suppressed = first.ended.jobs + await end_rest(engine, loader, first)
    erased = 0
    while part := await in_transaction(
        engine, lambda connection: storage.erase_jobs(connection, user_id, address)
    ):
        erased += part
    rejections = await _erase_rejections(engine, user_id, address)
    await in_transaction(
        engine, lambda connection: storage.erase_cooldowns(connection, user_id, address)
    )
    await forget_changes(engine, user_id, address)
    async with engine.connect() as connection:
        in_flight = await storage.count_left(connection, user_id, address)
    return ErasedRecipient(suppression, suppressed, erased, rejections, in_flight)


async def forget_changes(engine: AsyncEngine, user_id: str, address: str) -> None:
    """Erase the data about an address from a user's audit log and stored requests."""
    key = folded_key(address)

    async def forget(connection: AsyncConnection) -> None:
        await forget_address(connection, user_id, key)
        await erase_changes(connection, user_id, key)

    await in_transaction(engine, forget)


async def _erase_rejections(engine: AsyncEngine, user_id: str, address: str) -> int:
    erased = 0
    after: tuple[int, int] | None = (0, 0)
    while after is not None:
        async with engine.connect() as connection:
            read, after = await storage.read_rejections(connection, user_id, after)
        found = await _with_address(read, address)
        if found:
            await in_transaction(
                engine,
                lambda connection, found=found: storage.erase_rejections(connection, found),  # type: ignore[misc]
            )
        erased += len(found)
    return erased


async def _with_address(read: Sequence[ReadRejection], address: str) -> list[ReadRejection]:
    """Return the rejections whose text contains the address. Other calls run in between."""
    found: list[ReadRejection] = []
    for compared in range(0, len(read), _COMPARED_AT_ONCE):
        some = read[compared : compared + _COMPARED_AT_ONCE]
        found += [one for one in some if contains_address(one.detail, address)]
        await next_part()
    return found


def contains_address(text: str, address: str) -> bool:
    """Return whether a text contains the address, in any case, or the part before a cut (`...`)."""
    # Compared by case folding, because it is better to erase too much than too little.
    key, folded = folded_key(address), folded_key(text)
    if key in folded:
        return True
    local = key.rpartition("@")[0]
    # Most texts need no more than this check. Comparing all lengths takes up to 0.1 ms.
    return (
        local in folded
        and "..." in folded
        and any(f"{key[:length]}..." in folded for length in range(len(local), len(key)))
    )
