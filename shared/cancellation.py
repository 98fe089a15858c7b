"""Guards loops against a cancellation that got lost."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raise CancelledError if the running task was cancelled, and has swallowed it.

    Python 3.11's `asyncio.wait_for`, by which redis-py writes, loses a cancellation that comes
    together with its result. A loop that goes on would never end, and whoever cancelled it waits.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
