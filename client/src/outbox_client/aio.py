"""What differs between asyncio and threads: this, for asyncio. Its blocking twin is blocking.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeAlias

import grpc

from outbox_client.blocking import Sending
from outbox_client.settings import Connection
from outbox_client.sources import READ_BYTES

# What a call of one answer returns.
Answer: TypeAlias = Awaitable[Any]

sleep = asyncio.sleep

_END: Final = object()


def open_channel(address: str, connection: Connection) -> grpc.aio.Channel:
    """Open a channel; it connects when it is first used."""
    options = connection.channel_options
    if connection.credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, connection.credentials, options=options)


async def send_all(method: Any, messages: Any, timeout: float | None, metadata: Any) -> Any:
    """Make a call that streams `messages`, and return its answer.

    `method` is of a blocking channel, whose thread reads the messages from this loop: where a
    server refuses while we write, grpc.aio answers INTERNAL and loses what the server said.
    """
    loop = asyncio.get_running_loop()
    stream: Any = messages if hasattr(messages, "aclose") else each(messages)
    reading = asyncio.Lock()
    futures: list[Future[Any]] = []
    ended = asyncio.Event()

    async def read() -> Any:
        async with reading:
            return await anext(stream, _END)

    def pull() -> Iterator[Any]:
        while True:
            futures[:] = [asyncio.run_coroutine_threadsafe(read(), loop)]
            message = futures[0].result()
            if message is _END:
                return
            yield message

    def tell(_: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(ended.set)

    sending = Sending(method, pull(), timeout, metadata)
    sending.call.add_done_callback(tell)
    try:
        await ended.wait()
        return sending.result()
    finally:
        sending.call.cancel()
        for future in futures:
            future.cancel()
        async with reading:
            # Its file is closed with it.
            await stream.aclose()


async def each(source: Any) -> AsyncIterator[Any]:
    """Yield what a source holds: the bytes of a file, or the items of an iterable of any kind."""
    if hasattr(source, "read"):
        # A pipe may keep us waiting: not in the event loop.
        while data := await asyncio.to_thread(source.read, READ_BYTES):
            yield data
    elif hasattr(source, "__aiter__"):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


@asynccontextmanager
async def opened(source: Any) -> AsyncIterator[Any]:
    """Open a source in a thread: it may have to be written to a file first."""
    manager = source.open()
    stream = await asyncio.to_thread(manager.__enter__)
    try:
        yield stream
    finally:
        manager.__exit__(None, None, None)
