"""The CSV of rejected rows, as a spreadsheet opens it."""

from __future__ import annotations

import csv
import io

import pytest
from outbox.v1.batch_pb2 import Rejection

from outbox_server.cli.rejections import write_again


def written(cell: str) -> list[list[str]]:
    source = io.StringIO()
    csv.writer(source).writerows([["email", cell], ["nobody", cell, cell]])
    target = io.BytesIO()
    rejection = Rejection(row_number=1, column="email", reason="ADDRESS_INVALID", message=cell)
    write_again(io.BytesIO(source.getvalue().encode()), iter([rejection]), target)
    return list(csv.reader(io.StringIO(target.getvalue().decode())))


@pytest.mark.parametrize(
    "cell",
    [
        "=1+1",
        '=HYPERLINK("http://evil.example")',
        "+cmd|' /C calc'!A0",
        "-2+3+cmd|' /C calc'!A0",
        "@SUM(1+1)*cmd|' /C calc'!A0",
        "\t=1+1",
        "\uff1d1+1",
        "-1+x",
    ],
)
def test_no_cell_is_a_formula(cell: str) -> None:
    header, row = written(cell)
    assert header[1] == f"'{cell.strip()}"
    # The column, the message, and the cell beyond the header.
    assert [row[1], row[5], row[6]] == [f"'{cell}"] * 3


@pytest.mark.parametrize(
    "cell", ["+49 (30) 1234-56", "-5", "-1.5", "+ann@example.com", "-", "Ann = Ben", "'=1", ""]
)
def test_a_harmless_cell_stays_as_it_is(cell: str) -> None:
    _, row = written(cell)
    assert [row[1], row[6]] == [cell] * 2
