"""Guards cells of a CSV that a spreadsheet would take for a formula, and removes the guard. Pure.

A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula, which can call
programs and servers (OWASP, CSV Injection). A `'` in front makes it a text.
"""

from __future__ import annotations

import re
from typing import Final

# The full-width forms of the characters count as well.
_SIGNS: Final = r"=+\-@\t\r\uff1d\uff0b\uff0d\uff20"
_FORMULA: Final = re.compile(rf"[{_SIGNS}]")
# These begin like a formula, but are numbers and addresses: `+49 30 1234`, `-5`, `+x@b.org`.
_HARMLESS: Final = re.compile(r"[+-][0-9 ().,/-]*|[+-][\w.+-]*@[\w.-]+", re.ASCII)
# Cells that would be read differently without a guard: a formula, a text that begins like a guard,
# and spaces at the beginning or end.
_AMBIGUOUS: Final = re.compile(rf"'*[{_SIGNS}\s]|.*\s\Z", re.DOTALL)


def spreadsheet_text(cell: str) -> str:
    """Return the cell in a form that spreadsheets take for a text."""
    formula = _FORMULA.match(cell) and not _HARMLESS.fullmatch(cell)
    return f"'{cell}" if formula else cell


def guarded(cell: str) -> str:
    """Return the cell as `spreadsheet_text` does, but so that `unguarded` returns it exactly."""
    is_plain = _HARMLESS.fullmatch(cell) and cell == cell.strip()
    return f"'{cell}" if _AMBIGUOUS.match(cell) and not is_plain else cell


def unguarded(cell: str) -> str:
    """Return the cell without its guard, or without the spaces around it if it has none."""
    if cell.startswith("'") and _AMBIGUOUS.match(cell, 1):
        return cell[1:]
    return cell.strip()
