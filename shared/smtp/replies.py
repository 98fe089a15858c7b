"""Decides what an SMTP reply means. No other code interprets a reply. Pure.

The rules for refusals are data: `reply_rules.toml` in this folder, and an operator's file that adds
to it. Whether a reply is a success depends on its code alone, and is decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Self

from outbox_server.shared.smtp.phase import Phase
from outbox_server.shared.smtp.reply_parser import CONTINUES, SUCCESS, TEMPORARY_REFUSAL
from outbox_server.shared.smtp.reply_rule_file import built_in_rules, operator_rules
from outbox_server.shared.smtp.reply_rules import Rule
from outbox_server.shared.states import ReplyClass

__all__ = [
    "Meaning",
    "Phase",
    "Reply",
    "ReplyRules",
    "asks_for_other_token",
    "lacks_auth_method",
    "leaves_session_usable",
    "split_enhanced_code",
]

# How many characters of a reply's text the rules search. A server may send any number.
LONGEST_TEXT: Final = 2_000

_ENHANCED: Final = r"[245]\.(?:0|[1-9][0-9]{0,2})\.(?:0|[1-9][0-9]{0,2})"
_ENHANCED_ALONE: Final = re.compile(_ENHANCED)
# At the start of a line. The start of an IPv4 address does not match.
_ENHANCED_FIRST: Final = re.compile(rf"[ \t]*({_ENHANCED})(?![0-9]|\.[0-9])[ \t:]*")
# At the end of a text, as qmail writes it: "sorry, no mailbox here by that name. (#5.1.1)".
_ENHANCED_QMAIL: Final = re.compile(rf"\(#({_ENHANCED})\)")


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, and the step of the session that it answers.

    `enhanced_code` is a status code of RFC 3463, such as `5.4.5`, or None. `text` is the reply
    without its codes. `earlier_mails` counts the mails that were begun on this connection before
    the present one.
    """

    phase: Phase
    code: int
    enhanced_code: str | None
    text: str
    earlier_mails: int = 0


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a reply.

    `daily` means that a daily quota is used up: no probe is sent before the oldest mail of the last
    24 hours has left them. `rule` is the name of the rule that matched; empty means that the code
    alone decided.
    """

    reply_class: ReplyClass
    daily: bool = False
    rule: str = field(default="", compare=False)


_SENT: Final = Meaning(ReplyClass.SENT)
_TEMPORARY: Final = Meaning(ReplyClass.TEMPORARY)
_REFUSED: Final = Meaning(ReplyClass.REFUSED)
# Phases in which a 3xx reply is a success: 334 asks for the next part of AUTH, 354 for the body.
_CONTINUES: Final = frozenset({Phase.AUTH, Phase.DATA})
# Bad sequence of commands (RFC 5321, 4.2.3): the server has lost the state of the session.
_BAD_SEQUENCE: Final = 503
# Authentication credentials invalid (RFC 4954, section 6).
_CREDENTIALS_INVALID: Final = 535
# RFC 4954, section 4: the server does not have this AUTH method, although it lists it. (500 and
# 502: it does not know the command in this form.)
_METHOD_UNKNOWN: Final = frozenset({500, 502, 504})


class ReplyRules:
    """The active rules: the operator's, then the built-in ones. The first match decides.

    Immutable, so all tasks may share one object.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        kept = tuple(rules)
        self.names = tuple(rule.name for rule in kept)
        self._rules = {
            (phase, digit): tuple(
                (rule, Meaning(rule.reply_class, daily=rule.daily, rule=rule.name))
                for rule in kept
                if rule.concerns(phase, digit)
            )
            for phase in Phase
            for digit in (4, 5)
        }

    @classmethod
    def load(cls, path: str) -> Self:
        """Return the rules of the operator's file, followed by the built-in rules.

        An operator's rule replaces the built-in rule of the same name, or switches it off with
        `enabled = false`. An empty path means that there is no operator's file.

        Raises:
            ConfigurationError: the file cannot be read, or is wrong; the message names the line.
        """
        built_in = built_in_rules()
        if not path:
            return cls(built_in)
        own = operator_rules(path, {rule.name for rule in built_in})
        return cls([*own.rules, *(rule for rule in built_in if rule.name not in own.names)])

    def meaning(self, reply: Reply) -> Meaning:
        """Return what a reply means.

        A 2xx reply is a success, except at DATA, where the body was not sent yet. A 3xx reply is a
        success at AUTH and DATA, where it asks for more. Any other reply that is not 4xx or 5xx
        breaks the protocol and says nothing about the mail, so it is TEMPORARY.
        """
        digit = reply.code // 100
        if digit == SUCCESS:
            return _TEMPORARY if reply.phase is Phase.DATA else _SENT
        if digit == CONTINUES:
            return _SENT if reply.phase in _CONTINUES else _TEMPORARY
        rules = self._rules.get((reply.phase, digit))
        if rules is None:
            return _TEMPORARY
        enhanced = _agreeing(reply.code, reply.enhanced_code)
        text = _searchable(reply.text)
        used = reply.earlier_mails > 0
        for rule, meaning in rules:
            if rule.matches(reply.code, enhanced, text, used=used):
                return meaning
        return _TEMPORARY if digit == TEMPORARY_REFUSAL else _REFUSED


def leaves_session_usable(code: int) -> bool:
    """Return whether the session may carry another mail after a reply with this code.

    A 4xx reply may be about the session, and 503 says that the server has lost its state. Any other
    5xx reply is about the mail, or about a command that the server does not know.
    """
    return code // 100 != TEMPORARY_REFUSAL and code != _BAD_SEQUENCE


def lacks_auth_method(code: int) -> bool:
    """Return whether a refusal of AUTH with this code is about the method, not the password."""
    return code in _METHOD_UNKNOWN


def asks_for_other_token(code: int) -> bool:
    """Return whether a refusal of AUTH with this code may end with another access token."""
    return code == _CREDENTIALS_INVALID


def split_enhanced_code(code: int, text: str) -> tuple[str | None, str]:
    """Return the enhanced code of a reply (RFC 2034), and its text without codes.

    `text` is the whole reply: lines joined by newlines, each with or without the three digits of
    `code` at its start. An enhanced code of another class than `code` stays in the text. Only the
    first 2,000 characters are read and returned. The enhanced code is None if there is none.
    """
    digits = str(code)
    found: str | None = None
    lines: list[str] = []
    for whole in text[:LONGEST_TEXT].splitlines():
        line = whole
        if whole.startswith(digits) and whole[len(digits) :][:1] in {" ", "-", ""}:
            line = whole[len(digits) + 1 :]
        first = _ENHANCED_FIRST.match(line)
        if first and _agreeing(code, first[1]):
            found = found or first[1]
            line = line[first.end() :]
        lines.append(line)
    kept = "\n".join(lines)
    if found is None and (named := _ENHANCED_QMAIL.search(kept)):
        found = _agreeing(code, named[1])
    return found, kept


def _agreeing(code: int, enhanced: str | None) -> str | None:
    """Return the enhanced code if it has the class of the reply code (RFC 2034, section 4)."""
    if enhanced is None or not _ENHANCED_ALONE.fullmatch(enhanced):
        return None
    return enhanced if enhanced[0] == str(code)[0] else None


def _searchable(text: str) -> str:
    """Return the text in the form that phrases are searched in: lower case, single spaces.

    Addresses and URLs are left out, because a recipient may be named `throttle@example.com`. There
    is a space at each end, so that a phrase that begins with a space matches the first word too.
    """
    words = text[:LONGEST_TEXT].lower().split()
    return f" {' '.join(word for word in words if '@' not in word and '://' not in word)} "
