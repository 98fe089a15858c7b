"""Reads files of rules for SMTP replies. Every mistake is reported with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NoReturn

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.quoting import shortened
from outbox_server.shared.smtp.reply_rules import Rule, RuleReader

BUILT_IN_FILE: Final = "reply_rules.toml"
MAX_FILE_BYTES: Final = 256 * 1024
MAX_RULES: Final = 500
MAX_MESSAGE: Final = 500
_HEADER: Final = re.compile(r"\s*\[\[\s*rule\s*\]\]")
_TOML_POSITION: Final = re.compile(r"\(at line ([0-9]+), column ([0-9]+)\)")


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of one file without those that it switches off, and all names that it uses."""

    rules: tuple[Rule, ...]
    names: frozenset[str]


@cache
def built_in_rules() -> tuple[Rule, ...]:
    """Return the rules that ship with Outbox. They are immutable, and read once."""
    data = files("outbox_server.shared.smtp").joinpath(BUILT_IN_FILE).read_bytes()
    return _RuleFile(BUILT_IN_FILE, data).read(frozenset()).rules


def operator_rules(path: str, built_in: Collection[str]) -> RuleSet:
    """Return the rules of an operator's file. It may switch off the rules named in `built_in`.

    Raises:
        ConfigurationError: the file cannot be read, or is wrong; the message names the line.
    """
    return _RuleFile(path, _bytes_of(path)).read(built_in)


def _bytes_of(path: str) -> bytes:
    file = Path(path)
    try:
        # Opening a pipe would wait for its other end.
        if file.exists() and not file.is_file():
            raise ConfigurationError(f"OUTBOX_REPLY_RULES: {path} is not a regular file")
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"OUTBOX_REPLY_RULES: there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "its name is not valid"
        raise ConfigurationError(f"OUTBOX_REPLY_RULES: cannot read {path}: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigurationError(
            f"OUTBOX_REPLY_RULES: {path} is larger than {MAX_FILE_BYTES:,} bytes"
        )
    return data


class _RuleFile:
    """Reads one TOML file, and reports every mistake with its line."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        try:
            self._content = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._fail(line, "the file must be UTF-8")
        self._lines = self._content.split("\n")
        # The numbers of the lines (from 1) on which rules begin.
        self._headers = [n for n, line in enumerate(self._lines, 1) if _HEADER.match(line)]

    def read(self, built_in: Collection[str]) -> RuleSet:
        tables = self._tables()
        rules: list[Rule] = []
        names: dict[str, int] = {}
        for index, table in enumerate(tables):
            reader = RuleReader(table, partial(self._fail_at, index))
            name = reader.name()
            if name in names:
                reader.fail(
                    "name", f'"{name}" is already the name of the rule in line {names[name]}'
                )
            names[name] = self._headers[index]
            rule = reader.rule(name, known=name in built_in)
            if rule:
                rules.append(rule)
        return RuleSet(tuple(rules), frozenset(names))

    def _tables(self) -> Sequence[Mapping[str, Any]]:
        document = self._document()
        for key in document:
            if key != "rule":
                self._fail(
                    self._line_of(key), f'unknown key "{key}"; each rule begins with [[rule]]'
                )
        tables = document.get("rule", [])
        if (
            not isinstance(tables, list)
            or len(tables) != len(self._headers)
            or not all(isinstance(table, dict) for table in tables)
        ):
            self._fail(
                self._line_of("rule"), "each rule must begin with a line of its own, [[rule]]"
            )
        if len(tables) > MAX_RULES:
            self._fail(self._headers[MAX_RULES], f"there may be at most {MAX_RULES} rules")
        return tables

    def _document(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._content)
        except RecursionError:
            self._fail(1, "lists or tables are nested too deeply")
        except ValueError as error:
            position = _TOML_POSITION.search(str(error))
            if position:
                line, where = int(position[1]), f"column {position[2]}: this"
            else:
                line, where = len(self._content.splitlines()) or 1, "the file, up to its end,"
            self._fail(
                line,
                f"{where} is not valid TOML; each rule is a line [[rule]] followed by lines such "
                'as name = "our-relay-is-full"',
            )

    def _line_of(self, key: str) -> int:
        """Return the number of the first line that sets this key or opens this table; else 1."""
        sets = re.compile(rf"\s*+\[{{0,2}}\s*+[\"']?{re.escape(key)}[\"']?\s*+[=.\]]")
        return next((n for n, line in enumerate(self._lines, 1) if sets.match(line)), 1)

    def _fail_at(self, index: int, key: str, text: str) -> NoReturn:
        """Report a mistake in a key of the rule with this index."""
        first = self._headers[index]
        end = self._headers[index + 1] if index + 1 < len(self._headers) else len(self._lines) + 1
        sets = re.compile(rf"\s*+[\"']?{re.escape(key)}[\"']?\s*+[=.]")
        line = next(
            (n for n in range(first + 1, end) if key and sets.match(self._lines[n - 1])), first
        )
        self._fail(line, f"{key}: {text}" if key else text)

    def _fail(self, line: int, text: str) -> NoReturn:
        raise ConfigurationError(
            f"OUTBOX_REPLY_RULES: {self._path}, line {line}: {shortened(text, MAX_MESSAGE)}"
        )
