"""The messages between a pool and its worker processes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final, TypeAlias

import msgpack

# Gives the next step of a job this number of CPU budgets, from now on.
StartBudget: TypeAlias = Callable[[float], None]
# The job that shows a pool that a worker has started. Its result is None.
READY: Final = "ready"


class WorkerReply(IntEnum):
    """How a job ended in its worker."""

    DONE = 0
    # An InvalidInput or a RenderError: the template or the row is wrong.
    INVALID = 1
    REFUSED = 2
    OUT_OF_MEMORY = 3
    # A bug.
    FAILED = 4
    OVER_BUDGET = 5


def to_frame(document: list[object]) -> bytes:
    """Return a document after its length."""
    data: bytes = msgpack.packb(document, unicode_errors="surrogatepass")
    return len(data).to_bytes(4, "big") + data


def from_frame(data: bytes | bytearray) -> object:
    """Return the document.

    Raises:
        ValueError: it is not msgpack.
    """
    try:
        return msgpack.unpackb(data, unicode_errors="surrogatepass")
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(str(error)) from None


def length_of(head: bytes | bytearray) -> int:
    """Return the length that a frame begins with."""
    return int.from_bytes(head, "big")
