"""What differs between asyncio and threads: this, for threads. Its asyncio twin is aio.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import grpc

from outbox_client.settings import Connection
from outbox_client.sources import READ_BYTES

# What a call of one answer returns.
Answer: TypeAlias = Any

sleep = time.sleep


def open_channel(address: str, connection: Connection) -> grpc.Channel:
    """Open a channel; it connects when it is first used."""
    options = connection.channel_options
    if connection.credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, connection.credentials, options=options)


class Sending:
    """A call that streams messages. An error of theirs cancels the call and is its result.

    gRPC reads the messages in a thread of its own, and would log what they raise and call it
    UNKNOWN. The call is cancelled before they end: half an upload must not pass for a whole one.
    """

    def __init__(
        self, method: Any, messages: Iterator[Any], timeout: float | None, metadata: Any
    ) -> None:
        self._raised: BaseException | None = None
        self._made = threading.Event()
        self.call = method.future(self._read(messages), timeout=timeout, metadata=metadata)
        self._made.set()

    def result(self) -> Any:
        """Wait for the answer.

        Raises:
            grpc.RpcError: the call failed.
            BaseException: what the messages raised.
        """
        try:
            return self.call.result()
        except grpc.FutureCancelledError:
            if self._raised is not None:
                raise self._raised from None
            raise
        finally:
            self.call.cancel()

    def _read(self, messages: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from messages
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - is raised by `result`
            self._raised = error
            self._made.wait()
            self.call.cancel()


def send_all(method: Any, messages: Any, timeout: float | None, metadata: Any) -> Any:
    """Make a call that streams `messages`, and return its answer."""
    return Sending(method, each(messages), timeout, metadata).result()


def each(source: Any) -> Iterator[Any]:
    """Yield what a source holds: the bytes of a file, or the items of an iterable."""
    if hasattr(source, "read"):
        while data := source.read(READ_BYTES):
            yield data
    else:
        yield from source


def opened(source: Any) -> AbstractContextManager[Any]:
    """Open a source."""
    manager: AbstractContextManager[Any] = source.open()
    return manager
