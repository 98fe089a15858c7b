"""Time limits of an SMTP session: one per phase (RFC 5321, section 4.5.3.2), and a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

from outbox_server.shared.settings import Settings


class Deadline(Protocol):
    """The time by which a session must have stopped. It may move."""

    @property
    def until(self) -> float:
        """The current end, as a value of `time.monotonic`."""

    def limit(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """Bound a wait by `seconds` from now and by the deadline.

        Raises:
            TimeoutError: one of them has passed.
        """

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` each time the end moves to an earlier time."""

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling `watcher`."""


class FixedDeadline:
    """A deadline that lies `seconds` from now and does not move."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def until(self) -> float:
        """The end, as a value of `time.monotonic`."""
        return self._until

    def limit(self, seconds: float) -> AbstractAsyncContextManager[Any]:
        """Bound a wait by `seconds` from now and by the deadline.

        Raises:
            TimeoutError: one of them has passed.
        """
        return asyncio.timeout(min(seconds, self._until - time.monotonic()))

    def watch(self, watcher: Callable[[], None]) -> None:
        """Do nothing, because the end never moves."""

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Do nothing, because the end never moves."""


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """The limit of each phase, in seconds.

    `connect` limits a TCP connect, and a TLS handshake. `ehlo` limits each reply to EHLO, STARTTLS
    and AUTH; `data` the reply to DATA; `end` the reply to the final dot. `block` limits how long
    the server may accept no more bytes of a body.
    """

    connect: float
    greeting: float
    ehlo: float
    mail: float
    rcpt: float
    data: float
    block: float
    end: float

    @classmethod
    def from_settings(cls, settings: Settings) -> PhaseLimits:
        """Read OUTBOX_SMTP_*_TIMEOUT. If OUTBOX_SMTP_TIMEOUT is set, it replaces them all."""
        if settings.smtp_timeout is not None:
            return cls.of(settings.smtp_timeout.total_seconds())
        return cls(
            connect=settings.smtp_connect_timeout.total_seconds(),
            greeting=settings.smtp_greeting_timeout.total_seconds(),
            ehlo=settings.smtp_ehlo_timeout.total_seconds(),
            mail=settings.smtp_mail_timeout.total_seconds(),
            rcpt=settings.smtp_rcpt_timeout.total_seconds(),
            data=settings.smtp_data_timeout.total_seconds(),
            block=settings.smtp_block_timeout.total_seconds(),
            end=settings.smtp_end_timeout.total_seconds(),
        )

    @classmethod
    def of(cls, seconds: float) -> PhaseLimits:
        """Return limits that all equal `seconds`."""
        return cls(**{field.name: seconds for field in fields(cls)})
