"""Decides the shard of each sender.

It is chosen by the sender's id. The senders of a user with limits share these limits, so they must
be in one shard: once the user has limits, its senders have a `shard_key`, which is the same for all
of them and never changes again. Every process learns it from what it loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from cachetools import LRUCache

from outbox_server.shared.queue.queue import Queue

# The maximum number of senders whose shard is remembered. A load finds the shard of others.
_MOST_ROUTES: Final = 100_000


class Routes:
    """The shards of senders, as far as this process knows them."""

    def __init__(self, queues: Sequence[Queue]) -> None:
        self.queues = queues
        # It has only senders that are not in the shard of their id.
        self._moved: LRUCache[int, Queue] = LRUCache(_MOST_ROUTES)

    def by_id(self, sender_id: int) -> Queue:
        """Return the shard of a sender without a shard key."""
        return self.queues[sender_id % len(self.queues)]

    def by_key(self, sender_id: int, shard_key: int | None) -> Queue:
        """Return the shard of a sender, and remember it."""
        if shard_key is None:
            return self.by_id(sender_id)
        queue = self.queues[shard_key % len(self.queues)]
        self.learn(sender_id, queue)
        return queue

    def learn(self, sender_id: int, queue: Queue) -> None:
        """Remember that a sender is in a shard."""
        if queue is not self.by_id(sender_id):
            self._moved[sender_id] = queue

    def of(self, sender_id: int) -> Queue:
        """Return the shard of a sender, as far as it is known."""
        return self._moved.get(sender_id) or self.by_id(sender_id)

    def grouped(self, sender_ids: Iterable[int]) -> dict[Queue, list[int]]:
        """Return the senders by the shard of each, without duplicates."""
        by_queue: dict[Queue, list[int]] = {}
        for sender_id in dict.fromkeys(sender_ids):
            by_queue.setdefault(self.of(sender_id), []).append(sender_id)
        return by_queue
