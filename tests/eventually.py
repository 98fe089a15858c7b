"""Waits for a condition; no other code of the tests sleeps."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, overload

T = TypeVar("T")

# Between two looks at the condition, many of which ask PostgreSQL: short at first, longer later.
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.05
# A wait ends as soon as its condition is true; this is when to give up, on a busy machine.
PATIENCE: Final = 120.0


@overload
async def eventually(condition: Callable[[], Awaitable[T]], deadline: float = PATIENCE) -> T: ...
@overload
async def eventually(condition: Callable[[], T], deadline: float = PATIENCE) -> T: ...
async def eventually(condition: Callable[[], Any], deadline: float = PATIENCE) -> Any:
    """Return the condition's value, sync or async, once it is true in the sense of `if`.

    Raises:
        AssertionError: it was not within `deadline` seconds; the text shows its last value.
    """
    end = time.monotonic() + deadline
    pause = _FIRST_PAUSE
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > end:
            name = getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"{name} was still {value!r} after {deadline:g} s")
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, _LONGEST_PAUSE)
