"""Makes a change whose content arrives in blocks: each block once per `request_id`.

Each block is made in a transaction of its own, which stores the number of blocks that were made and
a digest of the content up to this place. A repeated call reads its content again, and passes over
the blocks that were made. So it continues where an interrupted call stopped, two calls at once make
each block once, and a call with other content is refused before it changes anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Final, Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import AskedChange, Made, record_all, replayed
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.shared.database.change_requests import (
    StoredRequest,
    begin_request,
    store_progress,
)
from outbox_server.shared.rpc.requested_changes import reused

M = TypeVar("M", bound=Message)

# The sizes, in bytes, of a digest, and of the number of blocks that follows it while a request is
# in progress.
_DIGEST: Final = 32
_NUMBER: Final = 8
# More blocks than a request can have.
_ALL: Final = 2**63


class BlockChange(Generic[M]):
    """The change of one call.

    `total` is the answer so far, with what earlier calls with the same id have changed. `later` is
    what was changed after the transaction of a block; the next transaction adds it to the total.
    """

    def __init__(
        self, engine: AsyncEngine, asked: AskedChange, answer: type[M], add: Callable[[M, M], None]
    ) -> None:
        """`add` adds the numbers of its second argument to its first one."""
        self.total = answer()
        self.later = answer()
        self._engine = engine
        self._asked = asked
        self._answer = answer
        self._add = add
        self._number = 0
        self._digest = asked.digest
        self._digest_before = asked.digest
        # How many blocks were made, as far as this call knows.
        self._made = 0
        # The stored request, once it is known that another call has completed it.
        self._completed: StoredRequest | None = None

    async def make(
        self, content: bytes, change: Callable[[AsyncConnection], Awaitable[Made[M]]]
    ) -> None:
        """Run `change` for the next block, unless it was made. `content` is a digest of the block.

        Raises:
            AlreadyExists: the id belongs to another request (REQUEST_ID_REUSED).
        """
        self._number += 1
        self._digest_before = self._digest
        self._digest = blake2b(self._digest + content, digest_size=_DIGEST).digest()
        if self._completed is not None or self._number < self._made:
            return
        done = await in_transaction(self._engine, partial(self._once, change))
        if done is None:
            return
        made, self.total = done
        self._made, self.later = self._number, self._answer()
        await made.afterwards()

    async def complete(self) -> M:
        """Return the answer, after the last block.

        Raises:
            AlreadyExists: as `make`.
        """
        if not self._asked.key.request_id:
            return self._sum(self.later)
        if self._completed is None:
            self.total = await in_transaction(self._engine, self._end)
        if self._completed is not None:
            self.total = replayed(
                self._completed, replace(self._asked, digest=self._digest), self._answer
            )
        return self.total

    async def _once(
        self, change: Callable[[AsyncConnection], Awaitable[Made[M]]], connection: AsyncConnection
    ) -> tuple[Made[M], M] | None:
        key = self._asked.key
        if key.request_id and await self._blocks_made(connection) >= self._number:
            return None
        made = await change(connection)
        total = self._sum(self.later, made.answer)
        if key.request_id:
            digest = self._digest + self._number.to_bytes(_NUMBER, "big")
            await store_progress(connection, key, digest, total.SerializeToString())
        await record_all(connection, [(self._asked, made)])
        return made, total

    async def _end(self, connection: AsyncConnection) -> M:
        key = self._asked.key
        made = await self._blocks_made(connection)
        if self._completed is not None:
            return self.total
        if made > self._number:
            raise reused(key.request_id)
        total = self._sum(self.later)
        await store_progress(connection, key, self._digest, total.SerializeToString())
        return total

    async def _blocks_made(self, connection: AsyncConnection) -> int:
        """Return how many blocks were made by all calls with this id.

        Others wait until this transaction ends.

        Raises:
            AlreadyExists: as `make`.
        """
        key = self._asked.key
        earlier = await begin_request(connection, key, self._digest, lock=True)
        if earlier is None:
            # This is the first block, or the stored request was removed meanwhile.
            return self._made
        if len(earlier.digest) == _DIGEST:
            self._completed = earlier
            return _ALL
        made, digest = int.from_bytes(earlier.digest[_DIGEST:], "big"), earlier.digest[:_DIGEST]
        known = {self._number: self._digest, self._number - 1: self._digest_before}
        if made <= self._number and known.get(made) != digest:
            raise reused(key.request_id)
        self._made = made
        self.total = self._answer.FromString(earlier.answer or b"")
        return made

    def _sum(self, *more: M) -> M:
        total = self._answer()
        for each in (self.total, *more):
            self._add(total, each)
        return total
