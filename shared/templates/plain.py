"""Reads templates that only insert columns, in linear time and without Liquid. Pure.

Most templates have nothing but text, `{{ name }}` and `{{ name | default: "text" }}`. They need no
worker process: reading one takes microseconds, and rendering it a tenth of the time of Liquid.
"""

from __future__ import annotations

import re
from typing import Final

from outbox_server.shared.templates.source import Placeholder, SourceSummary

# Possessive quantifiers (`*+`), so that no text makes the search go back.
_INSERTION: Final = re.compile(
    r"\{\{[ \t]*+(?P<name>[A-Za-z_][A-Za-z0-9_]*+)[ \t]*+"
    r"(?:\|[ \t]*+default:[ \t]*+(?:\"(?P<double>[^\"\\{}]*+)\"|'(?P<single>[^'\\{}]*+)')[ \t]*+)?"
    r"\}\}"
)
# Words that are, or may become, more than a name in Liquid. `now` and `today` are the clock's.
_WORDS: Final = frozenset(
    (
        *("true", "false", "nil", "null", "none", "empty", "blank", "undefined", "now", "today"),
        *("and", "or", "not", "in", "contains", "if", "else", "unless", "for", "with", "as", "by"),
        *("case", "when", "offset", "limit", "reversed", "cols"),
    )
)
# Templates with more insertions are not read here.
_MOST_INSERTIONS: Final = 1_000


def plain_source(field: str, source: str) -> SourceSummary | None:
    """Return the summary of a template that only inserts columns, or None for any other."""
    if "{%" in source or source.count("{{") > _MOST_INSERTIONS:
        return None
    parts: list[str | Placeholder] = []
    names: set[str] = set()
    required: set[str] = set()
    end = 0
    for found in _INSERTION.finditer(source):
        name, text = found["name"], source[end : found.start()]
        # `{{{ name }}` is a mistake, not an insertion after a brace.
        if name in _WORDS or "{{" in text or text.endswith("{"):
            return None
        default = found["double"] if found["double"] is not None else found["single"]
        parts += [text, Placeholder(name, default)]
        names.add(name)
        if default is None:
            required.add(name)
        end = found.end()
    parts.append(source[end:])
    if "{{" in source[end:]:
        return None
    inner = source.strip()
    return SourceSummary(
        names=frozenset(names),
        required=frozenset(required),
        may_break="\n" in inner or "\r" in inner,
        escapes=field == "html",
        parts=tuple(part for part in parts if part),
    )
