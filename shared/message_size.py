"""Computes the sizes of texts in a mail before they are encoded. Pure.

Each size is exact or a lower bound, so a mail whose size exceeds a limit is certainly too large.
"""

from __future__ import annotations

from typing import NamedTuple, Self

# `markupsafe.escape` writes these as `&lt;` and `&gt;`, and as `&amp;`, `&#34;` and `&#39;`.
_FOUR_CHARACTERS, _FIVE_CHARACTERS = "<>", "&\"'"
# The maximum number of bytes of one character: five if it is escaped, four in UTF-8 if it is not.
MOST_BYTES = 5


class TextSize(NamedTuple):
    """The length of a text in UTF-8, and how many of these bytes are not ASCII."""

    size: int
    beyond_ascii: int

    @classmethod
    def of(cls, text: str, *, escaped: bool = False) -> Self:
        """Measure `text`; `escaped` measures what HTML escaping makes of it."""
        growth = escape_growth(text) if escaped else 0
        if text.isascii():
            return cls(len(text) + growth, 0)
        size = utf8_size(text)
        return cls(size + growth, size - len(text.encode("ascii", "ignore")))

    def __mul__(self, times: object) -> Self:
        """Return the size of that many copies of the text."""
        if not isinstance(times, int):
            return NotImplemented
        return type(self)(self.size * times, self.beyond_ascii * times)

    def plus(self, other: TextSize) -> Self:
        """Return the size of both texts together."""
        return type(self)(self.size + other.size, self.beyond_ascii + other.beyond_ascii)

    @property
    def least_encoded(self) -> int:
        """A lower bound of the encoded size, for any transfer encoding."""
        return min(self.size + 2 * self.beyond_ascii, -(-self.size * 4 // 3))


def utf8_size(text: str) -> int:
    """Return the length of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def escape_growth(text: str) -> int:
    """Return how many characters HTML escaping adds to `text`."""
    return 3 * sum(map(text.count, _FOUR_CHARACTERS)) + 4 * sum(map(text.count, _FIVE_CHARACTERS))


def fits_escaped(text: str, room: int) -> bool:
    """Return whether the escaped `text` has at most `room` characters."""
    return len(text) * MOST_BYTES <= room or len(text) + escape_growth(text) <= room


def too_large(size: int, limit: int, *, exact: bool = False) -> str:
    """Return the message of MESSAGE_TOO_LARGE. Without `exact`, `size` is a lower bound."""
    least = "" if exact else "at least "
    return f"the mail has {least}{size:,} bytes, OUTBOX_MAX_MESSAGE_BYTES permits {limit:,}"
