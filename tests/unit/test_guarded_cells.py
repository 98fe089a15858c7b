"""Guards of CSV cells: spreadsheets see no formula, and an import gets the exact text back."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.intake.guarded_cells import guarded, spreadsheet_text, unguarded


@example("- ")
@given(st.text(st.sampled_from("'=+-@ax1. \u00a0\n\uff1d")) | st.text())
def test_a_guard_is_removed_exactly(text: str) -> None:
    assert unguarded(guarded(text)) == text
    assert not guarded(text).startswith(("=", "@", "\uff1d"))


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("=x@example.com", "'=x@example.com"),
        ("-bounced", "'-bounced"),
        ("'=x", "''=x"),
        ("'-5", "''-5"),
        ("-5", "-5"),
        ("+x@b.org", "+x@b.org"),
        ("'tis", "'tis"),
        ("O'Neil", "O'Neil"),
    ],
)
def test_only_ambiguous_cells_get_a_guard(cell: str, shown: str) -> None:
    assert guarded(cell) == shown


def test_a_cell_without_a_guard_loses_the_spaces_around_it() -> None:
    assert unguarded(" moved ") == "moved"
    assert unguarded("'moved'") == "'moved'"
    assert spreadsheet_text(" moved ") == " moved "
