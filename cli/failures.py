"""Reports what failed, on stderr: as a line, or with `-o json` as a JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

import typer

from outbox_server.cli.terminal import note
from outbox_server.shared.errors import OutboxError

# Whether the running command was called with `-o json`.
as_json: Final[ContextVar[bool]] = ContextVar("as_json", default=False)
# Phrases of typer's library for values, and ours. The longest first.
_PHRASES: Final = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole "
    "number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
    "Input should be": "must be",
    "Value error, ": "",
}


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


def reword(error: typer.TyperException) -> None:
    """Replace the library's phrases in the message of a wrong command line."""
    message = getattr(error, "message", None)
    if message:
        for theirs, ours in _PHRASES.items():
            message = message.replace(theirs, ours)
        setattr(error, "message", message)  # noqa: B010 - only its subclasses have it


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
