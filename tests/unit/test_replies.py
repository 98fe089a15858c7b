"""The meanings of SMTP replies."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.smtp.replies import (
    Meaning,
    Phase,
    Reply,
    ReplyRules,
    leaves_session_usable,
    split_enhanced_code,
)
from outbox_server.shared.smtp.reply_rule_file import built_in_rules
from outbox_server.shared.states import ReplyClass
from tests.for_each import for_each
from tests.real_replies import OF_REAL_SERVERS, OF_THE_TABLE, RealReply

BUILT_IN = ReplyRules.load("")
# The real replies by the name of the deciding rule. Removing a rule changes only its own replies.
DECIDED_BY: dict[str, list[RealReply]] = defaultdict(list)
for _row in (*OF_THE_TABLE, *OF_REAL_SERVERS):
    DECIDED_BY[BUILT_IN.meaning(_row.reply()).rule].append(_row)
TRANSACTION = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.BODY)
# Codes of permanent refusals that no rule has.
EXPLAINED_BY_NO_CODE = tuple(
    set(range(500, 600)) - {503, 524, 525, 530, 534, 535, 538, 551, 552, 555, 556}
)
phases = st.sampled_from(list(Phase))
enhanced_codes = st.one_of(
    st.none(),
    st.builds("{}.{}.{}".format, st.integers(0, 9), st.integers(0, 999), st.integers(0, 999)),
    st.text(max_size=12),
)


def meaning(
    phase: Phase, code: int, enhanced: str | None = None, text: str = "", earlier: int = 0
) -> Meaning:
    return BUILT_IN.meaning(Reply(phase, code, enhanced, text, earlier))


def row_id(row: RealReply) -> str:
    return f"{row.server} {row.phase} {row.said[:40]!a}"


@for_each(OF_THE_TABLE, row_id)
def test_the_examples_in_the_table_of_classes_have_their_class(row: RealReply) -> None:
    assert BUILT_IN.meaning(row.reply()) == Meaning(row.expected, daily=row.daily)


@for_each(OF_REAL_SERVERS, row_id)
def test_a_reply_of_a_real_server_has_its_class(row: RealReply) -> None:
    found = BUILT_IN.meaning(row.reply())

    assert found == Meaning(row.expected, daily=row.daily), f"decided by rule {found.rule!r}"


@for_each(BUILT_IN.names)
def test_removing_any_built_in_rule_changes_the_class_of_a_real_reply(name: str) -> None:
    others = ReplyRules(rule for rule in built_in_rules() if rule.name != name)

    assert any(
        others.meaning(row.reply()) != Meaning(row.expected, daily=row.daily)
        for row in DECIDED_BY[name]
    )


# Success -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "code"),
    [
        (Phase.CONNECT, 220),
        (Phase.EHLO, 250),
        (Phase.STARTTLS, 220),
        (Phase.AUTH, 235),
        (Phase.AUTH, 334),
        (Phase.MAIL, 250),
        (Phase.RCPT, 250),
        (Phase.RCPT, 251),
        (Phase.DATA, 354),
        (Phase.BODY, 250),
    ],
)
def test_a_step_that_succeeds_is_sent(phase: Phase, code: int) -> None:
    assert meaning(phase, code, text="Daily limit exceeded, greylisted") == Meaning(ReplyClass.SENT)


@pytest.mark.parametrize(
    ("phase", "code"),
    [
        # The body was not sent yet, so nothing was accepted.
        (Phase.DATA, 250),
        (Phase.MAIL, 354),
        (Phase.BODY, 354),
        (Phase.BODY, 150),
        (Phase.BODY, 600),
        (Phase.MAIL, 0),
        (Phase.MAIL, -1),
        (Phase.RCPT, 99_999),
    ],
)
def test_a_reply_that_breaks_the_protocol_is_neither_a_success_nor_a_refusal(
    phase: Phase, code: int
) -> None:
    assert meaning(phase, code) == Meaning(ReplyClass.TEMPORARY)


# Connections that have carried mail ----------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT])
@pytest.mark.parametrize("code", [421, 450, 451, 452, 454, 503])
def test_a_refusal_of_the_next_mail_concerns_the_session(phase: Phase, code: int) -> None:
    assert meaning(phase, code, earlier=1).reply_class is ReplyClass.SESSION
    assert meaning(phase, code, earlier=99).reply_class is ReplyClass.SESSION


@for_each(
    itertools.product(
        TRANSACTION,
        (450, 451, 452, 503, 550, 554),
        ("Mails per session exceeded", "Only 5 per Connection"),
    )
)
def test_a_session_limit_applies_only_to_a_connection_that_has_carried_mail(
    case: tuple[Phase, int, str],
) -> None:
    phase, code, text = case
    assert meaning(phase, code, text=text, earlier=5).reply_class is ReplyClass.SESSION
    assert meaning(phase, code, text=text).reply_class is meaning(phase, code).reply_class


@pytest.mark.parametrize("phase", list(Phase))
def test_421_without_a_better_rule_is_session_even_on_a_new_connection(
    phase: Phase,
) -> None:
    assert meaning(phase, 421).reply_class is ReplyClass.SESSION


@pytest.mark.parametrize("phase", TRANSACTION)
def test_503_on_a_new_connection_loses_no_mail(phase: Phase) -> None:
    assert meaning(phase, 503).reply_class is ReplyClass.DEFERRED


# Replies of any kind -------------------------------------------------------------------------


@given(phases, st.integers(-1, 1000), enhanced_codes, st.text(max_size=300), st.integers(0, 3))
def test_every_reply_has_a_class(
    phase: Phase, code: int, enhanced: str | None, text: str, earlier: int
) -> None:
    found = meaning(phase, code, enhanced, text, earlier)

    assert (found.reply_class is ReplyClass.SENT) == (
        (code // 100 == 2 and phase is not Phase.DATA)
        or (code // 100 == 3 and phase in {Phase.AUTH, Phase.DATA})
    )
    assert not found.daily or found.reply_class is ReplyClass.ACCOUNT


@pytest.mark.parametrize("phase", list(Phase))
def test_the_code_and_the_phase_decide_about_a_reply_without_text(phase: Phase) -> None:
    for code in range(400, 500):
        assert meaning(phase, code).reply_class in {
            ReplyClass.SESSION,
            ReplyClass.DEFERRED,
            ReplyClass.TEMPORARY,
            ReplyClass.AUTH,
        }
    for code in EXPLAINED_BY_NO_CODE:
        expected = {
            Phase.CONNECT: ReplyClass.TEMPORARY,
            Phase.EHLO: ReplyClass.TEMPORARY,
            Phase.STARTTLS: ReplyClass.TEMPORARY,
            Phase.AUTH: ReplyClass.AUTH,
            Phase.MAIL: ReplyClass.ACCOUNT,
        }.get(phase, ReplyClass.REFUSED)
        assert meaning(phase, code).reply_class is expected, code


@pytest.mark.parametrize("phase", TRANSACTION)
def test_an_unexplained_refusal_on_a_used_connection_concerns_the_session(
    phase: Phase,
) -> None:
    for code in (*EXPLAINED_BY_NO_CODE, 451, 452, 454, 503):
        assert meaning(phase, code, earlier=1).reply_class is ReplyClass.SESSION, code


@pytest.mark.parametrize(
    "text",
    [
        "\x00" * 5000,
        "daily\x00limit",
        "\udcff\udcfe" * 2000,
        "5" * 5000,
        "550 " * 5000,
        "\r\n" * 5000,
        "İ" * 5000,
        "daily " * 100_000,
        "x" * 1_000_000,
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_a_hostile_text_changes_nothing(text: str) -> None:
    enhanced, kept = split_enhanced_code(550, text)

    assert enhanced is None
    assert len(kept) <= 2_000
    assert meaning(Phase.RCPT, 550, None, text) == Meaning(ReplyClass.REFUSED)


def test_only_the_beginning_of_a_text_is_searched() -> None:
    text = "Daily limit exceeded"

    assert meaning(Phase.RCPT, 550, text="x" * 1_900 + text).reply_class is ReplyClass.ACCOUNT
    assert meaning(Phase.RCPT, 550, text="x" * 2_000 + text).reply_class is ReplyClass.REFUSED


def test_phrases_match_case_insensitively_and_across_lines() -> None:
    text = "TOO\r\n\tMANY \n CONNECTIONS"

    assert meaning(Phase.RCPT, 550, text=text).reply_class is ReplyClass.CONNECTIONS


@pytest.mark.parametrize(
    "address",
    ["throttle@example.com", "ratelimit@x.test", "spam@x.test", "greylist@x.test", "overquota@x"],
)
def test_an_address_that_a_server_repeats_matches_no_phrase(address: str) -> None:
    for said in (f"<{address}>: no", f"{address} no", f"{address}... no"):
        assert meaning(Phase.RCPT, 550, text=said).reply_class is ReplyClass.REFUSED
        assert meaning(Phase.RCPT, 452, text=said).reply_class is ReplyClass.TEMPORARY


def test_a_url_matches_no_phrase() -> None:
    said = "no, see https://x.test/throttled-greylisted"

    assert meaning(Phase.RCPT, 550, text=said).reply_class is ReplyClass.REFUSED
    assert meaning(Phase.RCPT, 452, text=said).reply_class is ReplyClass.TEMPORARY


# Enhanced codes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (550, "5.1.1 nobody", ("5.1.1", "nobody")),
        (550, "550 5.1.1 nobody", ("5.1.1", "nobody")),
        (550, "550-5.7.1 no\n550 5.7.1 never", ("5.7.1", "no\nnever")),
        (550, "550-5.7.1 no\n5.7.1 never", ("5.7.1", "no\nnever")),
        (550, "5.7.1 no\r\n5.7.1 never", ("5.7.1", "no\nnever")),
        (550, "no\n5.7.1 never", ("5.7.1", "no\nnever")),
        (550, "5.7.1: no", ("5.7.1", "no")),
        (550, "5.7.1 no\n5.1.1 nobody", ("5.7.1", "no\nnobody")),
        (550, "5.7.1", ("5.7.1", "")),
        (550, "550", (None, "")),
        (550, "", (None, "")),
        (550, "no such user", (None, "no such user")),
        (550, "5.7.705 Access denied", ("5.7.705", "Access denied")),
        # The class of both must agree.
        (450, "5.7.1 later", (None, "5.7.1 later")),
        (550, "4.7.1 no", (None, "4.7.1 no")),
        (450, "5.7.1 later\n4.2.1 busy", ("4.2.1", "5.7.1 later\nbusy")),
        # Not codes: an address, four numbers, too long a number, leading zeros, other digits.
        (550, "5.1.1.7 is blocked", (None, "5.1.1.7 is blocked")),
        (550, "5.1.1234 no", (None, "5.1.1234 no")),
        (550, "5.01.1 no", (None, "5.01.1 no")),
        (550, "5.1.\u0661 no", (None, "5.1.\u0661 no")),
        (550, "x 5.1.1 no", (None, "x 5.1.1 no")),
        (550, "5501 mails", (None, "5501 mails")),
        # qmail writes it like this.
        (550, "sorry, no mailbox here (#5.1.1)", ("5.1.1", "sorry, no mailbox here (#5.1.1)")),
        (550, "sorry (#4.1.1)", (None, "sorry (#4.1.1)")),
    ],
)
def test_the_enhanced_code_is_separated_from_the_text_of_a_reply(
    code: int, text: str, expected: tuple[str | None, str]
) -> None:
    assert split_enhanced_code(code, text) == expected


@given(st.integers(200, 599), st.text(max_size=400))
def test_an_enhanced_code_must_have_the_class_of_the_reply(code: int, text: str) -> None:
    enhanced, kept = split_enhanced_code(code, text)

    assert enhanced is None or enhanced[0] == str(code)[0]
    assert len(kept) <= len(text)


@pytest.mark.parametrize("enhanced", ["4.1.1", "5.1", "5.1.1.1", "5.1.x", "\x00", "5.1.1\n"])
def test_an_enhanced_code_that_does_not_fit_the_reply_is_ignored(enhanced: str) -> None:
    assert meaning(Phase.RCPT, 550, enhanced) == Meaning(ReplyClass.REFUSED)


@pytest.mark.parametrize(
    ("code", "usable"), [(250, True), (421, False), (450, False), (503, False), (550, True)]
)
def test_a_session_stays_usable_after_any_permanent_refusal_except_503(
    code: int, usable: bool
) -> None:
    assert leaves_session_usable(code) is usable
