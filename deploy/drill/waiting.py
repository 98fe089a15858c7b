"""Polls for conditions without an event, such as the state of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

_POLL_S: Final = 0.02


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float) -> None:
    """Return as soon as `condition` returns True.

    Raises:
        TimeoutError: it did not within `limit_s` seconds.
    """
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(_POLL_S)
