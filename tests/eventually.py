"""Waits for a condition; no other code of the tests sleeps."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, overload

T = TypeVar("T")

# The pauses between two checks of a condition. Many conditions query PostgreSQL or open a channel,
# so a pause is a share of the time that was waited already.
_SHORTEST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.2
_SHARE: Final = 0.2
# A wait ends as soon as its condition is true. This limit is for a busy machine.
PATIENCE: Final = 120.0


@overload
async def eventually(condition: Callable[[], Awaitable[T]], deadline: float = PATIENCE) -> T: ...
@overload
async def eventually(condition: Callable[[], T], deadline: float = PATIENCE) -> T: ...
async def eventually(condition: Callable[[], Any], deadline: float = PATIENCE) -> Any:
    """Wait until the sync or async condition is truthy; return its value.

    Raises:
        AssertionError: it was not truthy within `deadline` seconds; the text shows its last value.
    """
    began = time.monotonic()
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        waited = time.monotonic() - began
        if waited > deadline:
            name = getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"{name} was still {value!r} after {deadline:g} s")
        await asyncio.sleep(min(max(_SHORTEST_PAUSE, waited * _SHARE), _LONGEST_PAUSE))
