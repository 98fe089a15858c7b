from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta

import pytest
from outbox.v1.batch_service_pb2 import UploadBatchRequest

from outbox_server.shared.errors import Unavailable
from outbox_server.shared.intake.upload_rate import LeastRate


def chunk(size: int) -> UploadBatchRequest:
    return UploadBatchRequest(chunk=bytes(size))


async def paced(count: int, size: int, pause: float) -> AsyncIterator[UploadBatchRequest]:
    """Yield messages with a pause before each, without a sleep."""
    for _ in range(count):
        try:
            async with asyncio.timeout(pause):
                await asyncio.Event().wait()
        except TimeoutError:
            yield chunk(size)


async def read(rate: LeastRate, messages: AsyncIterator[UploadBatchRequest]) -> int:
    async with aclosing(rate.keep(messages)) as kept:  # type: ignore[type-var]  # a generator
        return len([each async for each in kept])


async def test_an_upload_at_the_least_rate_is_read_to_its_end() -> None:
    rate = LeastRate(1_000, timedelta(seconds=0.3))
    # 20 times 100 bytes in 1 s.
    assert await read(rate, paced(20, 100, 0.05)) == 20


async def test_a_slower_upload_ends_also_after_a_fast_beginning() -> None:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield chunk(1_000_000)
        async for each in paced(100_000, 1, 0.01):
            yield each

    rate = LeastRate(1_000, timedelta(seconds=0.2))
    with pytest.raises(Unavailable, match="slower than 1,000 bytes per second") as caught:
        await read(rate, messages())
    assert caught.value.reason == "UPLOAD_TOO_SLOW"


@pytest.mark.parametrize("rate", [0, 1_000])
async def test_an_upload_that_sends_nothing_ends(rate: int) -> None:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield chunk(1_000_000)
        await asyncio.Event().wait()

    with pytest.raises(Unavailable) as caught:
        await read(LeastRate(rate, timedelta(seconds=0.05)), messages())
    assert caught.value.reason == "UPLOAD_STALLED"


async def test_the_time_in_which_the_server_is_busy_does_not_count() -> None:
    rate = LeastRate(1_000, timedelta(seconds=0.2))
    seen = 0
    async for _ in rate.keep(paced(3, 1, 0.0)):
        seen += 1
        async for _ in paced(1, 0, 0.25):
            pass
    assert seen == 3


async def test_without_a_least_rate_every_rate_is_accepted() -> None:
    rate = LeastRate(0, timedelta(seconds=0.2))
    assert await read(rate, paced(30, 1, 0.02)) == 30
