"""Says in our own words why a text is not an e-mail address.

`email_validator` decides whether it is one. Its texts are not shown, because they do not use the
words of our interface and change between its releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Final

MAX_LOCAL: Final = 64
MAX_LABEL: Final = 63
_EXAMPLE: Final = "such as ann@example.com"
# Characters that look like an @, and come from keyboards for other languages.
_LIKE_AT: Final = "\uff20\ufe6b"
_LOCAL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~.]|[^\x00-\x7f]")
_DOMAIN: Final = re.compile(r"[A-Za-z0-9.-]|[^\x00-\x7f]")


def address_fault(text: str) -> str:
    """Return what is wrong with `text`, which is not an address, and what would be right."""
    local, at, domain = text.rpartition("@")
    if not at:
        if any(char in text for char in _LIKE_AT):
            return "has a character that only looks like an @; write @"
        return f"must have an @ between a name and a domain, {_EXAMPLE}"
    faults = chain(_faults_of_local(local), _faults_of_domain(domain))
    return next(faults, "must have a domain after the @ that can get mail on the internet")


def _faults_of_local(local: str) -> Iterator[str]:
    if not local:
        yield f"must have a name before the @, {_EXAMPLE}"
    if local.startswith('"'):
        yield "must not have quotes before the @"
    yield from _wrong_character(_LOCAL, local, "before")
    if len(local) > MAX_LOCAL:
        yield f"must have at most {MAX_LOCAL} characters before the @ (got {len(local):,})"
    if local.startswith(".") or local.endswith("."):
        yield "must not begin or end with a dot before the @"
    if ".." in local:
        yield "must not have two dots in a row"


def _faults_of_domain(domain: str) -> Iterator[str]:
    if not domain:
        yield f"must have a domain after the @, {_EXAMPLE}"
    if domain.startswith("["):
        yield "must have the name of a domain after the @, not an IP address"
    yield from _wrong_character(_DOMAIN, domain, "after")
    if ".." in domain:
        yield "must not have two dots in a row"
    if domain.startswith(".") or domain.endswith("."):
        yield "must not begin or end with a dot after the @"
    if "." not in domain:
        yield f"must have a dot in the domain after the @, {_EXAMPLE}"
    labels = domain.split(".")
    if any(label.startswith("-") or label.endswith("-") for label in labels):
        yield "must not have a hyphen next to a dot or at an end of its domain"
    longest = max(map(len, labels))
    if longest > MAX_LABEL:
        yield f"must have at most {MAX_LABEL} characters between dots (got {longest:,})"


def _wrong_character(right: re.Pattern[str], text: str, place: str) -> Iterator[str]:
    wrong = next((char for char in text if not right.fullmatch(char)), "")
    if wrong.isspace():
        yield "must not contain spaces"
    elif wrong:
        shown = repr(wrong) if wrong.isprintable() else f"the character U+{ord(wrong):04X}"
        yield f"must not contain {shown} {place} the @"
