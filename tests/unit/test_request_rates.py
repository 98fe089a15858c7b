"""Streams of large requests that wait for the rate of their user."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from outbox_server.shared.rpc.request_rates import RequestRates


class Full(RequestRates):
    """A user who has sent too much, until `room` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.room = asyncio.Event()

    async def wait(self) -> None:
        await self.room.wait()


async def stream(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def test_the_end_of_a_stream_needs_no_wait() -> None:
    with pytest.raises(StopAsyncIteration):
        await anext(Full().limited(stream()))


async def test_a_read_that_is_cancelled_while_it_waits_loses_no_message() -> None:
    rates = Full()
    messages = rates.limited(stream(b"one", b"two"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(messages)
    rates.room.set()
    assert [message async for message in messages] == [b"one", b"two"]
