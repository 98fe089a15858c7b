"""The judge of a drill knows which limits of a user were valid when a mail was sent."""

from __future__ import annotations

from datetime import timedelta

from outbox_server.deploy.drill.user_limits import GAP_USER, LIMITS, WINDOW_USER, LimitJudge
from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.queue.user_limits import UserSendLimits

WINDOW = timedelta(seconds=5)
# Two senders per user: their mails count together.
USER_OF = {
    "w1@x.test": WINDOW_USER,
    "w2@x.test": WINDOW_USER,
    "g1@x.test": GAP_USER,
    "g2@x.test": GAP_USER,
    "other@x.test": "drill",
}


def mails(*sends: tuple[str, float, float]) -> list[ReceivedMail]:
    """Return mails, each by its sender, its start and the time that it took."""
    return [
        ReceivedMail(start, start + took, f"{sender}@x.test", ("to@x.test",), "<1@x>", 1, "1")
        for sender, start, took in sends
    ]


def broken(judge: LimitJudge, *sends: tuple[str, float, float]) -> list[str]:
    return list(judge.broken(mails(*sends), USER_OF))


def in_turn(count: int, first: float, step: float) -> list[tuple[str, float, float]]:
    """Mails of two senders of the user with a window, and of a user without limits."""
    own = [(f"w{1 + n % 2}", first + n * step, 0.01) for n in range(count)]
    return [*own, *(("other", start, took) for _, start, took in own)]


def test_the_mails_of_all_senders_of_a_user_count_together() -> None:
    judge = LimitJudge(WINDOW)
    assert broken(judge, *in_turn(10, 100, 0.1)) == []
    [line] = broken(judge, *in_turn(11, 100, 0.1))
    assert line == "user drill-window: 11 mails within 5 s, more than 10"
    assert broken(judge, ("w1", 100, 0.1), ("w2", 100.05, 0.1)) == []
    assert broken(judge, ("g1", 100, 0.1), ("g2", 100.3, 0.1), ("g1", 100.6, 0.1)) == []
    [line] = broken(judge, ("g1", 100, 0.1), ("g2", 100.25, 0.1))
    assert line == "user drill-gap: a gap of 0.150 s, less than 0.2 s"


def test_a_tighter_limit_holds_once_it_is_settled_and_until_it_is_changed_back() -> None:
    judge = LimitJudge(WINDOW)
    judge.change(WINDOW_USER, UserSendLimits(hourly_limit=4), asked=200, settled=210)
    judge.change(WINDOW_USER, LIMITS[WINDOW_USER], asked=220, settled=230)
    for first in (150, 190, 201, 222, 231, 300):
        assert broken(judge, *in_turn(10, first, 0.1)) == [], first
    for begin in (209.5, 211.0, 218.0):
        found = broken(judge, *in_turn(10, begin, 0.1))
        assert found, begin
        assert found[0].endswith("more than 4")
    # Mails that were sent before also fill the window of a settled limit.
    assert broken(judge, *in_turn(4, 209, 0.1), ("w1", 212, 0.01))
    # Each limit is judged in its own time.
    for first in (190, 231):
        assert broken(judge, *in_turn(11, first, 0.1))
    assert broken(judge, *in_turn(11, 203, 0.1)) == []


def test_a_wider_gap_holds_once_it_is_settled() -> None:
    judge = LimitJudge(WINDOW)
    wider = UserSendLimits(gap=timedelta(seconds=0.6))
    judge.change(GAP_USER, wider, asked=200, settled=210)
    assert broken(judge, ("g1", 199, 0.1), ("g2", 199.4, 0.1)) == []
    assert broken(judge, ("g1", 205, 0.1), ("g2", 205.4, 0.1)) == []
    [line] = broken(judge, ("g1", 211, 0.1), ("g2", 211.4, 0.1))
    assert line == "user drill-gap: a gap of 0.300 s, less than 0.6 s"
