"""Limits how fast the large requests of a user arrive while others call.

Each byte of a request costs time before anything of it can be checked: it is decrypted, copied and
decoded, and a message of 5 MiB stops the event loop for some milliseconds. So the next message of a
user who has sent much waits until the bytes of those before are within the rate. What follows it is
not read meanwhile, and the network holds the client up. The rate is above what any method reads:
CSV files are read at 3 MiB/s. Small calls of the same user wait as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from outbox_server.shared.callers import call_under_way
from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.rpc.streams import single_message
from outbox_server.shared.turns import Turn

if TYPE_CHECKING:
    import grpc

# What a user may send at once, and per second beyond it, in bytes.
_AT_ONCE: Final = 8 * 1024 * 1024
_PER_S: Final = 16 * 1024 * 1024
# After this time a call looks whether others still call.
_LONGEST_REST_S: Final = 0.25
# A smaller message of a unary call does not count: the turns of calls limit those. A message of a
# stream counts as this many bytes at least.
_SMALL: Final = 16 * 1024


class RequestRates:
    """The bytes that each user has sent lately to a server.

    What is stored about users who have sent none for a while goes with the next large message.
    """

    def __init__(self) -> None:
        # By user: the bytes that count, at a time of the event loop.
        self._received: dict[Claimant, tuple[float, float]] = {}

    async def single_message(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes:
        """Return the message of a unary call, once its user may send it.

        Raises:
            InvalidInput: MALFORMED_MESSAGE: there is none.
        """
        await self.wait()
        message = await single_message(messages, context)
        self.add(len(message))
        return message

    def limited(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Return the messages of a stream, each once its user may send it."""
        return _LimitedMessages(self, messages)

    async def wait(self) -> None:
        """Wait until the user of the current call may send more. The user's other calls go on."""
        turn = _turn()
        while turn is not None and (rest := self._rest(turn)) > 0:
            turn.pause()
            await asyncio.sleep(min(rest, _LONGEST_REST_S))
            # Calls that have waited go on one by one, so each sees what those before have sent.
            await turn.take()

    def add(self, size: int) -> None:
        """Count a message of the current call."""
        turn = _turn()
        if size < _SMALL or turn is None:
            return
        now = asyncio.get_running_loop().time()
        for claimant, (count, at) in list(self._received.items()):
            if count <= (now - at) * _PER_S:
                del self._received[claimant]
        count, at = self._received.get(turn.claimant, (0.0, now))
        self._received[turn.claimant] = (count - (now - at) * _PER_S + size, now)

    def _rest(self, turn: Turn) -> float:
        """Return for how long the user's next message has to wait, in seconds."""
        found = self._received.get(turn.claimant)
        if found is None or not (turn.is_limited and turn.others_call()):
            return 0.0
        count, at = found
        return (count - _AT_ONCE) / _PER_S - (asyncio.get_running_loop().time() - at)


class _LimitedMessages:
    """The messages of a stream. Unlike a generator, it goes on after a cancelled read."""

    def __init__(self, rates: RequestRates, messages: AsyncIterator[bytes]) -> None:
        self._rates = rates
        self._messages = messages
        # Made at the first read: grpc.aio warns of an iterator that is never used.
        self._iterator: AsyncIterator[bytes] | None = None
        # A message that was read and has to wait.
        self._read: bytes | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._read is None:
            if self._iterator is None:
                self._iterator = aiter(self._messages)
            # The end of the stream needs no wait.
            self._read = await anext(self._iterator)
        await self._rates.wait()
        message, self._read = self._read, None
        self._rates.add(max(len(message), _SMALL))
        return message


def _turn() -> Turn | None:
    call = call_under_way()
    return None if call is None else call.turn
