"""The markers that request a load of a sender's head (`shared.database.models.HeadMarker`).

A transaction that changes what a head depends on writes a marker. The process loads the head after
its commit and deletes the marker. If the process dies in between, others find the marker by its
age.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import structlog
from sqlalchemy import CTE, BigInteger, Text, any_, bindparam, delete, func, insert, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.database.frequent import FrequentStatement, KeptConnections
from outbox_server.shared.database.key_space import PARAMETER, is_key_space
from outbox_server.shared.database.models import HeadMarker
from outbox_server.shared.heads.lives import is_valid
from outbox_server.shared.queue.queue import Queue

# A marker that is older than this was left by a process that died between its commit and its load.
MARKER_AGE = timedelta(seconds=5)
# Built once, because it runs for every load.
_DELETE: Final = delete(HeadMarker).where(
    HeadMarker.id == any_(bindparam("markers", type_=ARRAY(BigInteger))),
    is_valid(bindparam("of_shard", type_=BigInteger), bindparam("in_redis", type_=Text)),
    is_key_space(),
)


# Built once too. The commit does not wait for the disk: after a crash of PostgreSQL, the markers
# are back and cause one more load.
_DELETE_LATER: Final = FrequentStatement(
    _DELETE.where(
        func.set_config("synchronous_commit", "off", literal(True)).is_not(None)
    ).returning(HeadMarker.id)
)
_DELETION_LIMIT: Final = timedelta(seconds=10)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DoneMarkers:
    """Markers whose load into a life of a shard is done."""

    queue: Queue
    life: str
    marker_ids: Sequence[int]

    def is_like(self, other: DoneMarkers) -> bool:
        """Whether one statement can delete both."""
        return (self.queue, self.life) == (other.queue, other.life)


async def mark_stale(connection: AsyncConnection, sender_ids: Sequence[int]) -> None:
    """Request a load of the heads of these senders, within the caller's transaction."""
    await connection.execute(
        insert(HeadMarker), [{"sender_id": sender_id} for sender_id in sender_ids]
    )


def marking_stale(moved: CTE) -> CTE:
    """Return the part of a statement that requests a load of the heads of `moved.sender_id`.

    It returns `sender_id` and the `id` of the marker.
    """
    # DISTINCT would compare the ids of the new markers too.
    senders = select(moved.c.sender_id).group_by(moved.c.sender_id)
    marking = insert(HeadMarker).from_select(("sender_id",), senders)
    return marking.returning(HeadMarker.sender_id, HeadMarker.id).cte("markers")


async def read_abandoned(connection: AsyncConnection, limit: int) -> Sequence[int]:
    """Return up to `limit` senders with a marker older than MARKER_AGE."""
    senders = (
        select(HeadMarker.sender_id)
        .where(HeadMarker.created_at < func.statement_timestamp() - MARKER_AGE)
        .distinct()
        .limit(limit)
    )
    return (await connection.execute(senders)).scalars().all()


async def delete_markers(
    connection: AsyncConnection, marker_ids: Sequence[int], queue: Queue, life: str
) -> None:
    """Delete the markers whose load into a life of this shard is done.

    A load into a life that is not valid did not reach the server that hands out mail. Then the
    markers stay, and a dispatcher of that server finds them by their age. They also stay if the
    stored settings have changed meanwhile: others have begun to load the next key space, maybe
    before the commit that wrote the markers.
    """
    await connection.execute(_DELETE, _values(DoneMarkers(queue, life, marker_ids)))


class MarkerDeletion:
    """Deletes markers after the calls that they belong to, those of many calls at once."""

    def __init__(self, statements: AsyncEngine) -> None:
        """`statements` is an engine that runs single statements."""
        self._kept = KeptConnections(statements)
        self._done: list[DoneMarkers] = []
        self._task: asyncio.Task[None] | None = None

    def begin(self, done: DoneMarkers) -> None:
        """Begin to delete markers. If that fails, they cause one more load."""
        self._done.append(done)
        if self._task is None:
            # The task has an empty context, because it deletes the markers of many calls.
            self._task = asyncio.create_task(self._run(), context=Context())

    async def close(self) -> None:
        """Wait for the deletion in progress."""
        if self._task is not None:
            await self._task
        await self._kept.aclose()

    async def _run(self) -> None:
        try:
            while self._done:
                async with (
                    asyncio.timeout(_DELETION_LIMIT.total_seconds()),
                    self._kept.connection() as driver,
                ):
                    await _DELETE_LATER.run(driver, _values(self._next()))
        except DATABASE_ERRORS as error:
            _log.warning("markers_not_deleted", error=type(error).__name__)
        finally:
            self._task = None
            self._done.clear()

    def _next(self) -> DoneMarkers:
        """Take the markers of one life."""
        first = self._done[0]
        same = [each for each in self._done if each.is_like(first)]
        self._done = [each for each in self._done if not each.is_like(first)]
        ids = [marker_id for each in same for marker_id in each.marker_ids]
        return DoneMarkers(first.queue, first.life, ids)


def _values(done: DoneMarkers) -> dict[str, Any]:
    return {
        PARAMETER: done.queue.key_space,
        "of_shard": done.queue.shard,
        "in_redis": done.life,
        "markers": list(done.marker_ids),
    }
