"""Formats an SMTP reply as one line of text for people. Pure."""

from __future__ import annotations

from typing import Final

# Characters of a reply that a sentence quotes. A server may send many lines.
MAX_SHOWN: Final = 200


def describe_reply(
    code: int | None, enhanced_code: str | None, text: str, most: int = MAX_SHOWN
) -> str:
    """Return a reply such as `550 5.4.5 Daily user sending limit exceeded`.

    Codes that `text` begins with are not repeated, nor is an enhanced code that begins a later line
    too (RFC 2034, section 4). Line breaks become spaces. A result of more than `most` characters is
    cut and ends with `...`. `code` is None where there was no reply; the result is then the text
    alone.
    """
    first, *later = text.splitlines() or [""]
    if enhanced_code:
        later = [line.strip().removeprefix(f"{enhanced_code} ") for line in later]
    words = " ".join(" ".join((first, *later)).split())
    for part in (enhanced_code, None if code is None else str(code)):
        if part and not _begins_with(words, part):
            words = f"{part} {words}".rstrip()
    return words if len(words) <= most else f"{words[: most - 3]}..."


def _begins_with(words: str, part: str) -> bool:
    return words == part or words.startswith((f"{part} ", f"{part}-"))
