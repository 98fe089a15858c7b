"""Puts errors into the words of the command line: flags and arguments instead of fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

# Paths of fields. Only below these messages, because a host or a file may look like a path.
_PATH: Final = re.compile(
    r"\b(?:planned_batch\.)?(?:options|batch|sender|suppression|user|webhook)(?:\.[a-z][a-z0-9_]*(?:\[\d+\])?)+"
    # The errors of a CSV also name it without a path.
    r"|\bemail_column\b(?!:)"
)
_ROW: Final = re.compile(r"\brows\[(\d+)\](?:\.(\w+))?")
# Ids that an error names without a path.
_ID: Final = re.compile(r"\b(?:request|sender|user|batch)_id\b(?= ')")


# The names of the options and arguments of the running command, as people write them. The key is
# the flag that the option has, or that the argument would have.
_running: Final[ContextVar[Mapping[str, str]]] = ContextVar("running", default={})  # noqa: B039


def remember_flags(command: Any, words: Sequence[str]) -> None:
    """Keep the flags of the command that runs: of `command`, or the one in it that `words` name."""
    for word in words:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command = inner
    names = {flag: flag for each in command.params for flag in each.opts if flag.startswith("--")}
    for each in command.params:
        if each.param_type_name == "argument":
            flag = f"--{each.name.replace('_', '-')}"
            names.setdefault(flag, (each.metavar or each.name.upper()).strip("[]."))
    _running.set(names)


def in_flags(text: str, fields: Iterable[str] = ()) -> str:
    """Return `text` with the flags of the running command in place of fields.

    `fields` are the fields that the error is about. A field without a flag stays as it is.
    """
    flags = _running.get()
    for field in sorted(fields, key=len, reverse=True):
        flag = _flag_of(field, flags)
        if flag:
            text = re.sub(rf"(?<![\w.]){re.escape(field)}(?=:| )", flag, text)
    text = _PATH.sub(lambda found: _flag_of(found[0], flags) or found[0], text)
    text = _ID.sub(lambda found: _flag_of(found[0], flags) or found[0], text)
    return _ROW.sub(_row, text)


def _row(found: re.Match[str]) -> str:
    return f"row {found[1]}, column {found[2]}" if found[2] else f"row {found[1]}"


def _flag_of(path: str, flags: Mapping[str, str]) -> str:
    """Return the flag of a field, or an empty text: `sender.smtp.host` may be `--smtp-host`."""
    # A list has the flag of one entry: `options.headers[0].value` is `--header`.
    parts = path.partition("[")[0].split(".")
    for start in range(len(parts)):
        name = "-".join(parts[start:]).replace("_", "-")
        for flag in (f"--{name}", f"--{name.removesuffix('-id')}", f"--{name.removesuffix('s')}"):
            # An id without a path, such as `sender_id '7'`, may be of another thing.
            if flag in flags and (flags[flag] == flag or "." in path):
                return flags[flag]
    return ""
