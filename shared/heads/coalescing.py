"""Adds new jobs to Redis for many calls and senders at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.coalesced import Coalesced
from outbox_server.shared.heads.loader import HeadLoader, load_soon, soon
from outbox_server.shared.heads.markers import DoneMarkers, MarkerDeletion
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.parts import parts_by_cost
from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.queue.records import NewJobs

# How long one script may block Redis, in us.
_LONGEST = 2_000


class ShardLoads:
    """Loads heads, those of each shard together. A shard that fails does not affect the others."""

    def __init__(self, loader: HeadLoader, statements: AsyncEngine) -> None:
        """`statements` is an engine that runs single statements."""
        self._loader = loader
        self._markers = MarkerDeletion(statements)
        self._by_queue = {queue: Coalesced(self._work) for queue in loader.queues}
        # What the next round adds to the heads of senders. None means to load the head instead.
        self._new: dict[int, list[NewJobs] | None] = {}

    async def load(self, sender_id: int) -> bool:
        """Load a head after a commit, by a load that begins after this call.

        Return whether it succeeded; the marker causes the load later if it did not.
        """
        self._new[sender_id] = None
        return bool(await asyncio.shield(self._begin(sender_id)))

    def add(self, sender_id: int, new: NewJobs) -> asyncio.Future[bool | None]:
        """Begin to add jobs to a head. All those with the same marker must be added at once.

        The future has the result of `load`. Do not cancel it, because others wait for it too.
        """
        others = self._new.setdefault(sender_id, [])
        if others is not None:
            others.append(new)
        return self._begin(sender_id)

    async def close(self) -> None:
        """Wait for the loads in progress."""
        for loads in self._by_queue.values():
            await loads.close()
        await self._markers.close()

    def _begin(self, sender_id: int) -> asyncio.Future[bool | None]:
        return self._by_queue[self._loader.queue_of(sender_id)].begin(sender_id)

    async def _work(self, sender_ids: Sequence[int]) -> Mapping[int, bool]:
        new = {sender_id: self._new.pop(sender_id, None) for sender_id in sender_ids}
        added = {sender_id: some for sender_id, some in new.items() if some}
        loaded = [sender_id for sender_id in sender_ids if sender_id not in added]
        done: dict[int, bool] = {}
        if added:
            done |= dict.fromkeys(added, await soon(self._add(added), list(added)))
        if loaded:
            done |= dict.fromkeys(loaded, await load_soon(self._loader, loaded))
        return done

    async def _add(self, new: Mapping[int, Sequence[NewJobs]]) -> None:
        """Add jobs to heads without reading PostgreSQL.

        Senders whose jobs cannot be added are loaded instead (add_jobs.lua), and those with more
        new jobs than a head has. With several shards all of them are, because only PostgreSQL
        knows the shard of a sender.
        """
        jobs = {sender_id: _all_jobs(some) for sender_id, some in new.items()}
        some = [each for each in jobs.items() if len(each[1]) <= HEAD_SIZE]
        added: set[int] = set()
        if len(self._loader.queues) == 1:
            (queue,) = self._loader.queues
            for part in parts_by_cost(some, _cost, most=_LONGEST):
                left = await queue.add_jobs(dict(part))
                life, done = queue.life, {sender_id for sender_id, _ in part}.difference(left)
                if done:
                    ids = {each.marker_id for sender_id in done for each in new[sender_id]}
                    self._markers.begin(DoneMarkers(queue, life, sorted(ids)))
                added |= done
        if others := new.keys() - added:
            await self._loader.load(sorted(others), committed=True)


def _cost(of_sender: tuple[int, Sequence[object]]) -> int:
    """Return about how many us Redis needs to add the jobs of a sender."""
    return 60 + 5 * len(of_sender[1])


def _all_jobs(new: Iterable[NewJobs]) -> list[tuple[JobRef, int]]:
    return [job for each in new for job in each.jobs]
