"""What wakes a dispatcher that waits, and what a later claim may conclude from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest_asyncio
from redis.asyncio import Redis

from outbox_server.services.dispatcher.wake import WakeListener
from tests.eventually import PATIENCE, eventually

LONG = timedelta(seconds=PATIENCE)


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest_asyncio.fixture
async def listener(redis: Redis) -> AsyncIterator[WakeListener]:
    found = WakeListener(redis, "wake")
    listening = asyncio.create_task(found.run())

    async def subscribed() -> bool:
        return (await redis.pubsub_numsub("wake"))[0][1] == 1

    await eventually(subscribed)
    await found.wait(LONG)
    found.clear()
    yield found
    listening.cancel()
    await asyncio.wait([listening])


async def test_a_message_says_that_there_is_new_mail(redis: Redis, listener: WakeListener) -> None:
    await redis.publish("wake", "1")
    await listener.wait(LONG)
    assert listener.heard
    listener.clear()
    assert not listener.heard


async def test_the_dispatcher_wakes_itself_without_new_mail(listener: WakeListener) -> None:
    listener.wake()
    await listener.wait(LONG)
    assert not listener.heard


async def test_new_mail_may_have_come_once_a_wait_is_over(listener: WakeListener) -> None:
    await listener.wait(timedelta(milliseconds=1))
    assert listener.heard
