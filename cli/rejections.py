"""Writes the rejected rows as a CSV that the user can fix and schedule again."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, TextIO

from outbox.v1.batch_pb2 import Rejection

from outbox_server.cli.flags import in_flags
from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.intake.csv_reader import CsvTable, read_csv
from outbox_server.shared.intake.guarded_cells import spreadsheet_text

_READ_BYTES: Final = 64 * 1024
# Added after the columns of the CSV. Templates ignore them, so the user need not remove them.
ADDED_COLUMNS: Final = ("rejected_row", "rejected_column", "rejected_reason", "rejected_message")


def write_rejections(table: CsvTable, rejections: Iterator[Rejection], target: TextIO) -> int:
    """Write the rejected rows of `table`, which is read once more, and return their number.

    They keep all columns and the separator. Columns added by an earlier run are replaced.
    `rejections` are in row order. A row with more cells than the header keeps them at its end.
    A cell that a spreadsheet would take for a formula gets a `'` in front.
    """
    writer = csv.writer(target, delimiter=table.separator)
    kept = [index for index, name in enumerate(table.names) if name not in ADDED_COLUMNS]
    writer.writerow([*(spreadsheet_text(table.columns[index]) for index in kept), *ADDED_COLUMNS])
    width, written = len(table.columns), 0
    rejection = next(rejections, None)
    for number, cells in table.rows():
        if rejection is None:
            break
        if number != rejection.row_number:
            continue
        padded = cells + [""] * (width - len(cells))
        said = in_flags(rejection.message)
        why = (str(number), rejection.column, rejection.reason, said)
        written_again = (*(padded[index] for index in kept), *why, *padded[width:])
        writer.writerow([spreadsheet_text(cell) for cell in written_again])
        written += 1
        rejection = next(rejections, None)
    return written


@contextmanager
def new_file(path: Path | None) -> Iterator[BinaryIO | None]:
    """Create the file before anything is sent, and remove it if it stays empty."""
    if path is None:
        yield None
        return
    try:
        target = path.open("xb")
    except FileExistsError:
        raise CommandFailed(f"--rejections: {path} exists already; choose a new file") from None
    except OSError as error:
        raise CommandFailed(f"--rejections: {path} cannot be created: {error.strerror}") from None
    try:
        with target:
            yield target
    finally:
        if not path.stat().st_size:
            path.unlink()


def write_again(
    source: BinaryIO,
    rejections: Iterable[Rejection],
    target: BinaryIO,
    *,
    email_column: str = "",
    skip_lines: int = 0,
) -> None:
    """Write the rejected rows of a CSV that has been read once. `source` must be seekable.

    The lines before the header are left out. The options are those with which it was read.
    """
    source.seek(0)
    if source.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        target.write(codecs.BOM_UTF8)  # Without it, Excel assumes another encoding.
    source.seek(0)
    text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
    chunks = iter(lambda: source.read(_READ_BYTES), b"")
    table = read_csv(chunks, email_column, skip_lines)
    write_rejections(table, iter(rejections), text)
    text.detach()
