"""The fence between lives of Redis: PostgreSQL stores, for each shard, which life is valid.

Two servers may both be the primary for a while, each with its own dispatchers, and both hand out
jobs. Only jobs that were claimed in the valid life are marked SENDING, so only one of them sends.

How a life becomes valid (`Lives.begin`):

1. Redis begins a provisional life whenever it may have lost something (life.lua).
2. A dispatcher takes the lock of the rebuild there, and stores a new name of a life in PostgreSQL,
   by compare-and-swap. Names are random, so no life becomes valid twice.
3. It gives that name to the life in Redis, and rebuilds the shard.

A mark holds a lock on the row of its shard until it is committed, and step 2 waits for that lock.
So a mark of the former life is either visible to every load of the next life, which counts it as in
flight, or it marks nothing.

A server whose life was superseded hands out nothing any more. This is how two of them converge:
its dispatchers connect again, in case the address leads elsewhere now. They begin a new life there
only when no dispatcher has seen the valid life for `PATIENCE`. So the last server that lost its
data stays the valid one as long as it is in use, and the other one stays silent.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any, Final

import structlog
from sqlalchemy import (
    ColumnElement,
    Row,
    bindparam,
    cast,
    exists,
    extract,
    func,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.types import BigInteger

from outbox_server.shared.database.models import ShardLife
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.queue.queue import Queue, is_provisional

# How often each dispatcher compares the lives of Redis with PostgreSQL.
CHECK_PAUSE: Final = timedelta(seconds=5)
# The valid life is no longer in use if no dispatcher has seen it for this long.
PATIENCE: Final = timedelta(seconds=20)
# Dispatchers write that they have seen a life at most this often, all together.
_SEEN_PAUSE: Final = timedelta(seconds=3)
_log = structlog.get_logger(__name__)


class SupersededLifeError(FailedPrecondition):
    """Another Redis server is in use: this one hands out no mail."""

    default_reason = "LIFE_SUPERSEDED"


def _statement() -> Any:
    seen = (
        update(ShardLife)
        .where(
            ShardLife.shard == bindparam("of_shard", type_=BigInteger),
            ShardLife.life == bindparam("in_redis"),
            ShardLife.seen_at < func.now() - bindparam("pause", type_=INTERVAL),
        )
        .values(seen_at=func.now())
        .returning(ShardLife.shard)
        .cte("seen")
    )
    one = select(literal(1).label("one")).subquery()
    now_ms = func.floor(extract("epoch", func.clock_timestamp()) * 1000)
    return (
        select(
            ShardLife.life,
            (func.clock_timestamp() - ShardLife.seen_at).label("unseen"),
            cast(now_ms, BigInteger).label("now_ms"),
        )
        .select_from(one)
        .outerjoin(ShardLife, ShardLife.shard == bindparam("of_shard", type_=BigInteger))
        .add_cte(seen)
    )


_LOOK: Final = _statement()


def is_valid(shard: Any, life: Any) -> ColumnElement[bool]:
    """Whether PostgreSQL has this life for the shard, or none at all."""
    other = exists().where(ShardLife.shard == shard, ShardLife.life != life)
    return ~other


class Lives:
    """Compares the lives of the shards of Redis with PostgreSQL, and begins new ones."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # The shards whose life in Redis is not valid. No job is claimed there.
        self._superseded: set[int] = set()

    def is_superseded(self, queue: Queue) -> bool:
        """Whether the server of a shard hands out nothing, because another one does."""
        return queue.shard in self._superseded

    @property
    def any_superseded(self) -> bool:
        """Whether that is so for any shard."""
        return bool(self._superseded)

    def check(self) -> None:
        """Check that the servers of all shards are the ones in use.

        Raises:
            SupersededLifeError: they are not.
        """
        if self._superseded:
            raise SupersededLifeError(
                f"dispatchers use another Redis server for shard {min(self._superseded)}"
            )

    async def confirm(self, queue: Queue) -> bool:
        """Return whether the life in Redis is the valid one, and note that it was seen."""
        found = await self._look(queue)
        if found.life is not None and found.life == queue.life:
            self._superseded.discard(queue.shard)
            return True
        return False

    async def begin(self, queue: Queue, token: str) -> bool:
        """Make the life of a shard the valid one, within a rebuild.

        False means that the rebuild must not go on: another server is in use, another dispatcher
        was first, or Redis was lost again.

        Raises:
            redis.exceptions.RedisError, sqlalchemy.exc.SQLAlchemyError: a store failed.
        """
        found = await self._look(queue)
        if found.life is not None and found.life == queue.life:
            self._superseded.discard(queue.shard)
            return True
        waits = found.life is not None and not is_provisional(queue.life)
        if waits and found.unseen < PATIENCE:
            await self._wait(queue)
            return False
        life = secrets.token_hex(16)
        async with self._engine.begin() as connection:
            advanced = await _advance(connection, queue.shard, found.life, life, waits=waits)
        if not advanced or not await queue.begin_life(token, life):
            return False
        self._superseded.discard(queue.shard)
        _log.info("life_begun", shard=queue.shard, life=life)
        return True

    async def _look(self, queue: Queue) -> Row[Any]:
        redis_ms = await queue.read_life()
        values = {"of_shard": queue.shard, "in_redis": queue.life, "pause": _SEEN_PAUSE}
        async with self._engine.begin() as connection:
            found = (await connection.execute(_LOOK, values)).one()
        queue.learn_clocks(redis_ms, found.now_ms)
        return found

    async def _wait(self, queue: Queue) -> None:
        self._superseded.add(queue.shard)
        _log.warning("life_superseded", shard=queue.shard, life=queue.life)
        await queue.leave_server()


async def _advance(
    connection: AsyncConnection, shard: int, valid: str | None, life: str, *, waits: bool
) -> bool:
    """Store a new valid life, unless `valid` is not the valid one any more.

    It waits for the marks in progress of the former life. `waits`: refuse while that life is in
    use.
    """
    new = insert(ShardLife).values(shard=shard, life=life)
    unused = ShardLife.seen_at < func.clock_timestamp() - PATIENCE
    statement = new.on_conflict_do_update(
        index_elements=[ShardLife.shard],
        set_={"life": new.excluded.life, "begun_at": func.now(), "seen_at": func.now()},
        where=(ShardLife.life == valid) & (unused if waits else true()),
    ).returning(ShardLife.shard)
    return (await connection.execute(statement)).first() is not None
