"""Texts whose length or form is what hurts: a parser, matcher or normaliser that is not linear."""

from __future__ import annotations

from typing import Final

# What is repeated, with a beginning and an end that matches nothing.
_PARTS: Final = (
    # Brackets that never close, of templates, addresses, HTML and CSV.
    ("", "{{", ""),
    ("{{", " ", ""),
    ("{{ a", "| a", ""),
    ("{%", " ", "%"),
    ("", "{% raw %}", ""),
    ("", "{% if a %}", ""),
    ("{{ ", "(", " }}"),
    ("{{ ", "a[", " }}"),
    ("<", "@", ""),
    ("", "<", ">"),
    ("", "<!--", ""),
    ('"', '""', ""),
    ("", "(", "@example.com"),
    # Combining marks, whose order a normaliser sorts, and characters that it makes longer.
    ("a", "\u0301\u0316", ""),
    ("a", "\u0316\u0301", "@example.com"),
    ("", "\ufdfa", ""),
    ("", "\uac00\u11a8", ""),
    # Long runs of one character, and of pairs that look like the end of something.
    ("", "a", "\x00"),
    ("a@", "a.", ""),
    ("a@", "-", ".org"),
    ("", " ", "x"),
    ("", "\t ", "\x00"),
    ("", "0", "x"),
    ("", "\r\n", ""),
    ("", "\\", '"'),
    ("", "%", ""),
    ("", "=?utf-8?q?", ""),
    ("", "xn--", ".org"),
    ("", ",", ""),
    ("", "../", ""),
    ("", "+00:", ""),
    ("", "e", "1e9"),
)


def hostile_texts(size: int) -> list[str]:
    """Return texts of at most `size` characters."""
    return [
        (begin + pump * ((size - len(begin) - len(end)) // len(pump)) + end)[:size]
        for begin, pump, end in _PARTS
    ]


def harmless_texts(size: int) -> list[str]:
    """Return ordinary texts of `size` characters: plain, and of a template."""
    return [(part * (size // len(part) + 1))[:size] for part in ("Good day. ", "Dear {{ a }}, ")]
