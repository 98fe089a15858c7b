"""The state of the limits of a sender and of its user, as limiter.lua returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from outbox_server.shared.queue.user_limits import NO_USER_LIMITS, UserSendLimits


@dataclass(frozen=True, slots=True)
class LimiterState:
    """The current state of the limits of a sender, or of a user.

    A time in the past is zero or negative.
    """

    in_flight: int
    gap_left: timedelta
    window_left: timedelta
    # How long ago a dispatcher claimed the job that was asked about. None means that no dispatcher
    # has it.
    claimed_for: timedelta | None = None
    # The sender waits because its user may have no more of a dispatcher's slots.
    parked: bool = False
    # The gap that the mail server's complaints about the rate have caused. Zero means none.
    pace: timedelta = timedelta(0)
    # The state of the limits that the user has for all its senders together, and these limits.
    user: LimiterState | None = None
    user_limits: UserSendLimits = NO_USER_LIMITS


def limiter_state_of(found: Sequence[int], lease: int) -> LimiterState:
    """Return the state from the result of limiter.lua. `lease` is the length of a lease in ms."""
    left, parked, pace, *states = found
    own, of_user = _state(states[:3]), states[3:]
    own = replace(
        own,
        claimed_for=timedelta(milliseconds=lease - left) if left >= 0 else None,
        parked=parked == 1,
        pace=timedelta(milliseconds=pace),
    )
    if not of_user:
        return own
    *user, limit, gap = of_user
    limits = UserSendLimits(limit, timedelta(milliseconds=gap))
    return replace(own, user=_state(user), user_limits=limits)


def _state(found: Sequence[int]) -> LimiterState:
    in_flight, gap, window = found
    return LimiterState(in_flight, timedelta(milliseconds=gap), timedelta(milliseconds=window))
