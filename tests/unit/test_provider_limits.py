"""A simulated provider's limits, with a clock that the test moves."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.deploy.providers.catalog import PLAIN, POSTGREY, PROFILES, SHARED_HOST
from outbox_server.deploy.providers.describe import describe
from outbox_server.deploy.providers.limits import Bounded, FirstSeen, SlidingWindow
from outbox_server.deploy.providers.policy import Policy, Visit, reply_of
from outbox_server.deploy.providers.profile import (
    CONTENT_MARKER,
    DAY_S,
    HOUR_S,
    MINUTE_S,
    Cap,
    Profile,
    Rate,
    RefusingReply,
    is_qualified,
)
from outbox_server.shared.audit.replay import most_in_window
from outbox_server.shared.smtp.replies import Phase

NO = RefusingReply(Phase.MAIL, 450, "4.7.0", "not now")


def visit(number: int = 1, account: str = "anna", mail_from: str = "a@x.test") -> Visit:
    return Visit(number, "127.0.0.1", account=account, helo="x.test", mail_from=mail_from)


@given(
    # Whole numbers, because a sum of floats is not exact.
    steps=st.lists(st.integers(0, 40), max_size=200),
    most=st.integers(1, 5),
    seconds=st.integers(1, 100),
)
def test_no_sliding_window_ever_exceeds_its_limit(
    steps: list[int], most: int, seconds: int
) -> None:
    window, now, added = SlidingWindow(most, seconds), 0, list[int]()
    for step in steps:
        now += step
        assert window.used(now) == sum(time + seconds > now for time in added)
        if not window.full(now):
            window.add(now)
            added.append(now)
    if added:
        assert most_in_window(added, seconds) <= most


def test_a_window_has_room_again_when_its_oldest_mail_has_left_it() -> None:
    window = SlidingWindow(2, 60)
    window.add(0)
    window.add(30)
    assert window.full(59.9)
    assert not window.full(60)
    assert window.used(60) == 1


def test_minute_hour_and_day_are_counted_separately_and_the_tightest_decides() -> None:
    periods = ((2, MINUTE_S), (3, HOUR_S), (4, DAY_S))
    rates = tuple(
        Rate(most, seconds, RefusingReply(Phase.MAIL, 450, "", f"{used}"))
        for (most, seconds), used in zip(periods, ("minute", "hour", "day"), strict=True)
    )
    policy, one = Policy(dataclasses.replace(PLAIN, rates=rates)), visit()

    def tried_at(now: float) -> str:
        refused = policy.refused(Phase.MAIL, one, now)
        if refused is None:
            policy.accept(one, now)
        return "accepted" if refused is None else refused.reply

    assert [tried_at(now) for now in (0, 1, 2)] == ["accepted", "accepted", "450 minute"]
    assert [tried_at(now) for now in (60, 61, 122)] == ["accepted", "450 hour", "450 hour"]
    assert [tried_at(now) for now in (HOUR_S, HOUR_S + 1)] == ["accepted", "450 day"]
    assert tried_at(DAY_S - 1) == "450 day"
    assert tried_at(DAY_S) == "accepted"


def test_quotas_are_per_account_or_per_sender_if_there_are_no_accounts() -> None:
    policy = Policy(dataclasses.replace(PLAIN, rates=(Rate(1, 10, NO),)))
    policy.accept(visit(account="anna"), 0)
    assert policy.refused(Phase.MAIL, visit(2, account="Anna"), 1)
    assert not policy.refused(Phase.MAIL, visit(3, account="ben"), 1)
    policy.accept(visit(account="", mail_from="a@x.test"), 0)
    assert policy.refused(Phase.MAIL, visit(4, account="", mail_from="a@x.test"), 1)
    assert not policy.refused(Phase.MAIL, visit(5, account="", mail_from="b@x.test"), 1)


def test_a_quota_refused_at_mail_counts_mails_already_under_way() -> None:
    policy = Policy(dataclasses.replace(PLAIN, rates=(Rate(1, 10, NO),)))
    first, second = visit(1), visit(2)
    assert not policy.refused(Phase.MAIL, first, 0)
    assert not policy.refused(Phase.MAIL, second, 0)
    assert not policy.refused(Phase.BODY, first, 1)
    policy.accept(first, 1)
    assert policy.refused(Phase.BODY, second, 1)


def test_the_oldest_connections_keep_working() -> None:
    policy = Policy(dataclasses.replace(PLAIN, connections=Cap(2, NO)))
    visits = [visit(number) for number in (1, 2, 3)]
    other = visit(4, account="ben")
    for one in (*visits, other):
        policy.enter(one)
    refused = [bool(policy.refused(Phase.MAIL, one, 0)) for one in (*visits, other)]
    assert refused == [False, False, True, False]
    policy.leave(visits[0])
    assert not policy.refused(Phase.MAIL, visits[2], 0)


def test_before_auth_all_connections_of_an_address_are_counted() -> None:
    cap = Cap(1, dataclasses.replace(NO, phase=Phase.EHLO))
    policy = Policy(dataclasses.replace(PLAIN, connections=cap))
    signed_in, new, elsewhere = visit(1), visit(2, account=""), Visit(3, "192.0.2.1")
    for one in (signed_in, new, elsewhere):
        policy.enter(one)
    assert policy.refused(Phase.EHLO, new, 0)
    assert not policy.refused(Phase.EHLO, elsewhere, 0)


@pytest.mark.parametrize(("phase", "begun", "accepted"), [(Phase.MAIL, 2, 0), (Phase.BODY, 3, 2)])
def test_mails_of_a_connection_are_counted_when_they_begin_or_when_they_end(
    phase: Phase, begun: int, accepted: int
) -> None:
    cap = Cap(2, dataclasses.replace(NO, phase=phase))
    policy, one = Policy(dataclasses.replace(PLAIN, mails_per_connection=cap)), visit()
    one.begun, one.accepted = begun, accepted
    assert policy.refused(phase, one, 0)
    one.begun -= phase is Phase.MAIL
    one.accepted -= phase is Phase.BODY
    assert not policy.refused(phase, one, 0)


def test_a_triplet_passes_when_it_is_old_enough_and_a_new_one_must_wait() -> None:
    policy = Policy(POSTGREY)

    def said(now: float, recipient: str = "ann@y.test", mail_from: str = "a@x.test") -> str:
        one = visit(mail_from=mail_from)
        refused = policy.refused(Phase.RCPT, one, now, recipient=recipient)
        return refused.reply if refused else ""

    assert said(0) == (
        "450 4.2.0 <ann@y.test>: Recipient address rejected: Greylisted, see "
        "http://postgrey.schweikert.ch/help/y.test.html"
    )
    assert said(299.9)
    assert not said(300)
    assert not said(10_000, recipient="ANN@y.test")
    assert said(10_000, recipient="ben@y.test")
    assert said(10_000, mail_from="b@x.test")


def test_unknown_recipients_are_refused_permanently_and_full_ones_until_there_is_room() -> None:
    policy = Policy(PLAIN)
    unknown = policy.refused(Phase.RCPT, visit(), 0, recipient="unknown1@y.test")
    full = policy.refused(Phase.RCPT, visit(), 0, recipient="full1@y.test")
    assert unknown is not None
    assert unknown.refusing.for_good
    assert unknown.reply.startswith("550 5.1.1 ")
    assert full is not None
    assert not full.refusing.for_good
    assert full.reply.startswith("452 4.2.2 ")
    assert policy.refused(Phase.RCPT, visit(), HOUR_S - 1, recipient="full1@y.test")
    assert not policy.refused(Phase.RCPT, visit(), HOUR_S, recipient="full1@y.test")
    content = policy.refused(Phase.BODY, visit(), 0, content=b"x " + CONTENT_MARKER)
    assert content is not None
    assert content.refusing.for_good


@pytest.mark.parametrize(
    ("helo", "qualified"),
    [
        ("mail.example.com", True),
        ("mail.example.com.", True),
        ("[192.0.2.7]", True),
        ("[IPv6:2001:db8::1]", True),
        ("localhost", False),
        ("9f2c1d0b7a3e", False),
        ("localhost.", False),
        ("mail..example.com", False),
        (".example.com", False),
        (".", False),
        ("", False),
    ],
)
def test_a_qualified_name_has_a_dot_or_is_a_literal(helo: str, qualified: bool) -> None:
    assert is_qualified(helo) == qualified


def test_every_line_of_a_reply_has_its_codes() -> None:
    assert reply_of(550, "one\ntwo\nthree", "5.4.5") == (
        "550-5.4.5 one\r\n550-5.4.5 two\r\n550 5.4.5 three"
    )
    assert reply_of(250, "Ok") == "250 Ok"


def test_the_memory_of_a_provider_is_bounded() -> None:
    kept: Bounded[int, list[int]] = Bounded(list, 3)
    seen: FirstSeen[int] = FirstSeen(3)
    for number in range(10):
        kept.get(number).append(number)
        seen.age(number, number)
    assert len(kept) == 3
    assert kept.get(9) == [9]
    # It was forgotten, so it counts as new.
    assert seen.age(0, 100) == 0
    assert seen.age(9, 100) == 91


def test_scaling_shrinks_all_times_and_keeps_the_limits() -> None:
    for profile in PROFILES.values():
        scaled = profile.scaled(0.01)
        assert [(rate.most, rate.seconds) for rate in scaled.rates] == [
            (rate.most, rate.seconds * 0.01) for rate in profile.rates
        ]
        assert scaled.reply_delay_s == profile.reply_delay_s * 0.01
        assert scaled.full_for_s == profile.full_for_s * 0.01
        assert (scaled.greylist is None) == (profile.greylist is None)
    greylist = POSTGREY.scaled(0.01).greylist
    assert greylist is not None
    assert greylist.delay_s == 3.0


def test_the_quota_option_sets_the_limit_of_the_longest_period() -> None:
    gmail = PROFILES["gmail"].with_quota(20)
    assert [(rate.most, rate.seconds) for rate in gmail.rates] == [(20, MINUTE_S), (20, DAY_S)]
    assert [rate.most for rate in PROFILES["gmail"].with_quota(5000).rates] == [100, 5000]
    assert PLAIN.with_quota(20) == PLAIN


def test_every_profile_has_a_description_and_valid_replies() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name
        lines = describe(profile)
        assert len(lines) >= 2
        assert "{" not in "".join(lines)
        policy = Policy(profile)
        for reply in replies_of(profile):
            said = policy.given(reply, visit(), "ann@y.test", most=5, used=6).reply
            assert "{" not in said
            assert all(line[:3] == str(reply.code) for line in said.split("\r\n"))
            # RFC 3463: the first digit of both codes is the same.
            assert reply.enhanced[:1] in ("", str(reply.code)[0])
    assert "5 mails per connection, then: 421 too many messages in this connection" in (
        describe(SHARED_HOST)
    )


def replies_of(profile: Profile) -> list[RefusingReply]:
    found = list(profile.always)
    for item in dataclasses.fields(profile):
        value = getattr(profile, item.name)
        if isinstance(value, RefusingReply):
            found.append(value)
        elif hasattr(value, "refusal"):
            found.append(value.refusal)
    return found + [rate.refusal for rate in profile.rates]
