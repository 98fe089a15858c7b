"""The channel of the generated stubs: it adds an API key, a deadline and retries to calls."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from outbox_client import aio as io
from outbox_client.blocking import open_channel
from outbox_client.errors import CallError, error_of
from outbox_client.retries import BY_REQUEST_ID, RETRIED, TIMEOUTS, Attempts
from outbox_client.settings import Connection


class Channel:
    """Replaces gRPC's channel. Raises CallError for every call that fails."""

    def __init__(self, address: str, connection: Connection) -> None:
        self._connection = connection
        self._channel = io.open_channel(address, connection)
        # A channel for uploads (see `io.send_all`). Like the other, it connects at its first use.
        self._uploads = open_channel(address, connection)

    async def close(self) -> None:
        """Close the channel, and cancel calls in progress."""
        await self._channel.close()
        self._uploads.close()

    def unary_unary(self, method: str, *coders: Any, **named: Any) -> Callable[..., io.Answer]:
        """Return the function that calls a method. Calls that are safe to repeat are retried."""
        call = self._channel.unary_unary(method, *coders, **named)
        by_request_id = method in BY_REQUEST_ID
        safe = method in RETRIED
        usual = TIMEOUTS.get(method)

        async def answer(
            request: Any, timeout: float | None = None, metadata: Any = None, **more: Any
        ) -> Any:
            connection = self._connection
            limit = next(
                (each for each in (timeout, connection.timeout) if each is not None), usual
            )
            # With its caller's `request_id`, a change is made once, however often it is asked for.
            by_caller = bool(getattr(request, "request_id", ""))
            attempts = Attempts(connection.retry, limit, safe=safe or by_caller)
            if by_request_id:
                request = with_request_id(request)
            try:
                while True:
                    try:
                        return await call(
                            request,
                            timeout=attempts.remaining(),
                            metadata=connection.metadata(metadata),
                            **more,
                        )
                    except grpc.RpcError as error:
                        pause = attempts.pause_after(error_of(error))
                    await io.sleep(pause)
            except CallError as error:
                if by_request_id:
                    error.request_id = request.options.request_id
                raise

        return answer

    def unary_stream(self, method: str, *coders: Any, **named: Any) -> Callable[..., Any]:
        """Return the function that opens a stream: only the caller's deadline, and no retries."""
        call = self._channel.unary_stream(method, *coders, **named)

        async def answer(
            request: Any, timeout: float | None = None, metadata: Any = None, **more: Any
        ) -> AsyncIterator[Any]:
            stream = call(
                request, timeout=timeout, metadata=self._connection.metadata(metadata), **more
            )
            try:
                async for message in stream:
                    yield message
            except grpc.RpcError as error:
                raise error_of(error) from None
            finally:
                stream.cancel()

        return answer

    def stream_unary(self, method: str, *coders: Any, **named: Any) -> Callable[..., io.Answer]:
        """Return the function that uploads. It tries once, since the stream cannot be repeated."""
        call = self._uploads.stream_unary(method, *coders, **named)

        async def answer(
            messages: Any, timeout: float | None = None, metadata: Any = None, **_: Any
        ) -> Any:
            connection = self._connection
            limit = connection.upload_timeout if timeout is None else timeout
            try:
                return await io.send_all(call, messages, limit, connection.metadata(metadata))
            except grpc.RpcError as error:
                raise error_of(error) from None

        return answer

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Any:
        """Refuse: Outbox has no such method."""
        raise NotImplementedError(method)


def with_request_id(request: Any) -> Any:
    """Return the request, with a new `options.request_id` if it has none."""
    if request.options.request_id:
        return request
    copy = type(request)()
    copy.CopyFrom(request)
    copy.options.request_id = str(uuid.uuid4())
    return copy
