"""Reading the messages of a call, as grpc.aio needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.rpc.field_limits import check_fields

if TYPE_CHECKING:
    import grpc

    _Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

Decode: TypeAlias = Callable[[bytes], Awaitable[Any]]

# How long an answer waits for the end of a stream that it does not need, in seconds.
_REST_S: Final = 1.0


async def complete_stream(
    messages: AsyncIterator[bytes], context: _Context, decode: Decode
) -> AsyncIterator[Any]:
    """Yield the messages, decoded; fail at the end if the caller did not end the stream itself.

    grpc.aio reports a failed read (the caller cancelled or vanished, a message exceeded the size
    limit) as the end of the stream, and cancels the handler some steps later. So half an upload
    would look complete. Sending headers fails on such a call, which reveals it.
    """
    async for message in checked_stream(messages, decode):
        yield message
    await uninterrupted(context.send_initial_metadata(()))


async def read_the_rest(messages: AsyncIterator[bytes]) -> None:
    """Read what the caller still sends, so that it gets the answer that follows.

    A caller that uses grpc.aio may lose an answer that arrives while it sends; it then reports
    INTERNAL (https://github.com/grpc/grpc/issues/36066). A caller that sends for longer still gets
    its answer.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            async for _ in messages:
                pass


async def checked_stream(messages: AsyncIterator[bytes], decode: Decode) -> AsyncIterator[Any]:
    """Yield the decoded messages of a caller, whose fields are within their limits."""
    async for data in messages:
        message = await decode(data)
        check_fields(message)
        yield message


async def single_message(messages: AsyncIterator[bytes], context: _Context) -> bytes:
    """Return the message of a unary call.

    Raises:
        InvalidInput: MALFORMED_MESSAGE: there is none.
    """
    async for message in messages:
        return message
    # As in `complete_stream`, the caller may have left, or the message exceeded the size limit.
    await uninterrupted(context.send_initial_metadata(()))
    raise InvalidInput("the call has no message", reason="MALFORMED_MESSAGE")


async def uninterrupted(sending: Awaitable[None]) -> None:
    """Finish sending before a cancellation: after half a write grpc.aio cannot send a status.

    It would send the headers a second time, which grpc's core refuses, so the caller would never
    learn that the call ended. A write to a caller that does not read ends with the call.
    """
    task = asyncio.ensure_future(sending)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
