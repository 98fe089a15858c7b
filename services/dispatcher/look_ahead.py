"""Prepares mail that is due soon: reads batches and senders before a claim asks for them.

A mark returns the present revisions of the job's batch and sender. What was prepared from older
ones is then read again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Final

from outbox_server.services.dispatcher.storage import UpcomingBatch
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import UpcomingJobs

# Mail is prepared at most this long before it is due.
AHEAD: Final = timedelta(seconds=1)
_PAUSE: Final = timedelta(milliseconds=500)
# The pause while many senders have mail that is due soon.
_SHORT_PAUSE: Final = timedelta(milliseconds=20)
# The maximum number of senders of one part. It takes 1 ms of Redis, and 2 ms of PostgreSQL for 100
# new batches.
PART: Final = 250


class LookAhead:
    """Looks at each shard twice a second. Its cost does not depend on how much mail waits."""

    def __init__(
        self,
        queues: Sequence[Queue],
        find: Callable[[Sequence[int]], Awaitable[Mapping[int, UpcomingBatch]]],
        prepare: Callable[[Mapping[int, UpcomingBatch]], Awaitable[None]],
    ) -> None:
        """`find` returns the batches of jobs; `prepare` prepares them."""
        self._find = find
        self._prepare = prepare
        self._last: dict[Queue, UpcomingJobs] = {}
        self._queues = queues

    async def step(self) -> timedelta:
        """Prepare the next part of each shard. Return the pause until the next one."""
        pause = _PAUSE
        error: Exception | None = None
        for queue in self._queues:
            try:
                found = await queue.find_upcoming(AHEAD, PART, self._last.get(queue))
            except QUEUE_ERRORS as failure:
                # In a cluster, other shards are served.
                error = failure
                continue
            self._last[queue] = found
            if found.job_ids:
                await self._prepare(await self._find(found.job_ids))
            if found.more:
                pause = _SHORT_PAUSE
        if error is not None:
            raise error
        return pause
