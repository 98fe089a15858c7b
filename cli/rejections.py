"""The rows that were not accepted, as a CSV that one can mend and send again."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Final, TextIO

from outbox.v1.batch_pb2 import Rejection

from services.scheduler.csv_reader import CsvTable

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
