from __future__ import annotations

import pytest

from outbox_server.shared.redaction import redact

SECRET = "1//0gYx-abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing to hide", "nothing to hide"),
        ("", ""),
        (f"no {SECRET}, sorry", "no [secret], sorry"),
        (f"{SECRET}{SECRET}", "[secret]"),
        # Cut at either end, as in a quoted command that was too long.
        (f"unknown: {SECRET[:20]}", "unknown: [secret]"),
        (f"{SECRET[-20:]} is unknown", "[secret] is unknown"),
        # Parts as short as this may occur in any text.
        (f"it began with {SECRET[:8]}", f"it began with {SECRET[:8]}"),
    ],
)
def test_a_secret_and_long_parts_of_it_are_hidden(text: str, shown: str) -> None:
    assert redact(text, [SECRET]) == shown


def test_a_short_secret_is_hidden_completely() -> None:
    assert redact("the word is sesame, Sesame", ["sesame"]) == "the word is [secret], Sesame"


def test_a_very_short_secret_is_not_hidden() -> None:
    assert redact("a b c", ["b"]) == "a b c"


def test_every_secret_is_hidden() -> None:
    assert redact("one first, two second", ["first", "second"], "[x]") == "one [x], two [x]"


def test_a_secret_with_blanks_is_hidden_too() -> None:
    assert redact("say open sesame, please", ["open sesame, please"]) == "say [secret]"


def test_a_part_of_a_secret_is_found_at_any_offset() -> None:
    for start in range(len(SECRET) - 11):
        for before in range(12):
            quoted = f"{'?' * before}{SECRET[start : start + 12]}?"
            assert redact(quoted, [SECRET]) == f"{'?' * before}[secret]?"


def test_a_part_that_begins_like_another_part_is_hidden() -> None:
    secret = "abcdefghX1-abcdefghX2-abcdefghY3-end"
    for start in range(len(secret) - 11):
        part = secret[start : start + 12]
        assert redact(f"<{part}>", [secret]) == "<[secret]>"
