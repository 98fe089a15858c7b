"""Computes exactly when a sender's limits allow its waiting mail, without a step per mail. Pure.

A sender is a queue: mail is sent in the order (due, id), so a mail never delays one that is due
earlier, and the start of the k-th send is the latest of

    its due time
    the start of the previous send + the gap + the duration of a send
    the start of the send `limit` places before + the window + the duration of a send
    the end of the sender's pause
    the next opening of the sending hours
    the next probe of the sender's cooldown

All of these are arithmetic sequences over long stretches: mails due at once or with a fixed
spacing, sends one gap apart, a window that empties as it was filled. A piece is a series of sends
whose times one of these sequences decides. Once the window alone has decided a whole window of
sends, every later window repeats it, so all whole windows are one step. The cost depends on the
number of changes, not on the number of mails. The number of changes
that are computed is bounded. Beyond it the result is an estimate, which assumes that the rest is
sent at the average rate so far. Times are whole microseconds since 1970.

The limits of a sender are implemented here, in limits.lua (which decides), replay.py (audit) and
queue_model.py (tests), and named in explaining.py: sender_limits.py has the list.
Without Limit.CIRCUIT: a forecast assumes that every endpoint works from now on.
Without Limit.PACE: a forecast assumes that no server complains about the rate; only Redis knows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, Protocol

# The largest number of pieces that one simulation computes, in about 0.25 s.
MOST_WORK: Final = 40_000
# Finding an opening of the sending hours takes as long as this number of pieces.
_OPENING_WORK: Final = 10


class Hours(Protocol):
    """The sending hours of a sender."""

    def opens(self, at: int) -> int | None:
        """Return the first open instant from `at` on; None if it never opens again."""

    def closes(self, at: int) -> int | None:
        """Return when the opening at `at` closes; None if it stays open."""


class Bound(Enum):
    """The limit that decided the time of a send."""

    DUE = "due"
    SPACING = "spacing"
    GAP = "gap"
    WINDOW = "window"
    # The limits that the user has for all its senders: Limit.USER_GAP, Limit.USER_WINDOW. A
    # simulation gets them as limits of the sender (user_shares.py).
    USER_GAP = "user gap"
    USER_WINDOW = "user window"
    HOURS = "hours"
    COOLDOWN = "cooldown"
    # Limit.PAUSE, if it ends by itself.
    PAUSE = "pause"
    # With a gap of 0: the number of sends in flight.
    PLACES = "places"


@dataclass(frozen=True, slots=True)
class Sends:
    """Evenly spaced sends in the past, by their ends."""

    first: int
    count: int = 1
    step: int = 0


@dataclass(frozen=True, slots=True)
class Limiter:
    """The limits of a sender, and its past sends."""

    limit: int
    gap: int
    window: int
    max_in_flight: int = 1
    # The duration of a send, from the instant at which it was allowed to its end.
    takes: int = 0
    hours: Hours | None = None
    # The next probe of the cooldown. Nothing is sent before it, and it is assumed to be accepted.
    next_probe: int | None = None
    # The end of the sender's pause. Nothing is sent before it.
    not_before: int | None = None
    # The ends that take entries of the window now, the earliest first.
    sent: Sequence[Sends] = ()
    # The end from which the gap runs, whether or not it took an entry.
    last_end: int | None = None


@dataclass(frozen=True, slots=True)
class JobGroup:
    """Waiting mails in the order of sending, due `step` apart. `mine` of them are forecast."""

    due: int
    count: int = 1
    step: int = 0
    mine: int = 0
    # How long after it was due a mail may still be sent.
    expire_after: int | None = None

    @property
    def last_due(self) -> int:
        """The due time of the last mail."""
        return self.due + (self.count - 1) * self.step


@dataclass(frozen=True, slots=True)
class SimulatedOutcome:
    """The forecast for the mails that are `mine`."""

    # Starts of the first and the last send. None if nothing will be sent, or too late for a
    # forecast (`within_sight` is False).
    first: int | None = None
    last: int | None = None
    # End of the last send.
    end: int | None = None
    expiring: int = 0
    # The time until the last send, divided by the limits that caused it.
    spent: dict[Bound, int] = field(default_factory=dict)
    # Number of sends up to the last one, including other mails.
    sends: int = 0
    within_sight: bool = True
    # Whether it took too much work, so that the rest was estimated.
    estimated: bool = False

    @property
    def bound(self) -> Bound | None:
        """The limit that causes most of the wait; None if only the due time does."""
        limits = {bound: span for bound, span in self.spent.items() if bound is not Bound.DUE}
        return max(limits, key=limits.__getitem__) if any(limits.values()) else None


def simulate(
    limiter: Limiter, groups: Iterable[JobGroup], now: int, most_work: int = MOST_WORK
) -> SimulatedOutcome:
    """Return when the mails that are `mine` will be sent, from `now` on.

    `groups` are in the order of sending. Groups after the last one with mails that are `mine`
    change nothing.
    """
    groups = list(groups)
    while groups and not groups[-1].mine:
        groups.pop()
    asked = next((group.due for group in groups if group.mine), now)
    simulation = _Simulation(limiter, now, max(now, asked), most_work)
    first = last = None
    expiring = 0
    spent: dict[Bound, int] = {}
    sends = 0
    for index, group in enumerate(groups):
        before = simulation.done
        began, ended, expired = simulation.send(group)
        if group.mine and began is not None:
            first = began if first is None else first
        if simulation.stuck:
            return SimulatedOutcome(within_sight=False, first=first)
        if simulation.exhausted:
            done = simulation.done - before
            rest = [
                replace(group, count=group.count - done, mine=_share(group, group.count - done))
            ]
            expiring += _share(group, expired)
            return simulation.estimate(first, expiring, [*rest, *groups[index + 1 :]])
        if not group.mine:
            continue
        expiring += _share(group, expired)
        if began is not None:
            last = ended
            spent = dict(simulation.spent)
            sends = simulation.sends
    end = None if last is None else last + limiter.takes
    return SimulatedOutcome(first, last, end, expiring, spent, sends)


def _share(group: JobGroup, count: int) -> int:
    """Return how many of `count` mails of a group belong to the subject (`mine`)."""
    return count * group.mine // group.count


class _Simulation:
    """The state after the sends so far."""

    def __init__(self, limiter: Limiter, now: int, since: int, most_work: int) -> None:
        """Begin at `now`. `spent` counts the time after `since`."""
        self._now = now
        self._since = since
        self._limit = limiter.limit
        self._hours = limiter.hours
        self._opening = now
        self._closing: int | None = now if limiter.hours else None
        # Limit.COOLDOWN, and Limit.PAUSE if it ends by itself: nothing is sent before.
        ends = ((limiter.next_probe, Bound.COOLDOWN), (limiter.not_before, Bound.PAUSE))
        self._ends = [(end, 0, bound) for end, bound in ends if end is not None]
        self._takes = takes = limiter.takes
        places = max(1, min(limiter.max_in_flight, limiter.limit))
        self._pacer = Bound.GAP if limiter.gap else Bound.PLACES
        # The time from start to start.
        self._cycle = limiter.gap + takes if limiter.gap else takes // places
        self._period = limiter.window + takes
        # The last `limit` starts, as [first, step, count].
        self._recent: deque[list[int]] = deque()
        self._recent_count = 0
        for sends in limiter.sent:
            self._remember(sends.first - takes, sends.step, sends.count)
        last_end = limiter.last_end
        self._last = now - self._cycle if last_end is None else last_end - takes
        # Number of sends in a row that the window alone decided.
        self._repeated = 0
        self._work_left = most_work
        self.spent: dict[Bound, int] = {}
        self.sends = 0
        # Number of mails that were sent or expired.
        self.done = 0
        # When the simulation stopped.
        self._at = now
        # Whether nothing will ever be sent any more.
        self.stuck = False

    @property
    def exhausted(self) -> bool:
        """Whether the simulation took too much work and stopped."""
        return self._work_left < 0

    def estimate(
        self, first: int | None, expiring: int, rest: Sequence[JobGroup]
    ) -> SimulatedOutcome:
        """Return the outcome if the `rest` is sent at the average rate so far.

        Of the subject's mails, `first` is the first send so far, and `expiring` the number that
        expired.
        """
        if not self.sends:
            return SimulatedOutcome(first=first, within_sight=False, estimated=True)
        elapsed = max(self._at - self._now, 0)
        ahead = 0
        for group in rest:
            if group.mine and first is None:
                first = max(group.due, self._at + elapsed * ahead // self.done)
            ahead += group.count
        last = max(rest[-1].due, self._at + elapsed * ahead // self.done)
        lost = self.done - self.sends
        return SimulatedOutcome(
            first,
            last,
            last + self._takes,
            expiring + sum(group.mine for group in rest) * lost // self.done,
            dict(self.spent),
            self.sends + ahead * self.sends // self.done,
            estimated=True,
        )

    def send(self, group: JobGroup) -> tuple[int | None, int | None, int]:
        """Send a group; return the start of its first and last send, and how many expire."""
        due, left, expired = group.due, group.count, 0
        first: int | None = None
        self._repeated = 0
        while left and not self.stuck:
            self._work_left -= 1
            if self.exhausted:
                self._at = max(self._last, due)
                break
            start, step, bound, count = self._lead(due, group.step, left)
            if not self._is_open(start):
                continue
            if group.expire_after is not None:
                late = start - due - group.expire_after
                if late > 0:
                    # First drop the mails that would expire even before this instant.
                    gone = left if not group.step else min(left, -(-late // group.step))
                    expired += gone
                    left -= gone
                    self.done += gone
                    due += gone * group.step
                    self._repeated = 0
                    continue
                if step > group.step:
                    count = min(count, -late // (step - group.step) + 1)
            count = self._skip_windows(group, due, left, start, bound) or self._advance(
                start, step, bound, count
            )
            first = start if first is None else first
            left -= count
            due += count * group.step
            self.sends += count
            self.done += count
        return first, None if first is None else self._last, expired

    def _lead(self, due: int, spacing: int, left: int) -> tuple[int, int, Bound, int]:
        """Return (start, step, bound, count) of the next sends."""
        terms = [
            # Limit.GAP or, without a gap, Limit.IN_FLIGHT.
            (self._last + self._cycle, self._cycle, self._pacer),
            (due, spacing, Bound.SPACING if spacing else Bound.DUE),
            (self._now, 0, Bound.DUE),
            *self._ends,
        ]
        # Limit.SENDING_HOURS
        if self._hours:
            terms.append((self._opening, 0, Bound.HOURS))
        count = left
        # Limit.WINDOW
        full = self._recent_count >= self._limit
        if full:
            first, step, _ = self._recent[0]
            terms.append((first + self._period, step, Bound.WINDOW))
        start, step, bound = max(
            terms, key=lambda term: (term[0], term[2] is Bound.WINDOW, term[1])
        )
        if not full:
            count = min(count, self._limit - self._recent_count)
        elif not self._goes_on_for_ever(start, step):
            count = min(count, self._recent[0][2])
        if bound is not self._pacer and step < self._cycle:
            # The next send waits for this one.
            count = 1
        for other, other_step, _ in terms:
            if other_step > step:
                count = min(count, (start - other) // (other_step - step) + 1)
        if self._closing is not None and step:
            count = min(count, max(1, (self._closing - 1 - start) // step + 1))
        return start, step, bound, count

    def _goes_on_for_ever(self, start: int, step: int) -> bool:
        """Whether the window cannot bind: all its sends have this step, which is slow enough."""
        if len(self._recent) > 1:
            return False
        first, recent_step, count = self._recent[0]
        return (
            step * self._limit >= self._period
            and (recent_step == step or count == 1)
            and first + count * step == start
        )

    def _is_open(self, start: int) -> bool:
        """Return whether it is open at `start`; if not, move to the next opening."""
        if self._hours is None or self._closing is None or start < self._closing:
            return True
        self._work_left -= _OPENING_WORK
        opening = self._hours.opens(start)
        if opening is None:
            self.stuck = True
            return False
        self._opening = opening
        self._closing = self._hours.closes(opening)
        return opening == start

    def _skip_windows(self, group: JobGroup, due: int, left: int, start: int, bound: Bound) -> int:
        """Skip all whole windows that repeat the last one; return the number of their sends."""
        if bound is not Bound.WINDOW or self._repeated < self._limit:
            return 0
        if group.step * self._limit > self._period:
            return 0
        windows = left // self._limit
        if self._closing is not None:
            windows = min(windows, (self._closing - 1 - start) // self._period)
        if group.expire_after is not None:
            windows = min(windows, (due + group.expire_after - start) // self._period)
        if windows <= 0:
            return 0
        shift = windows * self._period
        for sends in self._recent:
            sends[0] += shift
        self._account(Bound.WINDOW, self._last + shift)
        self._last += shift
        return windows * self._limit

    def _advance(self, start: int, step: int, bound: Bound, count: int) -> int:
        self._repeated = self._repeated + count if bound is Bound.WINDOW else 0
        last = start + (count - 1) * step
        self._account(bound, last)
        self._last = last
        self._remember(start, step, count)
        return count

    def _account(self, bound: Bound, until: int) -> None:
        span = until - max(self._last, self._since)
        if span > 0:
            self.spent[bound] = self.spent.get(bound, 0) + span

    def _remember(self, start: int, step: int, count: int) -> None:
        recent = self._recent
        if recent:
            first, last_step, last_count = recent[-1]
            gap = start - (first + (last_count - 1) * last_step)
            if (last_count == 1 or gap == last_step) and (count == 1 or gap == step):
                recent[-1] = [first, gap, last_count + count]
                self._recent_count += count
                self._forget()
                return
        recent.append([start, step, count])
        self._recent_count += count
        self._forget()

    def _forget(self) -> None:
        while self._recent_count > self._limit:
            oldest = self._recent[0]
            gone = min(oldest[2], self._recent_count - self._limit)
            self._recent_count -= gone
            if gone == oldest[2]:
                self._recent.popleft()
            else:
                oldest[0] += gone * oldest[1]
                oldest[2] -= gone
