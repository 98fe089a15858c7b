"""docs/providers.md names the class that the built-in rules give each reply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from outbox_server.shared.smtp.replies import Meaning, Phase, Reply, ReplyRules, split_enhanced_code
from outbox_server.shared.states import ReplyClass
from tests.for_each import for_each

PAGE = Path(__file__).parent.parent.parent / "docs" / "providers.md"
# | limit | `CODE text` | at | `CLASS`[, daily] |
_ROW = re.compile(
    r"^\| (?P<limit>[^|]+) \| `(?P<reply>(?P<code>\d{3})[^`]*)` \| (?P<at>[^|]+) \|"
    r" `(?P<reply_class>[A-Z]+)`(?P<daily>, daily)? \|$"
)
# The beginning of a row with a reply: it finds rows that the pattern above does not match.
_BEGINS_LIKE_A_ROW = re.compile(r"^\|[^|]*\|[^|]*`[245]\d\d[ -]")
# On the page, "?" means that the class is the same in all of these phases.
_UNKNOWN = (Phase.MAIL, Phase.RCPT, Phase.BODY)
# A connection can carry mail only after these phases.
_BEFORE_MAIL = {Phase.CONNECT, Phase.EHLO, Phase.AUTH}


class Row(NamedTuple):
    line: int
    reply: str
    code: int
    at: str
    meaning: Meaning

    def cases(self) -> Iterator[tuple[Phase, int]]:
        """Yield each phase and number of earlier mails for which the row names the class."""
        words = [word.strip() for word in self.at.split(",")]
        later = "later mail" in words
        names = [word for word in words if word != "later mail"]
        phases = _UNKNOWN if names == ["?"] else tuple(Phase[name] for name in names)
        for phase in phases:
            if not later:
                yield phase, 0
            if phase not in _BEFORE_MAIL:
                yield phase, 3


def rows() -> Iterator[Row]:
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), start=1):
        if match := _ROW.match(line):
            meaning = Meaning(ReplyClass[match["reply_class"]], daily=bool(match["daily"]))
            yield Row(number, match["reply"], int(match["code"]), match["at"], meaning)


ROWS = list(rows())
BUILT_IN = ReplyRules.load("")


def test_every_row_with_a_reply_is_read() -> None:
    text = PAGE.read_text(encoding="utf-8")
    numbers = [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if _BEGINS_LIKE_A_ROW.match(line)
    ]
    assert len(numbers) > 60
    assert [row.line for row in ROWS] == numbers


@for_each(ROWS, lambda row: f"line {row.line}: {row.reply[:40]}")
def test_the_classes_on_the_page_match_the_rules(row: Row) -> None:
    enhanced, text = split_enhanced_code(row.code, row.reply)
    found = {
        (phase.name, earlier): BUILT_IN.meaning(Reply(phase, row.code, enhanced, text, earlier))
        for phase, earlier in row.cases()
    }
    # A refusal that no rule explains is tried on a new connection first.
    if row.meaning.reply_class is ReplyClass.REFUSED:
        found = {(phase, earlier): each for (phase, earlier), each in found.items() if not earlier}
    assert found == dict.fromkeys(found, row.meaning)
    assert found
