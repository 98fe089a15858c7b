"""Finds the limits of a sender that are in effect, and the rule that sets each. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

from outbox_server.shared.gap import effective_gap
from outbox_server.shared.queue.user_limits import UserSendLimits


class LimitSource(IntEnum):
    """The rule that sets a limit; numbered as in the proto."""

    SENDER = 1
    USER = 2
    OPERATOR = 3
    OPERATOR_FLOOR = 4
    PACE = 5
    MIN_GAP = 6
    COOLDOWN = 7
    HOURLY_LIMIT = 8


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """The limits of the sender itself. `cools` means that it cools down."""

    hourly_limit: int
    min_gap_ms: int | None
    max_in_flight: int
    cools: bool = False


@dataclass(frozen=True, slots=True)
class UserOverrides:
    """The limits that an operator has set for a user. None means the default of all users."""

    hourly_limit: int | None = None
    min_gap_ms: int | None = None


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """The limits in effect, each with its source. `complete` means that the pace is known."""

    hourly_limit: tuple[int, LimitSource]
    min_gap: tuple[timedelta, LimitSource]
    max_in_flight: tuple[int, LimitSource]
    complete: bool = True


def effective_limits(
    sender: OwnLimits,
    user: UserOverrides,
    everyone: UserSendLimits,
    *,
    floor: timedelta,
    pace: timedelta | None,
) -> EffectiveLimits:
    """Return the limits of a sender that are in effect.

    `everyone` has the limits of users without limits of their own. `pace` is the gap that a mail
    server's complaints have caused; None means that it is not known.
    """
    of_user = everyone.overridden(user.hourly_limit, user.min_gap_ms)
    hourly = sender.hourly_limit, LimitSource.SENDER
    if of_user.hourly_limit and of_user.hourly_limit < sender.hourly_limit:
        own = user.hourly_limit is not None
        hourly = of_user.hourly_limit, LimitSource.USER if own else LimitSource.OPERATOR
    gap = effective_gap(sender.min_gap_ms, floor)
    own_gap = sender.min_gap_ms is not None and gap == timedelta(milliseconds=sender.min_gap_ms)
    least = gap, LimitSource.SENDER if own_gap else LimitSource.OPERATOR_FLOOR
    if of_user.gap > least[0]:
        own = user.min_gap_ms is not None
        least = of_user.gap, LimitSource.USER if own else LimitSource.OPERATOR
    if pace is not None and pace > least[0]:
        least = pace, LimitSource.PACE
    return EffectiveLimits(hourly, least, _in_flight(sender, hourly[0], least[0]), pace is not None)


def _in_flight(sender: OwnLimits, hourly: int, gap: timedelta) -> tuple[int, LimitSource]:
    if sender.cools:
        return 1, LimitSource.COOLDOWN
    if gap and sender.max_in_flight > 1:
        return 1, LimitSource.MIN_GAP
    if hourly < sender.max_in_flight:
        return hourly, LimitSource.HOURLY_LIMIT
    return sender.max_in_flight, LimitSource.SENDER
