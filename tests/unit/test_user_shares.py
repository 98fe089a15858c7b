"""A forecast with the limits of a user equals senders that take turns, mail by mail."""

from __future__ import annotations

import random

from outbox_server.shared.forecast.simulation import Bound, JobGroup, Limiter, Sends, simulate
from outbox_server.shared.forecast.user_shares import UserLimiter, share_of
from tests.for_each import for_each

SECOND = 1_000_000
WINDOW = 3_600 * SECOND
NOW = 10 * WINDOW


def starts_in_turns(limiter: Limiter, user: UserLimiter, past: list[int], mails: int) -> list[int]:
    """Return the starts of the mails of the last of the senders, which has them all due now."""
    ends, own = sorted(past), [one.first for one in limiter.sent]
    last_own = limiter.last_end
    starts: list[int] = []
    last = user.last_end
    while len(starts) < mails:
        for number in range(user.senders):
            start = NOW
            if user.gap and last is not None:
                start = max(start, last + user.gap)
            if user.limit and len(ends) >= user.limit:
                start = max(start, ends[-user.limit] + WINDOW)
            if number == user.senders - 1:
                if limiter.gap and last_own is not None:
                    start = max(start, last_own + limiter.gap)
                if len(own) >= limiter.limit:
                    start = max(start, own[-limiter.limit] + WINDOW)
                starts.append(start)
                own.append(start)
                last_own = start
            ends.append(start)
            last = start
    return starts[:mails]


@for_each(range(60))
def test_a_forecast_for_the_last_in_turn_equals_turns_mail_by_mail(seed: int) -> None:
    draw = random.Random(seed)
    senders = draw.choice([1, 1, 2, 3])
    past = sorted(NOW - draw.randrange(WINDOW) for _ in range(draw.randrange(5)))
    limit = senders * draw.choice([1, 2, 4])
    user = UserLimiter(
        limit=limit,
        gap=draw.choice([0, 0, 40 * SECOND]),
        senders=senders,
        sent=[Sends(end) for end in past],
        last_end=max(past, default=None),
    )
    own = Limiter(limit=draw.choice([2, 100]), gap=1 * SECOND, window=WINDOW)
    shared = share_of(own, user)
    found = simulate(shared.limiter, [JobGroup(due=0, count=9, mine=9)], NOW)
    expected = starts_in_turns(own, user, past, 9)
    assert found.last is not None
    # The gaps of other senders within one turn are spread evenly.
    assert abs(found.last - expected[-1]) <= senders * (user.gap + SECOND)


def test_the_limit_of_the_user_is_named() -> None:
    own = Limiter(limit=100, gap=SECOND, window=WINDOW)
    shared = share_of(own, UserLimiter(limit=3, gap=0))
    found = simulate(shared.limiter, [JobGroup(due=0, count=9, mine=9)], NOW)
    assert found.bound is Bound.WINDOW
    assert shared.bounds[Bound.WINDOW] is Bound.USER_WINDOW
    shared = share_of(own, UserLimiter(limit=0, gap=60 * SECOND))
    found = simulate(shared.limiter, [JobGroup(due=0, count=9, mine=9)], NOW)
    assert shared.bounds == {Bound.GAP: Bound.USER_GAP}
    assert found.last == NOW + 8 * 60 * SECOND


def test_a_user_with_more_senders_than_its_limit_needs_several_windows_per_turn() -> None:
    own = Limiter(limit=100, gap=0, window=WINDOW)
    shared = share_of(own, UserLimiter(limit=2, gap=0, senders=40))
    found = simulate(shared.limiter, [JobGroup(due=0, count=3, mine=3)], NOW)
    assert found.last == NOW + 2 * 20 * WINDOW
    assert shared.bounds[Bound.GAP] is Bound.USER_WINDOW


def test_without_limits_of_the_user_nothing_changes() -> None:
    own = Limiter(limit=3, gap=SECOND, window=WINDOW, sent=[Sends(NOW - SECOND)])
    assert share_of(own, None).limiter is own
