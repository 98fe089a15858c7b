"""Reads a payload in blocks of rows: parses and checks them, and removes duplicates."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.batch_options import BatchOptions, under_options
from outbox_server.shared.intake.duplicates import DuplicateFinder
from outbox_server.shared.intake.payloads import Payload
from outbox_server.shared.intake.rows import (
    Block,
    JobRow,
    ReadingRules,
    RowPlan,
    RowRejection,
    read_blocks,
)
from outbox_server.shared.message_size import MOST_BYTES
from outbox_server.shared.states import DuplicatePolicy
from outbox_server.shared.templates.batch import BatchTemplate, decode_variables
from outbox_server.shared.templates.checking import RowFailure, is_proven, local_failures

# The maximum number of bytes of a mail that one character of a row becomes: four in UTF-8 or five
# when escaped, each of which quoted-printable may write as three.
_MOST_GROWTH = 3 * MOST_BYTES
# Failures whose text begins with the field of the template.
_OF_A_TEMPLATE = ("TEMPLATE_RENDER_FAILED", "TEMPLATE_LIMIT")


class RowRenderer(Protocol):
    """Renders rows somewhere else."""

    def failures(
        self, names: Sequence[str], rows: Sequence[str | None], max_bytes: int
    ) -> dict[int, RowFailure]:
        """Return the failures by the index of the row. `names` are those of the rows' values."""

    def close(self) -> None:
        """Make a thread that waits for a result fail at once."""


class ReadBlock(NamedTuple):
    """Consecutive rows, without duplicates. `duplicates` is the number of rows left out."""

    rows: list[JobRow]
    rejections: list[RowRejection]
    duplicates: int


class BlockReader:
    """Reads the blocks of one payload. Calls may come from any thread, but only one at a time."""

    def __init__(
        self,
        payload: Payload,
        options: BatchOptions,
        max_message_bytes: int,
        *,
        special_domains: bool = True,
    ) -> None:
        """Read `payload`. `special_domains` accepts addresses such as `ann@corp.local`."""
        self._payload = payload
        self._options = options
        self._max_message_bytes = max_message_bytes
        self._rules = ReadingRules(
            options.time_zone,
            options.email_column,
            options.skip_lines,
            special_domains,
            options.name_column,
            options.external_id_column,
            options.label_columns,
        )
        self._email_column = ""
        self._template: BatchTemplate | None = None
        self._renderer: RowRenderer | None = None
        self._names: tuple[str, ...] = ()
        self._blocks = self._read()
        payload.hash_first(options.canonical())

    @property
    def waits(self) -> bool:
        """Whether reading may wait for the caller."""
        return self._payload.arrives

    @property
    def variable_names(self) -> tuple[str, ...]:
        """The names of the values in `JobRow.variables`, in order. Known after the first block."""
        return self._names

    @property
    def email_column(self) -> str:
        """The column of the addresses, as the CSV calls it. Known after the first block."""
        return self._email_column

    def use(self, template: BatchTemplate, renderer: RowRenderer) -> None:
        """Use a template that was parsed elsewhere, and render it elsewhere.

        Otherwise the first block parses it, and each block renders it in its thread.
        """
        self._template = template
        self._renderer = renderer

    def next(self) -> ReadBlock | None:
        """Return the next block, or None after the last.

        Raises:
            InvalidInput: a template does not parse, or the payload is not a valid CSV.
        """
        return next(self._blocks, None)

    def drain(self) -> bytes:
        """Read the rest of the payload, and return the digest of options and payload."""
        self._payload.drain()
        return self._payload.digest()

    def digest(self) -> bytes:
        """Return the digest of options and payload. Valid only right after the last block."""
        return self._payload.digest()

    def interrupt(self) -> None:
        """Make a call fail that waits in another thread, for the caller's data or a rendering."""
        self._payload.close()
        if self._renderer is not None:
            self._renderer.close()

    def close(self) -> None:
        """Free the resources of the reader."""
        self._blocks.close()

    def _read(self) -> Generator[ReadBlock, None, None]:
        options = self._options
        template = self._template
        if template is None:
            try:
                template = BatchTemplate.compile(
                    options.subject, options.body, options.html, options.head
                )
            except InvalidInput as error:
                raise under_options(error) from None
        opened = self._payload.open(template, self._rules)
        self._names = opened.variable_names
        self._email_column = opened.email_column
        plan = _SizeLimitedPlan(
            opened.plan,
            limit=self._max_message_bytes,
            room=self._max_message_bytes - options.template_bytes,
            template=template,
            names=opened.variable_names,
        )
        keep_first = options.duplicates is DuplicatePolicy.KEEP_FIRST
        with DuplicateFinder() if keep_first else nullcontext() as finder:
            for block in read_blocks(opened.rows, plan):
                rows, rejections = self._render(template, block)
                kept = rows if finder is None else _without_duplicates(rows, finder)
                yield ReadBlock(kept, rejections, len(rows) - len(kept))

    def _render(self, template: BatchTemplate, block: Block) -> Block:
        """Reject the rows that a template cannot render.

        This comes before duplicates are removed: the first row that can be sent is kept.
        """
        rows, rejections = block
        if not rows or not template.may_fail:
            return block
        most = self._max_message_bytes
        doubtful = [
            index
            for index, row in enumerate(rows)
            if not is_proven(template, self._names, row.variables, most)
        ]
        if not doubtful:
            return block
        values = [rows[index].variables for index in doubtful]
        if self._renderer is None:
            failures = local_failures(template, self._names, values, most)
        else:
            failures = self._renderer.failures(self._names, values, most)
        found = {doubtful[place]: failure for place, failure in failures.items()}
        if not found:
            return block
        failed = [_rejection(rows[index], found[index]) for index in sorted(found)]
        kept = [row for index, row in enumerate(rows) if index not in found]
        return Block(kept, sorted([*rejections, *failed], key=lambda one: one.row_number))


def _rejection(row: JobRow, failure: RowFailure) -> RowRejection:
    # The path of the template in the request.
    path = "in options." if failure.reason in _OF_A_TEMPLATE else ""
    return RowRejection(row.row_number, failure.column, failure.reason, f"{path}{failure.message}")


def _without_duplicates(rows: list[JobRow], finder: DuplicateFinder) -> list[JobRow]:
    marks = finder.new_in_block([row.address_key for row in rows])
    if all(marks):
        return rows
    return [row for row, new in zip(rows, marks, strict=True) if new]


class _SizeLimitedPlan:
    """A plan that also rejects rows whose mail would certainly be too large.

    It rejects a row that has more bytes than the limit together with the templates, and a row whose
    mail has a lower bound above the limit: a template may use a column many times, and encoding
    makes it longer. Only long rows are checked. The dispatcher measures each mail that it builds.
    """

    def __init__(
        self,
        plan: RowPlan[Any],
        *,
        limit: int,
        room: int,
        template: BatchTemplate,
        names: tuple[str, ...],
    ) -> None:
        self._read = plan.read
        self._limit = limit
        self._room = room
        self._template = template
        self._names = names
        # A row of fewer characters fits, whatever the characters are and however the template uses
        # them.
        self._safe = room // (_MOST_GROWTH * template.most_uses)

    def read(self, number: int, raw: Any) -> JobRow | RowRejection:
        row = self._read(number, raw)
        if (
            isinstance(row, JobRow)
            and len(row.variables or "") > self._safe
            and self._too_large(row.variables)
        ):
            return RowRejection(
                number,
                "",
                "MESSAGE_TOO_LARGE",
                "the mail for this row would be larger than the operator's limit "
                "(OUTBOX_MAX_MESSAGE_BYTES)",
            )
        return row

    def _too_large(self, variables: str | None) -> bool:
        return (
            len((variables or "").encode()) > self._room
            or self._template.least_size(decode_variables(self._names, variables)) > self._limit
        )
