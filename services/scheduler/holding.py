"""Releases the mail that is held after a restore, and cancels it part by part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage import holds as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.cancelling import EndedJobs
from outbox_server.services.scheduler.storage.holds import HeldFilter
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.holds.storage import end_hold

# Heads that are not loaded within this time are loaded by the dispatchers.
LOAD_LIMIT: Final = timedelta(seconds=10)
# A call ends after this time, and the next one continues.
_CANCEL_LIMIT_S: Final = 10.0
_EVERYTHING: Final = HeldFilter()


@dataclass(frozen=True, slots=True)
class Released:
    """The result of a release. The heads of `sender_ids` must be loaded after the commit."""

    jobs: int
    sender_ids: Sequence[int]
    hold_ended: bool


@dataclass(frozen=True, slots=True)
class CancelledHeld:
    """The result of a cancellation. `more` means that time ran out before all were cancelled."""

    jobs: int
    more: bool
    sending: int
    hold_ended: bool


async def release_held(connection: AsyncConnection, which: HeldFilter) -> Released:
    """Release the held jobs that match.

    Raises:
        FailedPrecondition: NOT_HELD, TOO_MANY_RELEASES.
    """
    await _require_hold(connection)
    jobs, senders = await storage.request_loads(connection, which)
    releases = await storage.list_releases(connection)
    if which != _EVERYTHING and which not in releases:
        if len(releases) >= storage.MOST_RELEASES:
            raise FailedPrecondition(
                f"{storage.MOST_RELEASES:,} filters were released already: release more with one "
                "filter, such as a user, or everything",
                reason="TOO_MANY_RELEASES",
            )
        await storage.add_release(connection, which)
    ended = which == _EVERYTHING or not await storage.any_held(connection)
    if ended:
        await end_hold(connection)
    return Released(jobs, senders, ended)


async def cancel_held(engine: AsyncEngine, which: HeldFilter) -> CancelledHeld:
    """Cancel the held jobs that match, in transactions of their own. It may be repeated.

    Raises:
        FailedPrecondition: NOT_HELD.
    """
    until = time.monotonic() + _CANCEL_LIMIT_S
    cancelled, after, more = 0, 0, True

    async def cancel(connection: AsyncConnection) -> EndedJobs:
        await _require_hold(connection)
        return await storage.cancel_held(connection, which, after)

    while more and time.monotonic() < until:
        part = await in_transaction(engine, cancel)
        cancelled, after, more = cancelled + part.jobs, part.last_id, part.last_id != 0

    async def end_if_empty(connection: AsyncConnection) -> tuple[int, bool]:
        if await storage.lock_hold(connection) is None:
            return 0, True
        sending = await storage.count_sending(connection, which)
        ended = not more and not sending and not await storage.any_held(connection)
        if ended:
            await end_hold(connection)
        return sending, ended

    sending, ended = await in_transaction(engine, end_if_empty)
    return CancelledHeld(cancelled, more, sending, ended)


async def _require_hold(connection: AsyncConnection) -> None:
    if await storage.lock_hold(connection) is None:
        raise FailedPrecondition("the installation is not held", reason="NOT_HELD")
