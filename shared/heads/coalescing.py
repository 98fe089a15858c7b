"""Loads heads for many calls at once: one load of all their senders."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from outbox_server.shared.coalesced import Coalesced
from outbox_server.shared.heads.loader import HeadLoader, load_soon


class ShardLoads:
    """Loads heads, those of each shard together: one shard that fails does not fail the others."""

    def __init__(self, loader: HeadLoader) -> None:
        self._loader = loader
        self._by_queue = {queue: Coalesced(partial(_load, loader)) for queue in loader.queues}

    async def load(self, sender_id: int) -> bool:
        """Load a head after a commit, by a load that begins after this call.

        Return whether it succeeded; the marker causes the load later if it did not.
        """
        return bool(await asyncio.shield(self.begin(sender_id)))

    def begin(self, sender_id: int) -> asyncio.Future[bool | None]:
        """Begin the same. Do not cancel the future, for which others wait too."""
        return self._by_queue[self._loader.queue_of(sender_id)].begin(sender_id)

    async def close(self) -> None:
        """Wait for the loads in progress."""
        for loads in self._by_queue.values():
            await loads.close()


async def _load(loader: HeadLoader, sender_ids: Sequence[int]) -> Mapping[int, bool]:
    return dict.fromkeys(sender_ids, await load_soon(loader, sender_ids))
