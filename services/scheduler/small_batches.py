"""Reads a small batch at once, in the event loop, if nothing about it is unusual.

All others are left to `Intake.accept`, which reports errors in a fixed order: batches with a row
that is rejected, with a template that a worker must parse or render first, and spread batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.addresses import keys_of
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.blocks import BlockReader
from outbox_server.shared.intake.payloads import Payload
from outbox_server.shared.intake.rows import JobRow
from outbox_server.shared.templates.batch import BatchTemplate
from outbox_server.shared.templates.checking import RowFailure

# A batch that is read in the event loop has at most this many rows, and its request this many
# bytes. It takes 2 ms.
MOST_SMALL_ROWS: Final = 100
MOST_SMALL_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class SmallBatch:
    """A batch whose rows are all accepted, unless they are suppressed."""

    options: BatchOptions
    rows: Sequence[JobRow]
    # The exact and the folded key of each row's address.
    keys: Sequence[tuple[str, str]]
    duplicates: int
    variable_names: Sequence[str]
    email_column: str
    digest: bytes


class _NotProvenError(Exception):
    """Only a worker can tell whether a row can be rendered."""


class _NoRenderer:
    """Renders nothing, because that may take long."""

    def failures(
        self,
        names: Sequence[str],
        rows: Sequence[str | None],
        max_bytes: int,
    ) -> dict[int, RowFailure]:
        del names, rows, max_bytes
        raise _NotProvenError

    def close(self) -> None:
        """Do nothing: nothing waits."""


def read_small(
    options: BatchOptions,
    payload: Payload,
    template: BatchTemplate,
    max_message_bytes: int,
    *,
    special_domains: bool,
) -> SmallBatch | None:
    """Return the batch; None if it is unusual (see above). The payload must be small."""
    if options.spread_until is not None:
        return None
    reader = BlockReader(payload, options, max_message_bytes, special_domains=special_domains)
    reader.use(template, _NoRenderer())
    with closing(reader):
        try:
            block = reader.next()
            if block is None or block.rejections or reader.next() is not None:
                return None
        except (InvalidInput, _NotProvenError):
            return None
        return SmallBatch(
            options,
            block.rows,
            [keys_of(row.recipient) for row in block.rows],
            block.duplicates,
            reader.variable_names,
            reader.email_column,
            reader.digest(),
        )
