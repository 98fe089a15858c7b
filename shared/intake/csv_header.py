"""Finds out where the header of a CSV ends and which character separates its cells. Pure."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Final

from outbox_server.shared.bounds import MAX_COLUMN_NAME, MAX_COLUMNS
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.address_column import find_email_column
from outbox_server.shared.templates.batch import variable_name

# The rest of a quoted cell, up to its closing quote. A doubled quote is a character of the cell.
_REST_OF_QUOTED: Final = re.compile(r'[^"]*+(?:""[^"]*+)*+')


class HeaderCandidate:
    """The header as one of the possible separators would split it."""

    def __init__(self, separator: str) -> None:
        self.separator = separator
        self.cells: list[str] = []
        self.has_ended = False
        # How many cells have a quote that no other one closes, such as `Size (")`.
        self.odd_cells = 0
        self._lines: list[str] = []
        self._quoted = False
        self._has_address: bool | None = None

    def add(self, line: str) -> None:
        """Add the next line, unless the header has ended."""
        if self.has_ended:
            return
        self._lines.append(line)
        self._quoted = _ends_quoted(line, self.separator, quoted=self._quoted)
        if not self._quoted:
            self.has_ended = True
            self.cells = next(csv.reader(self._lines, delimiter=self.separator))
            self.odd_cells = sum(cell.count('"') % 2 for cell in self.cells)

    def has_address_column(self, email_column: str) -> bool:
        """Return whether one of the cells names the column of the addresses."""
        if self._has_address is None:
            self._has_address = _names_addresses(self.cells, email_column)
        return self._has_address


def choose(candidates: Sequence[HeaderCandidate], email_column: str) -> HeaderCandidate | None:
    """Return the best candidate, or None if the next line may decide.

    It is the one with the most cells among those that have an address column. Without one, it is
    the one with the most cells.
    """
    ended = [each for each in candidates if each.has_ended]
    found = [each for each in ended if each.has_address_column(email_column)]
    best = min(found or ended, key=lambda each: (each.odd_cells, -len(each.cells)), default=None)
    if best is None or len(ended) == len(candidates) or (found and not best.odd_cells):
        return best
    return None


def _names_addresses(cells: Sequence[str], email_column: str) -> bool:
    # A longer cell is refused later.
    columns = [cell.strip() for cell in cells if len(cell) <= MAX_COLUMN_NAME][:MAX_COLUMNS]
    try:
        names = [variable_name(column) for column in columns]
        return find_email_column(columns, names, email_column) is not None
    except InvalidInput:
        # Two columns name the addresses.
        return True


def _ends_quoted(line: str, separator: str, *, quoted: bool) -> bool:
    """Return whether a quoted cell is open at the end of `line`; `quoted`: also at its beginning.

    As for the csv module, a quote opens a cell only as its first character.
    """
    at = 0
    if not quoted and line.startswith('"'):
        quoted, at = True, 1
    while True:
        if quoted:
            rest = _REST_OF_QUOTED.match(line, at)
            at = rest.end() if rest else at
            if at >= len(line):
                return True
        end = line.find(separator, at)
        if end < 0:
            return False
        at = end + 1
        quoted = line.startswith('"', at)
        at += quoted
