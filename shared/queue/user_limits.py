"""Limits of users: how many jobs a claim may take, and how fast a user may send."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from outbox_server.shared.settings import Settings


@dataclass(frozen=True, slots=True)
class UserLimit:
    """A limit for one claim. Users without such a limit are not limited.

    `user` is the key of `circuit_keys.user_key`. `first` jobs are taken in the order in which
    senders have waited; further jobs, up to `most`, only if no other user's job is left.
    """

    user: str
    first: int
    most: int


@dataclass(frozen=True, slots=True)
class UserSendLimits:
    """The limits that a user has for the mail of all its senders together. Zero means none."""

    # Sends whose ends lie in one trailing window.
    hourly_limit: int = 0
    # The time from the end of a send to the start of the next.
    gap: timedelta = timedelta(0)

    @classmethod
    def from_settings(cls, settings: Settings) -> UserSendLimits:
        """Return the limits of users without limits of their own."""
        return cls(settings.user_hourly_limit, settings.user_gap)

    def overridden(self, hourly_limit: int | None, min_gap_ms: int | None) -> UserSendLimits:
        """Return these limits with those that were set for one user. None means not set."""
        return UserSendLimits(
            self.hourly_limit if hourly_limit is None else hourly_limit,
            self.gap if min_gap_ms is None else timedelta(milliseconds=min_gap_ms),
        )

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return bool(self.hourly_limit or self.gap)


NO_USER_LIMITS: Final = UserSendLimits()
