"""Hides secrets in texts from outside, such as a reply that quotes a command. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# Characters of a text that are kept. Texts that are shown to people are shorter.
MAX_TEXT: Final = 600
# Servers that quote a long secret often cut it. So every part of a secret that has this length is
# hidden.
_PART: Final = 12
# Every reply to a mail is searched, so words without a part of a secret are skipped quickly. Any 12
# characters contain 8 that begin at a multiple of 5. If none of those is in the secret, no part is.
_ANCHOR: Final = 8
_STRIDE: Final = _PART - _ANCHOR + 1
# A shorter secret is not hidden: it protects nothing, and occurs in ordinary text.
_LEAST_SECRET: Final = 4
_WORD: Final = re.compile(r"\S+")


def redact(text: str, secrets: Iterable[str], mark: str = "[secret]") -> str:
    """Return the first 600 characters of the text, with `mark` in place of secrets.

    Parts of secrets that have 12 characters or more are replaced too.
    """
    cut = text[:MAX_TEXT]
    hidden = [False] * len(cut)
    for secret in secrets:
        if len(secret) >= _LEAST_SECRET:
            _find(cut, secret, hidden)
    shown = _marked(cut, hidden, mark) if any(hidden) else cut
    # The end of a cut text may be a part of a secret that is too short to be recognised.
    return shown if len(text) <= MAX_TEXT else shown[: 1 - _PART]


def _find(text: str, secret: str, hidden: list[bool]) -> None:
    """Set `hidden` to True for the characters of `text` that belong to the secret."""
    length = min(_PART, len(secret))
    # A secret without spaces can only be within a word, and most words are too short for one.
    spans = [(0, len(text))]
    if _WORD.fullmatch(secret):
        spans = [word.span() for word in _WORD.finditer(text)]
    for first, end in spans:
        if length == _PART and not _has_anchor(text, first, end, secret):
            continue
        for start in range(first, end - length + 1):
            if text[start : start + length] in secret:
                hidden[start : start + length] = [True] * length


def _has_anchor(text: str, first: int, end: int, secret: str) -> bool:
    anchors = (text[start : start + _ANCHOR] for start in range(first, end - _ANCHOR + 1, _STRIDE))
    return any(anchor in secret for anchor in anchors)


def _marked(text: str, hidden: list[bool], mark: str) -> str:
    kept: list[str] = []
    for position, char in enumerate(text):
        if not hidden[position]:
            kept.append(char)
        elif not position or not hidden[position - 1]:
            kept.append(mark)
    return "".join(kept)
