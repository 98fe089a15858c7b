"""Finds the senders that Redis must know: those with a waiting job or a job in SENDING.

`Walk` reads them from PostgreSQL, and `find_lost` compares them with Redis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    SQLColumnExpression,
    and_,
    bindparam,
    func,
    lateral,
    not_,
    null,
    select,
    true,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import EmailJob, Sender
from outbox_server.shared.database.pauses import has_paused_batch
from outbox_server.shared.heads.statements import unix_ms_of
from outbox_server.shared.holds.conditions import nothing_is_held, sender_may_send
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.states import JobState

# Senders that Redis examines in one script, about 10 us each.
_EXAMINED_AT_ONCE: Final = 500


class ConcernedSender(NamedTuple):
    """A sender with a waiting job or a job in SENDING."""

    sender_id: int
    # Its first waiting job, and when that is due (Unix ms). None means that it has only jobs in
    # SENDING.
    job: JobRef | None
    due_ms: int | None
    # Whether nothing is held (`shared.holds`) and no batch of the sender is paused. Otherwise Redis
    # may not know that job.
    free: bool
    # Whether that job is due within the time that the caller named.
    soon: bool


class Walk:
    """Reads concerned senders in the order of their ids, of one shard or of all."""

    def __init__(self, *, shards: int = 1, shard: int = 0) -> None:
        """Walk over the senders of `shard`, one of `shards`. With one shard, it is all senders."""
        self._statement = _walk_statement(sharded=shards > 1)
        self._shards, self._shard = shards, shard

    async def read(
        self, connection: AsyncConnection, *, after: int, most: int, soon_ms: int = 0
    ) -> list[ConcernedSender]:
        """Return the next senders with ids beyond `after`; fewer than `most` are the last ones.

        A sender is `soon` if its first job is due within `soon_ms`.
        """
        values = {"after": after, "most": most, "shards": self._shards, "shard": self._shard}
        rows = await connection.execute(self._statement, values)
        return [
            ConcernedSender(
                row.sender_id,
                None if row.job_id is None else JobRef(row.job_id, row.attempt + 1),
                row.due,
                bool(row.free),
                row.due is not None and row.due <= row.now + soon_ms,
            )
            for row in rows
        ]


async def find_lost(
    queue: Queue, senders: Sequence[ConcernedSender], *, whole: bool = False
) -> list[int]:
    """Return which of these senders of a shard Redis has lost, in their order.

    They must be loaded: Redis does not know them, or not their first job. This is the one place
    where what PostgreSQL has is compared with what Redis has. With `whole`, it does not return
    unknown ones while the shard is incomplete, because a rebuild loads them.
    """
    lost: list[int] = []
    for start in range(0, len(senders), _EXAMINED_AT_ONCE):
        part = senders[start : start + _EXAMINED_AT_ONCE]
        lost += await queue.find_lost([one.sender_id for one in part], whole=whole)
        lost += await queue.find_outdated(
            [
                (one.sender_id, one.job, one.due_ms)
                for one in part
                if one.free and one.job is not None and one.due_ms is not None
            ]
        )
    return lost


def in_order_of_due_time(senders: Iterable[ConcernedSender]) -> list[ConcernedSender]:
    """Return senders in the order in which their jobs are due; senders without one come last."""
    return sorted(senders, key=lambda one: (one.due_ms is None, one.due_ms, one.sender_id))


@cache
def _walk_statement(*, sharded: bool) -> Select[Any]:
    """Return the statement for the next senders by id.

    It costs one probe of the index of waiting jobs per sender, and none per job. Unless `sharded`,
    all senders are in one shard.
    """
    after: Any = bindparam("after", type_=BigInteger)
    most: Any = bindparam("most", type_=BigInteger)

    def first_of(senders: ColumnElement[bool]) -> Any:
        return (
            select(
                EmailJob.sender_id,
                EmailJob.scheduled_at,
                EmailJob.id,
                EmailJob.attempt,
            )
            .where(in_state(JobState.SCHEDULED), senders)
            .order_by(EmailJob.sender_id, EmailJob.scheduled_at, EmailJob.id)
            .limit(1)
        )

    def of_shard(sender: SQLColumnExpression[int]) -> ColumnElement[bool]:
        if not sharded:
            return true()
        key = func.coalesce(Sender.shard_key, Sender.id)
        found = select(key % bindparam("shards")).where(Sender.id == sender)
        return found.scalar_subquery() == bindparam("shard")

    walk = first_of(EmailJob.sender_id > after).cte("walk", recursive=True)
    following = lateral(first_of(EmailJob.sender_id > walk.c.sender_id).correlate(walk))
    walk = walk.union_all(select(following).select_from(walk).join(following, true()))
    # The limit ends the recursion, because PostgreSQL computes only the rows that are read.
    waiting = (
        select(walk)
        .where(of_shard(walk.c.sender_id), sender_may_send(walk.c.sender_id))
        .limit(most)
    )
    sending = select(EmailJob.sender_id, null(), null(), null()).where(
        in_state(JobState.SENDING),
        EmailJob.sender_id > after,
        of_shard(EmailJob.sender_id),
    )
    each = waiting.union_all(sending).subquery()
    # At most one row of each sender is a waiting job's.
    return (
        select(
            each.c.sender_id,
            func.max(each.c.id).label("job_id"),
            func.max(each.c.attempt).label("attempt"),
            unix_ms_of(func.max(each.c.scheduled_at)).label("due"),
            unix_ms_of(func.statement_timestamp()).label("now"),
            and_(nothing_is_held(), not_(has_paused_batch(each.c.sender_id))).label("free"),
        )
        .group_by(each.c.sender_id)
        .order_by(each.c.sender_id)
        .limit(most)
    )
