"""Calls the schedulers of a drill, and repeats each call until it is answered."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeVar

import grpc

T = TypeVar("T")

TRY_LIMIT_S: Final = 8.0
_TRY_PAUSE_S: Final = (0.05, 0.3)
_CHANNEL: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    # The minimum time limit of one attempt to connect. Shorter than TRY_LIMIT_S, so that a call may
    # connect again after a fault has ended.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # A connection of its own for each channel, even if several have the same address.
    ("grpc.use_local_subchannel_pool", 1),
)
# The codes after which a caller tries again. Any other code means a wrong request or server.
_REPEATED: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
    }
)
# Bugs of the server: the call is repeated, but the answer is recorded as wrong.
_OURS: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
# The text of grpc.aio (not of a server) when a connection ends while a stream is being sent.
_CUT_OFF: Final = "Internal error from Core"


@dataclass
class Answered:
    """The answers of the schedulers, which tell the drill what was accepted."""

    # Accepted rows by batch.
    batches: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0
    # How often a call had to be repeated, by the code that it failed with.
    repeated: Counter[str] = field(default_factory=Counter)
    # Answers that no fault explains.
    wrong: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """How many jobs were accepted."""
        return sum(self.batches.values())

    def add(self, other: Answered) -> None:
        """Add the answers that another caller got."""
        self.batches |= other.batches
        self.cancelled += other.cancelled
        self.repeated += other.repeated
        self.wrong += other.wrong


class DrillCaller:
    """The connections of one user to the schedulers, while the context is open."""

    def __init__(
        self,
        answered: Answered,
        addresses: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        chance: random.Random,
    ) -> None:
        """Without `credentials` there is neither TLS nor a key."""
        self._answered = answered
        self._addresses = addresses
        self._credentials = credentials
        self._chance = chance
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Self:
        """Make a channel for each address."""
        self._channels = [self._channel(address) for address in self._addresses]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    @property
    def first(self) -> grpc.aio.Channel:
        """The channel to the first scheduler."""
        return self._channels[0]

    async def until_answered(self, call: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T | None:
        """Call any scheduler until one answers. None means an answer that no fault explains."""
        while True:
            try:
                return await call(self._chance.choice(self._channels))
            except grpc.aio.AioRpcError as error:
                name = error.code().name
                if error.code() not in _REPEATED and error.details() != _CUT_OFF:
                    self._answered.wrong.append(f"{name}: {error.details()}")
                    if error.code() not in _OURS:
                        return None
                self._answered.repeated[name] += 1
            await asyncio.sleep(self._chance.uniform(*_TRY_PAUSE_S))

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=_CHANNEL)
        return grpc.aio.secure_channel(address, self._credentials, options=_CHANNEL)
