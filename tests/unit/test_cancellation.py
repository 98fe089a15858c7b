from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from shared.cancellation import raise_if_cancelled


async def test_a_loop_that_lost_its_cancellation_ends_all_the_same() -> None:
    async def loop_for_ever() -> None:
        while True:
            raise_if_cancelled()
            with suppress(asyncio.CancelledError):  # as `wait_for` does, now and then
                await asyncio.sleep(0)

    task = asyncio.create_task(loop_for_ever())
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task
