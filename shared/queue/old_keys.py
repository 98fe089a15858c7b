"""Deletes the keys of earlier key spaces (`shared.agreed`)."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import timedelta
from typing import Final

from redis.asyncio import Redis

from outbox_server.shared.queue.connection import QUEUE_ERRORS, client_of, nodes_of
from outbox_server.shared.queue.following import FollowingClient

_TAG: Final = re.compile(r"outbox:\{(?:([^.}]*)\.)?\d+\}:")
_AT_ONCE: Final = 500
# A process that was paused may write to an earlier key space much later.
_PAUSE: Final = timedelta(hours=1)


class OldKeys:
    """Deletes the keys of earlier key spaces, again and again.

    Keys of later ones are never touched: a process that knows only an earlier state of the settings
    must not delete what came after it.
    """

    def __init__(
        self,
        redis: FollowingClient,
        key_spaces: Collection[str],
        wait: timedelta,
    ) -> None:
        """`wait` is how long the sends that began in them may still use them."""
        self._redis = redis
        self._key_spaces = frozenset(key_spaces)
        self._wait: timedelta | None = wait

    async def delete_soon(self) -> timedelta:
        """Delete the keys if they are not in use any more. Return the time until the next try."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            return wait
        await self.delete()
        return _PAUSE

    async def delete(self) -> int:
        """Delete the keys, in small steps, and return how many there were.

        All nodes of a cluster are searched: one that has no shard now may have had one before.

        Raises:
            redis.exceptions.RedisError, OSError: a server cannot be reached. The others were
                searched.
        """
        if not self._key_spaces:
            return 0
        deleted, error = 0, None
        for node in await nodes_of(self._redis):
            try:
                deleted += await self._delete_on(node)
            except QUEUE_ERRORS as found:
                error = found
        if error is not None:
            raise error
        return deleted

    async def _delete_on(self, node: Redis) -> int:
        deleted = 0
        # Grouped by hash tag, because the keys of one command must be in one slot of a cluster.
        found: dict[str, list[str]] = {}
        async for key in node.scan_iter(match="outbox:{*", count=_AT_ONCE):
            name = key.decode() if isinstance(key, bytes) else key
            tag = _TAG.match(name)
            if tag is None or (tag[1] or "") not in self._key_spaces:
                continue
            keys = found.setdefault(tag[0], [])
            keys.append(name)
            if len(keys) >= _AT_ONCE:
                deleted += await self._unlink(found.pop(tag[0]))
        for keys in found.values():
            deleted += await self._unlink(keys)
        return deleted

    async def _unlink(self, keys: list[str]) -> int:
        return int(await client_of(self._redis, keys[0]).unlink(*keys))
