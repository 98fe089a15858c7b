"""Keeps mail out of the log: addresses, texts of mail servers, and values in error messages."""

from __future__ import annotations

import re
import traceback
from collections.abc import MutableMapping
from typing import Any, Final

_ADDRESS_MARK: Final = "[address]"
# An address, or the user and host of a URL, which is not an address. The bounds limit the time that
# a long line takes; no address is longer.
_ADDRESS: Final = re.compile(
    r"://[^\s\"'/?#]*|[^\s<>\"'@,;:()\[\]/\\=]{1,320}@[^\s<>\"'@,;:()\[\]/\\]{1,320}"
)
# Fields with a text of a mail server. It may quote the mail.
_QUOTING_FIELDS: Final = ("reply",)
# PostgreSQL adds the values of a row in further lines of its messages.
_MAX_MESSAGE: Final = 200
_MOST_ERRORS: Final = 20


def hide_server_texts(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Remove the fields that have a text of a mail server."""
    for name in _QUOTING_FIELDS:
        event.pop(name, None)
    return event


def hide_addresses(_logger: object, _method: str, line: Any) -> str:
    """Hide every mail address in the rendered `line`."""
    text = str(line)
    return _ADDRESS.sub(_hidden, text) if "@" in text else text


def _hidden(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith("://") else _ADDRESS_MARK


def brief_trace(exc_info: tuple[type[BaseException], BaseException, Any]) -> str:
    """Return the trace of an error with only the first line of each message, shortened."""
    lines: list[str] = []
    _add_trace(exc_info[1], lines, set())
    return "\n".join(lines)


def _add_trace(error: BaseException, lines: list[str], seen: set[int]) -> None:
    if id(error) in seen or len(seen) >= _MOST_ERRORS:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        _add_trace(before, lines, seen)
        lines.append("then:")
    if error.__traceback__ is not None:
        lines.append("Traceback (most recent call last):")
        lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    kind = type(error)
    message = next(iter(str(error).splitlines()), "")[:_MAX_MESSAGE]
    lines.append(f"{kind.__module__}.{kind.__qualname__}: {message}")
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            _add_trace(member, lines, seen)
