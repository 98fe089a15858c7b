"""The users of a drill with limits for all their senders together, as the SMTP side sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.audit.replay import Replay
from outbox_server.shared.queue.user_limits import UserSendLimits

# Whose senders have no gap, and would send more together.
WINDOW_USER: Final = "drill-window"
# Whose senders have a gap each, and would send more often together.
GAP_USER: Final = "drill-gap"
LIMITS: Final[Mapping[str, UserSendLimits]] = {
    WINDOW_USER: UserSendLimits(hourly_limit=10),
    GAP_USER: UserSendLimits(gap=timedelta(milliseconds=200)),
}
# The limits that they are changed to for a while.
TIGHTER_LIMITS: Final[Mapping[str, UserSendLimits]] = {
    WINDOW_USER: UserSendLimits(hourly_limit=4),
    GAP_USER: UserSendLimits(gap=timedelta(milliseconds=600)),
}


@dataclass(frozen=True, slots=True)
class _Period:
    """Sends that begin in [since, until) must keep the limits."""

    limits: UserSendLimits
    since: float
    until: float


class LimitJudge:
    """Knows which limits were valid when, and compares them with the mails that arrived."""

    def __init__(self, window: timedelta) -> None:
        self._window_s = window.total_seconds()
        self._periods: dict[str, list[_Period]] = {
            user: [_Period(limits, 0.0, sys.float_info.max)] for user, limits in LIMITS.items()
        }

    def change(self, user: str, limits: UserSendLimits, *, asked: float, settled: float) -> None:
        """Note that the limits of a user changed at some time from `asked` to `settled`.

        What begins between is judged by neither limit.
        """
        *former, last = self._periods[user]
        self._periods[user] = [
            *former,
            _Period(last.limits, last.since, asked),
            _Period(limits, settled, sys.float_info.max),
        ]

    def broken(self, mails: Iterable[ReceivedMail], user_of: Mapping[str, str]) -> Iterator[str]:
        """Yield each broken limit, one per line. `user_of` has the users by From address."""
        sends: dict[str, list[tuple[float, float]]] = {user: [] for user in self._periods}
        for mail in mails:
            user = user_of.get(mail.mail_from)
            if user in sends:
                sends[user].append((mail.received_at, mail.started_at))
        for user, periods in self._periods.items():
            ordered = sorted(sends[user])
            for period in periods:
                yield from self._broken_in(period, user, ordered)

    def _broken_in(
        self, period: _Period, user: str, sends: Iterable[tuple[float, float]]
    ) -> Iterator[str]:
        limits = period.limits
        replay = Replay(self._window_s, limits.hourly_limit or sys.maxsize, period.since)
        for end, start in sends:
            if start < period.until:
                replay.add(start, end)
        if replay.overshoot():
            yield (
                f"user {user}: {replay.most_in_window} mails within {self._window_s:g} s, more "
                f"than {limits.hourly_limit}"
            )
        gap, least = replay.least_gap, limits.gap.total_seconds()
        if gap is not None and least and gap < least:
            yield f"user {user}: a gap of {gap:.3f} s, less than {least:g} s"
