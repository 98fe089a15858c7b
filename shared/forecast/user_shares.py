"""Turns the limits that a user has for all its senders into limits of one of them. Pure.

The senders of a user that have due mail take turns. So each has its share of the user's limits:
with n such senders, every n-th send of the user is its own. A forecast assumes that their number
does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from outbox_server.shared.forecast.simulation import Bound, Limiter, Sends

# The maximum number of entries of a window that are computed. If there are more, every n-th is.
_MOST_ENTRIES: Final = 2_000
_LONG_AGO: Final = -(10**18)


@dataclass(frozen=True, slots=True)
class UserLimiter:
    """The limits of a user, and the past sends of all its senders."""

    # 0 means no limit.
    limit: int
    gap: int
    # The senders that take turns, this one included.
    senders: int = 1
    sent: Sequence[Sends] = ()
    last_end: int | None = None


@dataclass(frozen=True, slots=True)
class SharedLimiter:
    """The limits of a sender and its share of its user's limits, as the limits of one sender.

    `bounds` says which limit the gap and the window of `limiter` represent.
    """

    limiter: Limiter
    bounds: dict[Bound, Bound]


def share_of(own: Limiter, user: UserLimiter | None) -> SharedLimiter:
    """Return the limits that a sender and its user have together."""
    if user is None:
        return SharedLimiter(own, {})
    bounds: dict[Bound, Bound] = {}
    limiter = own
    if user.limit:
        limiter, binds = _with_window(limiter, user)
        if binds:
            bounds[Bound.WINDOW] = Bound.USER_WINDOW
    if user.limit and user.senders > user.limit:
        # Some windows have no turn for some of the senders.
        turn = (own.window + own.takes) * user.senders // user.limit - own.takes
        if turn > limiter.gap:
            bounds[Bound.GAP] = Bound.USER_WINDOW
            limiter = _with_longer_gap(limiter, turn)
    if user.gap:
        limiter, binds = _with_gap(limiter, user)
        if binds:
            bounds[Bound.GAP] = Bound.USER_GAP
    return SharedLimiter(limiter, bounds)


def _with_window(own: Limiter, user: UserLimiter) -> tuple[Limiter, bool]:
    """Apply the window of the user, in which every n-th send belongs to this sender."""
    share = max(1, user.limit // user.senders)
    limit = min(own.limit, share)
    before, others = _Ends(own.sent), _Ends(user.sent)
    # The k-th next send begins one window after the later of two ends: the end of the sender's own
    # send `own.limit` places before, and the end of the user's send `user.limit` places before.
    every = -(-limit // _MOST_ENTRIES)
    places = sorted({*range(1, limit + 1, every), limit})
    binds, entries = share < own.limit, []
    for k in places:
        mine = before.at(before.count - own.limit + k - 1)
        users = others.at(others.count - user.limit + min(k * user.senders, user.limit) - 1)
        binds = binds or users > mine
        entries.append(max(mine, users))
    return replace(own, limit=limit, sent=_sends(places, entries)), binds


def _with_gap(own: Limiter, user: UserLimiter) -> tuple[Limiter, bool]:
    """Apply the gap of the user: between two sends of a sender, each other sender sends once."""
    between = user.senders * (user.gap + own.takes) - own.takes
    free = None if user.last_end is None else user.last_end + user.gap
    return _with_longer_gap(own, between, free), between > own.gap


def _with_longer_gap(own: Limiter, gap: int, free: int | None = None) -> Limiter:
    """Apply a gap between the sends of the sender. It delays the next one only until `free`."""
    mine = None if own.last_end is None or not own.gap else own.last_end + own.gap
    gap = max(own.gap, gap)
    starts = [start for start in (free, mine) if start is not None]
    return replace(own, gap=gap, last_end=max(starts) - gap if starts else None)


class _Ends:
    """Past ends by their places, without a step per end."""

    def __init__(self, sent: Sequence[Sends]) -> None:
        self._sent = sorted(sent, key=lambda sends: sends.first)
        self.count = sum(sends.count for sends in sent)

    def at(self, place: int) -> int:
        """Return the end at a place, from 0; long ago if there is none."""
        if place < 0:
            return _LONG_AGO
        for sends in self._sent:
            if place < sends.count:
                return sends.first + place * sends.step
            place -= sends.count
        return _LONG_AGO


def _sends(places: Sequence[int], ends: Sequence[int]) -> list[Sends]:
    """Return sends with these ends at these places, and evenly spaced ones in between."""
    sent = []
    for (place, end), (next_place, next_end) in pairwise(zip(places, ends, strict=True)):
        if end > _LONG_AGO:
            count = next_place - place
            sent.append(Sends(end, count, (next_end - end) // count))
    if ends and ends[-1] > _LONG_AGO:
        sent.append(Sends(ends[-1]))
    return sent
