"""Deletes the keys of earlier key spaces (`shared.agreed`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Final

from redis.asyncio import Redis

from outbox_server.shared.queue.connection import client_of
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
        nodes: Iterable[Redis],
        key_spaces: Collection[str],
        wait: timedelta,
    ) -> None:
        """`wait` is how long the sends that began in them may still use them.

        `nodes` are clients of the servers that are searched. In a cluster, keys on a node without a
        shard of today stay until it has one.
        """
        self._redis = redis
        self._nodes = set(nodes)
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
        """Delete the keys, in small steps, and return how many there were."""
        if not self._key_spaces:
            return 0
        deleted = 0
        # By hash tag, because the keys of one command must be in one slot of a cluster.
        found: dict[str, list[str]] = {}
        for node in self._nodes:
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
