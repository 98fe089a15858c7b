"""The markers that request a load of a sender's head (`shared.database.models.HeadMarker`).

A transaction that changes what a head depends on writes a marker. The process loads the head after
its commit and deletes the marker. If the process dies in between, others find the marker by its
age.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy import CTE, BigInteger, Text, any_, bindparam, delete, func, insert, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.key_space import PARAMETER, is_key_space
from outbox_server.shared.database.models import HeadMarker
from outbox_server.shared.heads.lives import is_valid
from outbox_server.shared.queue.queue import Queue

# A marker of this age was left behind by a process that died between its commit and its load.
MARKER_AGE = timedelta(seconds=5)
# Built once, because it runs for every load.
_DELETE: Final = delete(HeadMarker).where(
    HeadMarker.id == any_(bindparam("markers", type_=ARRAY(BigInteger))),
    is_valid(bindparam("of_shard", type_=BigInteger), bindparam("in_redis", type_=Text)),
    is_key_space(),
)


async def mark_stale(connection: AsyncConnection, sender_ids: Sequence[int]) -> None:
    """Request a load of the heads of these senders, within the caller's transaction."""
    await connection.execute(
        insert(HeadMarker), [{"sender_id": sender_id} for sender_id in sender_ids]
    )


def marking_stale(moved: CTE) -> CTE:
    """Return the part of a statement that requests a load of the heads of `moved.sender_id`."""
    # Not DISTINCT, which would compare the ids of the new markers too.
    senders = select(moved.c.sender_id).group_by(moved.c.sender_id)
    return insert(HeadMarker).from_select(("sender_id",), senders).cte("markers")


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
    values = {PARAMETER: queue.key_space, "of_shard": queue.shard, "in_redis": life}
    await connection.execute(_DELETE, values | {"markers": list(marker_ids)})
