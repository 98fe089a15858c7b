"""Reports what failed, on stderr: as a line, or with `-o json` as a JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

from outbox_server.cli.terminal import note
from outbox_server.shared.errors import OutboxError

# Whether the running command was called with `-o json`.
as_json: Final[ContextVar[bool]] = ContextVar("as_json", default=False)


def asks_for_json(words: Sequence[str]) -> bool:
    """Return whether a command line has `-o json`, in any spelling. The last `-o` counts."""
    wanted = ""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--":
            break
        if word in ("-o", "--output"):
            wanted = following
        elif word.startswith("--output="):
            wanted = word.partition("=")[2]
        elif word.startswith("-o"):
            wanted = word.removeprefix("-o")
    return wanted == "json"


def report(error: OutboxError) -> None:
    """Print an error of a command."""
    if not as_json.get():
        note(f"outbox: {error}")
        return
    document: dict[str, Any] = {
        "code": None,
        "reason": error.reason,
        "message": str(error),
        "violations": [
            {"field": one.field, "description": one.description}
            for one in getattr(error, "violations", ())
        ],
        "metadata": error.metadata,
    }
    _print(document | getattr(error, "details", {}))


def report_usage(message: str) -> None:
    """Print an error of the words of the command line as a JSON document."""
    _print(
        {
            "code": None,
            "reason": "USAGE_ERROR",
            "message": message,
            "violations": [],
            "metadata": {},
        }
    )


def _print(document: Mapping[str, Any]) -> None:
    # `note` escapes what could control a terminal; those characters are escapes of JSON by then.
    note(json.dumps({"error": document}))
