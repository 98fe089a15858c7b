"""The rows that were not accepted, as a CSV that one can mend and send again."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, TextIO

from outbox.v1.batch_pb2 import Rejection

from outbox_server.cli.lazy import CommandFailed
from outbox_server.services.scheduler.csv_reader import CsvTable, read_csv

_READ_BYTES: Final = 64 * 1024
# After the columns of the CSV. Templates need not know them, so they may stay in what is sent.
ADDED: Final = ("rejected_row", "rejected_column", "rejected_reason", "rejected_message")


def write_rejections(table: CsvTable, rejections: Iterator[Rejection], target: TextIO) -> int:
    """Write the rejected rows of `table`, which is read once more, and return how many they are.

    All its columns, with its separator; what an earlier mending added is replaced. `rejections` are
    in the order of the rows. A row with more cells than the header keeps them at its end.
    """
    writer = csv.writer(target, delimiter=table.separator)
    kept = [index for index, name in enumerate(table.names) if name not in ADDED]
    writer.writerow([*(table.columns[index] for index in kept), *ADDED])
    width, written = len(table.columns), 0
    rejection = next(rejections, None)
    for number, cells in table.rows():
        if rejection is None:
            break
        if number != rejection.row_number:
            continue
        padded = cells + [""] * (width - len(cells))
        why = (number, rejection.column, rejection.reason, rejection.message)
        writer.writerow([*(padded[index] for index in kept), *why, *padded[width:]])
        written += 1
        rejection = next(rejections, None)
    return written


@contextmanager
def new_file(path: Path | None) -> Iterator[BinaryIO | None]:
    """Make the file before anything is sent; gone again if nothing is written to it."""
    if path is None:
        yield None
        return
    try:
        target = path.open("xb")
    except FileExistsError:
        raise CommandFailed(f"--rejections: {path} is there already: name a new file") from None
    except OSError as error:
        raise CommandFailed(f"--rejections: {path} cannot be made: {error.strerror}") from None
    try:
        with target:
            yield target
    finally:
        if not path.stat().st_size:
            path.unlink()


def write_again(source: BinaryIO, rejections: Iterable[Rejection], target: BinaryIO) -> None:
    """Write the rejected rows of a CSV that was read once; `source` can be read again."""
    source.seek(0)
    if source.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        target.write(codecs.BOM_UTF8)  # Excel takes a CSV without it for another encoding
    source.seek(0)
    text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
    table = read_csv(iter(lambda: source.read(_READ_BYTES), b""))
    write_rejections(table, iter(rejections), text)
    text.detach()
