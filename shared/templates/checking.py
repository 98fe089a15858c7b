"""Finds the rows that a batch's templates cannot render, before the batch is accepted.

A template that only inserts columns can be rendered with every row: `shared.intake.row_checks`
checks its subject, and `shared.intake.blocks` its size. Every other template is rendered with each
row for which it is not proven that this succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from outbox_server.shared.bounds import MAX_SUBJECT_BYTES
from outbox_server.shared.templates.batch import (
    LINE_BREAK,
    BatchTemplate,
    RenderError,
    decode_variables,
)
from outbox_server.shared.templates.comparing import number_of

# A subject with a longer cell may become too long.
SHORT_CELL = 100
# Limits of the proof that a row can be rendered.
# The maximum number of characters of a row.
_SHORT_ROW: Final = 64 * 1024
# The work of one filter, and the most work of a template, both counted in characters.
_FILTER_COST: Final = 64
_LITTLE_WORK: Final = 1024 * 1024
# The maximum number of bytes that one character may become: four in UTF-8, and six characters when
# escaped.
_MOST_GROWTH: Final = 24


class RowFailure(NamedTuple):
    """Why a row cannot be rendered. `column` is empty if it is not known."""

    column: str
    reason: str
    message: str


def is_proven(
    template: BatchTemplate, names: Sequence[str], variables: str | None, max_bytes: int
) -> bool:
    """Return whether it is certain, without rendering it, that a row can be rendered."""
    length = len(variables or "")
    if not template.proofs or length > _SHORT_ROW:
        return False
    values = decode_variables(names, variables)
    most = 0
    for proof in template.proofs:
        for name in proof.numbers:
            if name in values and number_of(values[name]) is None:
                return False
        most += proof.size + proof.uses * length
        if proof.uses * (length + _FILTER_COST) > _LITTLE_WORK:
            return False
    for source in template.plain_sources:
        most += source.own_bytes + sum(times for _, times in source.uses) * length
    if most * _MOST_GROWTH > max_bytes:
        return False
    return not template.subject_is_liquid or _is_short_subject(template, values)


def _is_short_subject(template: BatchTemplate, values: Mapping[str, str]) -> bool:
    proof = template.subject_proof
    cells = "".join(values.get(name, "") for name in template.subject_names)
    if proof is None or LINE_BREAK.search(cells):
        return False
    growth = 1 if cells.isascii() else _MOST_GROWTH
    return proof.size + proof.uses * len(cells) * growth <= MAX_SUBJECT_BYTES


def failure_of(
    template: BatchTemplate, names: Sequence[str], variables: str | None, max_bytes: int
) -> RowFailure | None:
    """Return why the row cannot be rendered, or None. The templates may be Liquid."""
    values = decode_variables(names, variables)
    try:
        template.render(values, max_bytes)
    except RenderError as error:
        column = error.column
        if error.reason.startswith("SUBJECT_"):
            column = doubtful_column(template, names, [values.get(name) for name in names])
        return RowFailure(column or "", error.reason, error.message)
    return None


def doubtful_column(
    template: BatchTemplate, names: Sequence[str], values: Sequence[str | None]
) -> str:
    """Return the first column that may make the subject invalid: it is long, or has a line break.

    If there is none, the template itself makes the subject invalid.
    """
    for name, value in zip(names, values, strict=True):
        if (
            value
            and name in template.subject_names
            and (len(value) > SHORT_CELL or LINE_BREAK.search(value))
        ):
            return name
    return "subject"


def local_failures(
    template: BatchTemplate, names: Sequence[str], rows: Sequence[str | None], max_bytes: int
) -> dict[int, RowFailure]:
    """Render rows in this process. Return the failures by the index of the row."""
    found = {}
    for index, variables in enumerate(rows):
        failure = failure_of(template, names, variables, max_bytes)
        if failure is not None:
            found[index] = failure
    return found
