"""One rule for SMTP replies: reads it from a TOML table and checks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from outbox_server.shared.quoting import shortened
from outbox_server.shared.smtp.phase import Phase
from outbox_server.shared.states import ReplyClass

MAX_ENTRIES: Final = 100
MAX_PHRASE: Final = 200
_LEAST_PHRASE: Final = 3

_ALL_CODES: Final = frozenset(range(400, 600))
# A rule cannot turn a refusal into a success.
_CLASSES: Final = {each.name: each for each in ReplyClass if each is not ReplyClass.SENT}
_KEYS: Final = ("name", "class", "phase", "code", "enhanced", "text", "used", "daily", "enabled")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_GROUP: Final = {"4xx": range(400, 500), "5xx": range(500, 600)}
_ENHANCED: Final = re.compile(r"[45]\.(?:[0-9]{1,3}|\*)\.(?:[0-9x]{1,3}|\*)")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. A condition that is empty or None matches every reply."""

    name: str
    reply_class: ReplyClass
    daily: bool
    phases: frozenset[Phase]
    codes: frozenset[int]
    enhanced: re.Pattern[str] | None
    # Alternatives. All phrases of one alternative must occur in the text.
    text: tuple[tuple[str, ...], ...]
    used: bool | None

    def concerns(self, phase: Phase, digit: int) -> bool:
        """Return whether the rule can match a reply of this phase and first digit."""
        of_phase = not self.phases or phase in self.phases
        return of_phase and not self.codes.isdisjoint(range(digit * 100, digit * 100 + 100))

    def matches(self, code: int, enhanced: str | None, text: str, *, used: bool) -> bool:
        """Return whether all conditions hold. The rule must concern the phase of the reply.

        `text` is in lower case. `used` means that the connection had carried a mail before.
        """
        if code not in self.codes or (self.used is not None and self.used is not used):
            return False
        if self.enhanced and not (enhanced and self.enhanced.fullmatch(enhanced)):
            return False
        return not self.text or any(all(part in text for part in parts) for parts in self.text)


class RuleReader:
    """Checks the table of one rule.

    `fail(key, text)` reports a mistake and does not return. An empty key means the whole rule.
    """

    def __init__(self, table: Mapping[str, Any], fail: Callable[[str, str], NoReturn]) -> None:
        self._table = table
        self.fail = fail

    def name(self) -> str:
        """Return the name of the rule, after a check of all keys."""
        for key in self._table:
            if key not in _KEYS:
                self.fail(key, f"unknown key; a rule has {', '.join(_KEYS)}")
        name = self._table.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.fail(
                "name" if "name" in self._table else "",
                "a rule needs a name of at most 64 lower-case letters, digits and dashes",
            )
        return name

    def rule(self, name: str, *, known: bool) -> Rule | None:
        """Return the rule, or None if it is switched off.

        `known` means that a built-in rule has this name.
        """
        enabled = self._flag("enabled")
        if enabled is False and "class" not in self._table:
            if not known:
                self.fail("name", f'no built-in rule is named "{name}", so none is switched off')
            extra = next((key for key in self._table if key not in {"name", "enabled"}), None)
            if extra:
                self.fail(extra, "a rule that is only switched off has no other keys")
            return None
        rule = self._complete(name)
        return None if enabled is False else rule

    def _complete(self, name: str) -> Rule:
        reply_class = self._class()
        daily = self._flag("daily") or False
        if daily and reply_class is not ReplyClass.ACCOUNT:
            self.fail("daily", "only a rule of class ACCOUNT can be daily")
        if not {"code", "enhanced", "text"} & self._table.keys():
            self.fail("", "a rule needs at least one of code, enhanced, text")
        used = self._flag("used")
        if used is None and reply_class is ReplyClass.SESSION:
            # A connection that has carried no mail would be refused again if it were replaced.
            used = True
        codes = self._codes()
        return Rule(
            name=name,
            reply_class=reply_class,
            daily=daily,
            phases=frozenset(self._phases()),
            codes=codes,
            enhanced=self._enhanced(codes),
            text=self._text(),
            used=used,
        )

    def _class(self) -> ReplyClass:
        known = ", ".join(_CLASSES)
        if "class" not in self._table:
            self.fail("", f"a rule needs a class, one of {known}")
        value = self._table["class"]
        if not isinstance(value, str) or value not in _CLASSES:
            self.fail("class", f"{_shown(value)} is not one of {known}")
        return _CLASSES[value]

    def _flag(self, key: str) -> bool | None:
        value = self._table.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def _list(self, key: str) -> list[Any]:
        if key not in self._table:
            return []
        value = self._table[key]
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ENTRIES:
            self.fail(key, f"must be a list of 1 to {MAX_ENTRIES} entries")
        return value

    def _phases(self) -> list[Phase]:
        entries = self._list("phase")
        for entry in entries:
            if not isinstance(entry, str) or entry not in Phase.__members__:
                self.fail("phase", f"{_shown(entry)} is not one of {', '.join(Phase.__members__)}")
        return [Phase[entry] for entry in entries]

    def _codes(self) -> frozenset[int]:
        codes: set[int] = set()
        for entry in self._list("code"):
            if isinstance(entry, str) and entry in _GROUP:
                codes.update(_GROUP[entry])
            elif isinstance(entry, int) and entry in _ALL_CODES:
                codes.add(entry)
            else:
                self.fail("code", f'{_shown(entry)} is not one of 400 to 599, "4xx", "5xx"')
        return frozenset(codes) or _ALL_CODES

    def _enhanced(self, codes: frozenset[int]) -> re.Pattern[str] | None:
        digits = {str(code)[0] for code in codes}
        patterns: list[str] = []
        for entry in self._list("enhanced"):
            if not isinstance(entry, str) or not _ENHANCED.fullmatch(entry):
                self.fail(
                    "enhanced",
                    f'{_shown(entry)} is not a code such as "5.4.5", "4.2.*" or "5.7.7xx"',
                )
            if entry[0] not in digits:
                self.fail("enhanced", f"{_shown(entry)} does not fit any code of this rule")
            pattern = entry.replace(".", r"\.").replace("*", "[0-9]{1,3}").replace("x", "[0-9]")
            patterns.append(pattern)
        return re.compile("|".join(patterns)) if patterns else None

    def _text(self) -> tuple[tuple[str, ...], ...]:
        return tuple(
            self._phrases(entry if isinstance(entry, list) else [entry])
            for entry in self._list("text")
        )

    def _phrases(self, entries: list[Any]) -> tuple[str, ...]:
        if not 1 <= len(entries) <= MAX_ENTRIES:
            self.fail("text", f"a list of phrases must have 1 to {MAX_ENTRIES} entries")
        for entry in entries:
            if not isinstance(entry, str) or not (
                len(entry.strip()) >= _LEAST_PHRASE and len(entry) <= MAX_PHRASE
            ):
                self.fail(
                    "text",
                    f"{_shown(entry)} is not a phrase of {_LEAST_PHRASE} to {MAX_PHRASE} "
                    "characters",
                )
        return tuple(re.sub(r"\s+", " ", entry.lower()) for entry in entries)


def _shown(value: object) -> str:
    """Return an entry as an error message quotes it."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return shortened(text, MAX_PHRASE)
