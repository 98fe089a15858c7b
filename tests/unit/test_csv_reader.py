from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.bounds import MAX_CELLS
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.csv_reader import CsvTable, read_csv

HEADER = "email,name\n"


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def table(data: str | bytes, size: int = 7) -> CsvTable:
    return read_csv(cut(data.encode() if isinstance(data, str) else data, size))


def rows(data: str | bytes, size: int = 7) -> list[tuple[int, list[str]]]:
    return list(table(data, size).rows())


def refusal(data: str | bytes, size: int = 7) -> InvalidInput:
    errors = []
    # The error does not depend on where the chunks end.
    for chunk_size in {size, 1, 2, 65536}:
        with pytest.raises(InvalidInput) as caught:
            rows(data, chunk_size)
        errors.append(caught.value)
    assert len({error.message for error in errors}) == 1
    return errors[0]


def test_rows_are_returned_with_their_numbers_and_cells() -> None:
    opened = table("Email,First Name\na@b.de,Ann\nc@d.de,\n")
    assert opened.columns == ("Email", "First Name")
    assert opened.names == ("email", "first_name")
    assert opened.email_index == 0
    assert list(opened.rows()) == [(1, ["a@b.de", "Ann"]), (2, ["c@d.de", ""])]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_csv_dialects_of_all_spreadsheets_are_read(separator: str, end: str, encoding: str) -> None:
    text = end.join(
        [
            separator.join(["email", "Größe, x; y | z" if separator == "\t" else "Größe"]),
            separator.join(["ann@example.com", f'"one{end}two ""x"" {separator} 🎉"']),
            "",
            separator.join(["bob@example.com", "名"]),
        ]
    )
    for last_end in ("", end):
        data = (text + last_end).encode(encoding)
        if encoding == "utf-16-be":
            data = b"\xfe\xff" + data
        for size in (1, 2, 3, 65536):
            assert rows(data, size) == [
                (1, ["ann@example.com", f'one{end}two "x" {separator} 🎉']),
                (3, ["bob@example.com", "名"]),
            ]


CELLS = st.text(alphabet='a,;|"\t\r\n é🎉', max_size=6)


@given(
    body=st.lists(st.lists(CELLS, min_size=2, max_size=3), min_size=1, max_size=6),
    # With QUOTE_MINIMAL, Python's writer does not quote the other line end.
    style=st.sampled_from(
        [(csv.QUOTE_MINIMAL, "\r\n"), *((csv.QUOTE_ALL, end) for end in ("\r\n", "\n", "\r"))]
    ),
    size=st.integers(1, 40),
)
@example(body=[["\r", "\n"]], style=(csv.QUOTE_ALL, "\r"), size=1)
def test_rows_written_by_the_csv_module_are_read_unchanged(
    body: list[list[str]], style: tuple[int, str], size: int
) -> None:
    out = io.StringIO(newline="")
    quoting, end = style
    writer = csv.writer(out, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([["email", "x"], *body])
    data = out.getvalue()
    # A row of empty cells is an empty row of a spreadsheet.
    filled = [cells for cells in body if "".join(cells).strip()]
    if filled:
        assert [cells for _, cells in rows(data, size)] == filled
    else:
        assert refusal(data, size).reason == "CSV_NO_ROWS"


def test_a_separator_inside_a_quoted_name_does_not_count() -> None:
    assert table('"name; first, last; x";email\na;b\n').columns == ("name; first, last; x", "email")
    assert table("email;price (a,b,c)\na;b\n").columns == ("email", "price (a,b,c)")
    assert table('"two\nlines";email\na;b\n').columns == ("two\nlines", "email")
    assert table("email\na@b.de\n").columns == ("email",)


def test_the_sep_line_of_excel_is_honoured() -> None:
    assert rows("sep=;\r\nemail;name\r\na,b;c\r\n") == [(1, ["a,b", "c"])]


def test_blank_lines_are_skipped_and_counted() -> None:
    assert rows("\n  \n" + HEADER + "\na,b\n \n\nc,d\n\n") == [(2, ["a", "b"]), (5, ["c", "d"])]


@pytest.mark.parametrize(
    ("header", "index"),
    [
        ("EMAIL,x", 0),
        ("x,E-Mail", 1),
        ("x,Email Address", 1),
        ("x,e-mail address", 1),
        ("Recipient,x", 0),
        ("x, To ", 1),
        ("to,recipient,email", 2),
        ("x,recipient,to", 1),
        ('x,"email"', 1),
    ],
)
def test_the_column_of_the_address_is_found(header: str, index: int) -> None:
    assert table(header + "\n" + "a," * header.count(",") + "a\n").email_index == index


# The other tests have chunks of a few bytes, which split every character and line end.
@pytest.mark.parametrize("size", [64, 1000, 65536])
def test_a_cell_of_200_kb_is_accepted(size: int) -> None:
    cell = 'é "quoted" \r\n' * 15_000
    quoted = cell.replace('"', '""')
    assert rows(f'{HEADER}a@b.de,"{quoted}"\n', size) == [(1, ["a@b.de", cell])]


@pytest.mark.parametrize("data", ["", "\n\r\n", "\ufeff", "\ufeff \n"])
def test_an_empty_file_is_refused(data: str) -> None:
    assert refusal(data).reason == "CSV_EMPTY"


@pytest.mark.parametrize("data", ["email,name", "email,name\n", "email\n\n  \n"])
def test_a_file_with_only_a_header_is_refused(data: str) -> None:
    assert refusal(data).reason == "CSV_NO_ROWS"


def test_the_error_for_a_missing_email_column_names_the_columns() -> None:
    error = refusal("Name,Mail adress\na,b\n")
    assert error.reason == "CSV_NO_EMAIL_COLUMN"
    assert "'Name', 'Mail adress'" in error.message


def test_columns_without_a_name_are_no_variables() -> None:
    assert table("email,,\na,b,c\n").names == ("email", "", "")


def test_bytes_that_are_not_utf8_are_refused_with_their_position() -> None:
    head = "email,name\na@b.de,Ünö\n".encode()
    error = refusal(head + b"c@d.de,J\xf6rg\ne@f.de,x\n")
    assert error.reason == "CSV_NOT_UTF8"
    assert f"row 2: the bytes F6 at byte {len(head) + 8}" in error.message
    assert error.metadata["offset"] == str(len(head) + 8)
    bom = refusal(b"\xef\xbb\xbf" + head + b"c@d.de,J\xf6rg\n")
    assert bom.metadata["offset"] == str(3 + len(head) + 8)
    assert "in the header" in refusal(b"email,na\xffme\na,b\n").message
    assert refusal(head + b"c,\xc3").reason == "CSV_NOT_UTF8"
    half = refusal(head + b"c,\xe2\x82x\n")
    assert f"row 2: the bytes E2 82 at byte {len(head) + 2}" in half.message
    assert refusal(b"\xff\xfe" + "email\na".encode("utf-16-le") + b"\x00").reason == "CSV_NOT_UTF8"


def test_a_nul_is_refused_with_its_position() -> None:
    error = refusal("email,name\na@b.de,é\nc@d.de,x\0y\n")
    assert error.reason == "CSV_NUL"
    assert error.message == "row 2: a NUL character at byte 29"
    assert refusal("email\0\na\n").message == "in the header: a NUL character at byte 5"
    assert refusal("email\na\n\0\n").reason == "CSV_NUL"


def test_a_quote_that_is_never_closed_is_refused_with_its_row() -> None:
    error = refusal('email,name\na,b\nc,"d\ne,f\n')
    assert error.reason == "CSV_UNCLOSED_QUOTE"
    assert error.message.startswith("row 2:")
    assert refusal('email,"name\na,b\n').message.startswith("the header:")
    assert refusal('email,name\na,"').reason == "CSV_UNCLOSED_QUOTE"


def test_an_endless_cell_is_refused_using_little_memory() -> None:
    def endless(start: bytes) -> Iterator[bytes]:
        yield start
        for _ in range(300):
            yield b"x" * 65536
        pytest.fail("it was read to its end")

    for start in (b"email,name\na,", b'email,name\na,"', b"email", b'email,name\na,"\n'):
        with pytest.raises(InvalidInput) as caught:
            list(read_csv(endless(start)).rows())
        assert caught.value.reason == "CSV_CELL_TOO_LONG"


def test_an_endless_row_of_many_lines_is_refused() -> None:
    def endless() -> Iterator[bytes]:
        yield b'email,name\nann@example.com,x\na,"\n'
        for _ in range(600):
            yield b'","\n' * 16384
        pytest.fail("it was read to its end")

    rows = read_csv(endless()).rows()
    assert next(rows) == (1, ["ann@example.com", "x"])
    with pytest.raises(InvalidInput, match=r"^row 2: a cell, a line or a row has more") as caught:
        next(rows)
    assert caught.value.reason == "CSV_CELL_TOO_LONG"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", ""])
@pytest.mark.parametrize("separator", ",;\t|")
def test_a_line_of_too_many_separators_is_refused_before_it_is_split(
    end: str, separator: str
) -> None:
    before = f"email{separator}a\r\nann@example.com{separator}" + "x" * MAX_CELLS + (end or "\n")
    line = "b@example.com" + separator * (MAX_CELLS + 1) + end
    rows = read_csv(iter([f"{before}{line}c@example.com".encode()])).rows()
    assert next(rows)[0] == 1
    with pytest.raises(InvalidInput, match=r"^row 2: a line has more than 1,000,000 sep") as caught:
        next(rows)
    assert caught.value.reason == "CSV_CELL_TOO_LONG"
    # One less is read.
    rows = read_csv(iter([before.encode(), line.replace(separator, "", 1).encode()])).rows()
    assert [len(cells) for _, cells in rows] == [2, MAX_CELLS + 1]


def test_memory_does_not_grow_with_the_file() -> None:
    row = b"someone@example.com," + b"a name that is not short at all " * 5 + b"\n"

    def chunks() -> Iterator[bytes]:
        yield HEADER.encode()
        for _ in range(50):
            yield row * 500

    tracemalloc.start()
    count = sum(1 for _ in read_csv(chunks()).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 25_000
    assert peak < len(row) * count / 4


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("email," + ",".join(f"c{n}" for n in range(1_000)), "at most 1,000 columns (got 1,001)"),
        ("email," + "a" * 257, "at most 256 characters (got 257)"),
        # Normalising this name takes time by the square of its length: 8 s.
        ("email,a" + "\u0301\u0316" * 25_000, "at most 256 characters (got 50,001)"),
        ("email," + ("b" * 100 + ",") * 2_600, "at most 262,144 characters"),
    ],
)
def test_a_header_that_is_too_long_is_refused_before_its_names_are_normalised(
    header: str, said: str
) -> None:
    error = refusal(f"{header}\na@b.org\n", 1000)
    assert error.reason == "CSV_HEADER_TOO_LONG"
    assert said in error.message
    assert len(error.message) < 300


def test_a_spreadsheet_with_very_many_nameless_columns_is_read() -> None:
    table = read_csv(iter([f"email{',' * 16_384}\na@b.org{',' * 16_384}\n".encode()]))
    assert [number for number, _ in table.rows()] == [1]
