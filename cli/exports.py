"""Writes the items of an export to stdout, as CSV or JSON lines."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import chain, islice
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from outbox_server.cli.output import print_json_line, to_document, value_at
from outbox_server.shared.bounds import control_in
from outbox_server.shared.intake.guarded_cells import guarded


class ExportFormat(StrEnum):
    """The format of an export."""

    CSV = "csv"
    JSON = "json"


ExportOutput = Annotated[
    ExportFormat,
    typer.Option("--output", "-o", help="csv, or json: one JSON document per line."),
]


def write_export(items: Iterable[Message], columns: Sequence[str], output: ExportFormat) -> int:
    """Write the items as they arrive, and return their number.

    `columns` are paths in the items, as in tables. A cell that a spreadsheet would take for a
    formula gets a `'` in front, which an import removes.
    """
    count = 0
    if output is ExportFormat.JSON:
        for item in items:
            print_json_line(to_document(item))
            count += 1
        return count
    items = iter(items)
    # Read first: a refused call prints no header.
    first = list(islice(items, 1))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([path.rpartition(".")[2] for path in columns])
    for item in chain(first, items):
        writer.writerow([guarded(_cell(item, path)) for path in columns])
        count += 1
    sys.stdout.flush()
    return count


def _cell(item: Message, path: str) -> str:
    """Return a cell. A text goes into a file or a pipe as it is, unless it has control characters.

    On a terminal, invisible characters are escaped as well.
    """
    value: Any = item
    for name in path.split("."):
        value = getattr(value, name)
    exact = isinstance(value, str) and not sys.stdout.isatty() and not control_in(value)
    return value if exact else value_at(item, path)
