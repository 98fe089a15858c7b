"""Ends uploads that are slower than a least rate, because they hold places that others need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

from outbox_server.shared.errors import Unavailable

if TYPE_CHECKING:
    from outbox_server.shared.settings import Settings


class _Sized(Protocol):
    def ByteSize(self) -> int: ...  # noqa: N802 - the name in protobuf


M = TypeVar("M", bound=_Sized)


@dataclass(frozen=True, slots=True)
class LeastRate:
    """The least rate of an upload in bytes per second, and how long it may be slower."""

    rate: int
    patience: timedelta

    @classmethod
    def from_settings(cls, settings: Settings) -> LeastRate:
        """Return the rate that the operator has set."""
        return cls(settings.upload_least_rate, settings.upload_patience)

    async def keep(self, messages: AsyncIterator[M]) -> AsyncIterator[M]:
        """Yield the messages. Only the time spent waiting for the caller counts.

        This is a token bucket of time. It starts full, with `patience`. Waiting drains it. Each
        message refills it by the time that its bytes take at the least rate. So a fast start does
        not allow hours at one byte per second afterwards.

        Raises:
            Unavailable: UPLOAD_STALLED: nothing arrived for `patience`; UPLOAD_TOO_SLOW.
        """
        loop = asyncio.get_running_loop()
        longest = self.patience.total_seconds()
        left = longest
        while True:
            began = loop.time()
            try:
                async with asyncio.timeout(left):
                    message = await anext(messages, None)
            except TimeoutError:
                raise self._refusal(silent=left >= longest) from None
            if message is None:
                return
            left -= loop.time() - began
            earned = message.ByteSize() / self.rate if self.rate else longest
            left = min(left + earned, longest)
            yield message

    def _refusal(self, *, silent: bool) -> Unavailable:
        seconds = f"{self.patience.total_seconds():g} s"
        if silent:
            return Unavailable(
                f"no chunk arrived for {seconds}, so the upload was stopped; nothing was accepted, "
                "try again",
                reason="UPLOAD_STALLED",
            )
        return Unavailable(
            f"the upload was slower than {self.rate:,} bytes per second for {seconds} in all, so "
            "it was stopped; nothing was accepted, try again with larger chunks",
            reason="UPLOAD_TOO_SLOW",
            metadata={"least_rate": str(self.rate)},
        )
