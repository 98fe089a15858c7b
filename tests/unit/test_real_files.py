"""CSV files as other programs write them: headers, empty rows, ends of files, unused columns."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.address_column import find_email_column
from outbox_server.shared.intake.batch_options import BatchOptions, check_options
from outbox_server.shared.intake.blocks import BlockReader, ReadBlock
from outbox_server.shared.intake.csv_reader import CsvTable, read_csv
from outbox_server.shared.intake.payloads import CsvPayload, RowsPayload, WholeFile
from outbox_server.shared.intake.rows import JobRow
from outbox_server.shared.templates.batch import variable_name


def table(data: str | bytes, email_column: str = "", skip_lines: int = 0) -> CsvTable:
    raw = data.encode() if isinstance(data, str) else data
    return read_csv(
        iter([raw[at : at + 5] for at in range(0, len(raw), 5)]), email_column, skip_lines
    )


def address_column(header: str, email_column: str = "") -> str:
    found = table(f"{header}\n{',' * 9}x\n", email_column)
    return found.columns[found.email_index]


def taken(data: str | bytes, **options: object) -> ReadBlock:
    """Read a CSV of one block."""
    options = {"subject": "s", "body": "b", **options}
    raw = data.encode() if isinstance(data, str) else data
    batch = BatchOptions("request", 1, **options)  # type: ignore[arg-type]
    with closing(BlockReader(CsvPayload(WholeFile(raw)), batch, 100_000)) as reader:
        block = reader.next()
        assert block is not None
        return block


def recipients(data: str | bytes, **options: object) -> list[str]:
    block = taken(data, **options)
    assert block.rejections == []
    return [row.recipient for row in block.rows]


def refusal(data: str | bytes, **options: object) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        taken(data, **options)
    return caught.value


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("From,To,Email Address,Name", "Email Address"),
        ("Recipient,Email Address,Gift", "Email Address"),
        ("Recipient,To,Courriel", "Courriel"),
        ("To,E-mail 1 - Type,E-mail 1 - Value", "E-mail 1 - Value"),
        ("E-mail 1 - Label,E-mail 2 - Value,E-mail 1 - Value", "E-mail 1 - Value"),
        ("Anrede,E-Mail-Adresse,To", "E-Mail-Adresse"),
        ("Secondary Email,Primary Email", "Primary Email"),
        ("Recovery Email,Work Email,Email Address [Required]", "Email Address [Required]"),
        ("Customer Email,Accepts Email Marketing", "Customer Email"),
        ("Accepts Email Marketing,To", "To"),
        ("Email Opt-In,Email Status,Recipient", "Recipient"),
        ("E-mail Display Name,E-mail Address", "E-mail Address"),
        ("E-mail Type,E-mail 2 Address", "E-mail 2 Address"),
        ("Billing Email,Phone", "Billing Email"),
        ("Adresse électronique,Nom", "Adresse électronique"),
        ("Adresse de messagerie,Nom", "Adresse de messagerie"),
        ("Correo electrónico,Nombre", "Correo electrónico"),
        ("Indirizzo e-mail,Nome", "Indirizzo e-mail"),
        ("Endereço de e-mail,Nome", "Endereço de e-mail"),
        ("E-mailadres,Naam", "E-mailadres"),
        ("E-postadress,Namn", "E-postadress"),
        ("Адрес электронной почты,Имя", "Адрес электронной почты"),
        ("メールアドレス,名前", "メールアドレス"),
        ("Email ID,Contact Email", "Contact Email"),
        ("Mail,E-Mail (privat)", "E-Mail (privat)"),
        ("Mail,To", "Mail"),
        ("Email,email 2", "Email"),
        ("E-Mail,Email Address,To", "E-Mail"),
        ("email,Email Address", "email"),
    ],
)
def test_a_name_that_says_e_mail_goes_before_recipient_and_to(header: str, column: str) -> None:
    assert address_column(header) == column
    assert address_column(header.replace(",", ";")) == column


@pytest.mark.parametrize(
    "header", ["Name,E-mail 1 - Type", "Email Opt-In,Name", "Mailing address,x", "Username,Phone"]
)
def test_a_header_that_names_no_address_is_refused_with_its_columns(header: str) -> None:
    with pytest.raises(InvalidInput, match=r"options\.email_column must name") as caught:
        table(f"{header}\na,b\n")
    assert caught.value.reason == "CSV_NO_EMAIL_COLUMN"
    assert repr(header.split(",", maxsplit=1)[0]) in caught.value.message


@pytest.mark.parametrize(
    "wanted", ["Login (old)", " Login (old) ", "login_old", "LOGIN old", "Login\u00a0(old)"]
)
def test_the_address_column_can_be_named_as_written_or_by_its_variable_name(wanted: str) -> None:
    assert address_column("email,To,Login (old)", wanted) == "Login (old)"


def test_the_exact_spelling_of_the_address_column_wins() -> None:
    assert table("E-Mail,e_mail\na,b\n", "e_mail").email_index == 1
    assert table("E-Mail,e_mail\na,b\n", "E-Mail").email_index == 0
    with pytest.raises(InvalidInput, match="'E-Mail' and 'e_mail' may both hold the addresses"):
        table("E-Mail,e_mail\na,b\n", "e-mail")


def test_two_equal_names_of_the_address_column_are_refused() -> None:
    for header in ("Email,EMAIL", "E-mail Address,E-Mail address,To"):
        with pytest.raises(InvalidInput) as caught:
            table(f"{header}\na,b,c\n")
        assert caught.value.reason == "CSV_DUPLICATE_COLUMN"
        assert "options.email_column" in caught.value.message
    # Another column has the addresses: these two are not used.
    assert address_column("Email,EMAIL,Work Email", "Work Email") == "Work Email"


def test_an_address_column_that_the_header_does_not_have_is_named() -> None:
    error = refusal("email,Name\na@b.org,x\n", email_column="Mail")
    assert error.reason == "CSV_NO_EMAIL_COLUMN"
    assert "no column 'Mail', which options.email_column names" in error.message
    assert "'email', 'Name'" in error.message


def test_the_variable_email_is_the_address_whatever_column_has_it() -> None:
    (row,) = taken(
        "email,Work\nold@b.org,new@b.org\n", email_column="Work", body="{{ email }}"
    ).rows
    assert (row.recipient, row.variables) == ("new@b.org", '["new@b.org"]')


def test_a_separator_is_found_with_the_named_address_column() -> None:
    assert table("to,x;Konto\na;b\n", "Konto").separator == ";"
    assert table("Konto\ta;b;c;d\nx\ty\n", "konto").columns == ("Konto", "a;b;c;d")


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ('email,name,Size (")', ("email", "name", 'Size (")')),
        ('Size (")\temail', ('Size (")', "email")),
        ('Size (");email;Len (")', ('Size (")', "email", 'Len (")')),
        ('5" disk,email', ('5" disk', "email")),
        ('email,a "quoted" word,b"', ("email", 'a "quoted" word', 'b"')),
        ('email,"Size ("")"', ("email", 'Size (")')),
        ('email,"one, two",Size (")', ("email", "one, two", 'Size (")')),
        ('"email" ,"x"y', ("email", "xy")),
        ('email|"a\n""b"""|c"', ("email", 'a\n"b"', 'c"')),
        ('email,"Notes; e-mail; to\nmore"', ("email", "Notes; e-mail; to\nmore")),
    ],
)
def test_a_quote_within_an_unquoted_header_cell_is_a_character(
    header: str, columns: tuple[str, ...]
) -> None:
    width = len(columns)
    separator = next(each for each in ",;\t|" if each in header.replace("Notes; e-mail; to", ""))
    found = table(f"{header}\n{separator.join('x' * width)}\n")
    assert found.columns == columns
    assert list(found.rows()) == [(1, ["x"] * width)]


def test_a_quote_that_opens_a_header_cell_must_be_closed() -> None:
    for header in ('email,"Size (in)', '"email,name', 'email,name,"'):
        error = refusal(f"{header}\na@b.org,x\n")
        assert error.reason == "CSV_UNCLOSED_QUOTE"


def test_a_header_of_many_lines_and_quotes_is_read_in_linear_time() -> None:
    before = time.thread_time()
    for lines in ('"\n' * 100_000, 'x,"\n' + "a\n" * 120_000, '"' * 250_000, '",' * 120_000):
        with pytest.raises(InvalidInput):
            list(read_csv(iter([lines.encode()])).rows())
    # A fiftieth of it here. In quadratic time it would be minutes.
    assert time.thread_time() - before < 20


GOOD = b"email,name\nann@b.org,Ann\n"


@pytest.mark.parametrize(
    "end",
    [
        *(b"\x1a", b"\x1a\x1a\x1a", b"\x1a\r\n", b"\n\x1a", b"\r\n\x1a\r\n", b" \x1a", b"\x1a \n"),
        b"\x1a" * 128,
        b"\n" * 20 + b"\x1a\n\x1a",
    ],
)
def test_a_final_ctrl_z_is_ignored(end: bytes) -> None:
    assert recipients(GOOD + end) == ["ann@b.org"]
    assert recipients(GOOD.rstrip() + end) == ["ann@b.org"]
    for size in (1, 3):
        data = GOOD + end
        chunks = (data[at : at + size] for at in range(0, len(data), size))
        assert len(list(read_csv(chunks).rows())) == 1


def test_a_ctrl_z_that_is_not_at_the_end_is_data() -> None:
    (first, second) = taken(
        b"email,name\nann@b.org,\x1a\x1aA\nbob@b.org,B\x1a\n", body="{{ name }}"
    ).rows
    assert first.variables == '["\\u001a\\u001aA"]'
    assert second.variables == '["B"]'
    (bad,) = taken(b"email\n\x1aann@b.org\nbob@b.org\n").rejections
    assert bad.reason == "CONTROL_CHARACTER"


def test_a_ctrl_z_after_utf_16_is_ignored() -> None:
    for end in ("\x1a".encode("utf-16-le"), b"\x1a"):
        assert recipients(b"\xff\xfe" + GOOD.decode().encode("utf-16-le") + end) == ["ann@b.org"]


def test_a_file_of_ctrl_z_alone_is_empty() -> None:
    assert refusal(b"\x1a").reason == "CSV_EMPTY"
    assert refusal(b"email\n\x1a").reason == "CSV_NO_ROWS"


def test_many_ctrl_z_are_read_in_linear_time_and_little_memory() -> None:
    before = time.thread_time()
    block = taken(b"email\na@b.org\n" + b"\x1a" * 1_000_000 + b"x")
    assert [one.row_number for one in block.rejections] == [2]
    assert time.thread_time() - before < 20


@pytest.mark.parametrize(
    "empty", [",", ",,,,", '"",""', " , ", "\u00a0,\u00a0", ' ,"  "', '"\n",', ",\t,"]
)
def test_empty_rows_of_a_spreadsheet_are_left_out(empty: str) -> None:
    data = f"email,name\n{empty}\nann@b.org,Ann\n{empty}\n{empty}\n"
    assert recipients(data) == ["ann@b.org"]
    assert taken(data).rows[0].row_number == 2
    assert refusal(f"email,name\n{empty}\n").reason == "CSV_NO_ROWS"


@pytest.mark.parametrize("empty", [",,,", ";;", '"",""', "\t\t\t", " , ,", "\u00a0"])
def test_empty_rows_before_the_header_are_skipped(empty: str) -> None:
    assert recipients(f"{empty}\n{empty}\nemail,name\nann@b.org,Ann\n") == ["ann@b.org"]


def test_a_row_that_has_only_no_address_is_rejected() -> None:
    block = taken("email,name\n,Ann\n ,Bob\n")
    assert [one.reason for one in block.rejections] == ["EMAIL_MISSING"] * 2


def test_lines_before_the_header_can_be_skipped() -> None:
    data = 'Customers of "ACME\n\nsep=;\nemail;name\nann@b.org;Ann\n'
    assert recipients(data, skip_lines=2) == ["ann@b.org"]
    assert recipients(data, skip_lines=3) == ["ann@b.org"]
    assert taken(data, skip_lines=2).rows[0].row_number == 1
    assert refusal(data, skip_lines=5).reason == "CSV_EMPTY"
    assert "the 9 lines that options.skip_lines skips" in refusal(data, skip_lines=9).message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"skip_lines": -1}, "SKIP_LINES_INVALID"),
        ({"skip_lines": 1_001}, "SKIP_LINES_INVALID"),
        ({"email_column": "x" * 257}, "EMAIL_COLUMN_INVALID"),
        ({"email_column": "a\nb"}, "EMAIL_COLUMN_INVALID"),
    ],
)
def test_the_options_of_a_csv_have_limits(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_options(BatchOptions("request", 1, **options))  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert caught.value.violations[0].field == f"options.{next(iter(options))}"


def test_the_digest_of_older_batches_stays_the_same_and_each_option_changes_it() -> None:
    digests = {
        BatchOptions("r", 1, **options).canonical()
        for options in ({}, {"email_column": "x"}, {"skip_lines": 1}, {"email_column": "1"})
    }
    assert len(digests) == 4
    assert BatchOptions("r", 1).canonical() == (
        b'[1, null, null, null, null, 0, 1, 1, "UTC", null]'
    )


@pytest.mark.parametrize(
    "data",
    [
        "email,name,Price ($),Price (%)\nann@b.org,Ann,1,2\n",
        "email,name,Name,NAME\nann@b.org,Ann,A,B\n",
        "email,subject,Subject\nann@b.org,x,y\n",
        "email,Timezone,Time Zone\nann@b.org,PST,Eastern Time\n",
        "email,Timezone\nann@b.org,Eastern Time\n",
        "email,time zone,time-zone\nann@b.org,a,b\n",
        "email,To,to,Recipient\nann@b.org,2026,2027,x\n",
    ],
)
def test_a_column_that_nothing_uses_costs_nothing(data: str) -> None:
    assert recipients(data) == ["ann@b.org"]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("email,Price ($),Price (%)\na@b.org,1,2\n", {"body": "{{ price }}"}),
        ("email,Price ($),Price (%)\na@b.org,1,2\n", {"html": "{{ price | default: 1 }}"}),
        ("email,First Name,first_name\na@b.org,1,2\n", {"subject": "{{ first_name }}"}),
        ("email,subject,Subject\na@b.org,x,y\n", {"subject": None}),
        ("email,html,HTML\na@b.org,x,y\n", {}),
        ("email,schedule_time,Schedule Time\na@b.org,,\n", {}),
        ("email,schedule_time,Timezone,Time Zone\na@b.org,,UTC,UTC\n", {}),
        ("email,schedule_time,Timezone,timezone\na@b.org,,UTC,UTC\n", {}),
    ],
)
def test_two_columns_of_a_name_that_is_used_are_refused(
    data: str, options: dict[str, object]
) -> None:
    error = refusal(data, **options)
    assert error.reason == "CSV_DUPLICATE_COLUMN"
    first, second = data.splitlines()[0].split(",")[-2:]
    assert repr(first) in error.message
    assert repr(second) in error.message


def rows_of(*rows: tuple[str, dict[str, str]], **options: object) -> ReadBlock:
    batch = BatchOptions("request", 1, **{"subject": "s", "body": "{{ name }}", **options})  # type: ignore[arg-type]
    with closing(BlockReader(RowsPayload(rows, len(rows)), batch, 100_000)) as reader:
        block = reader.next()
        assert block is not None
        return block


def test_columns_of_structured_rows_that_nothing_uses_cost_nothing() -> None:
    block = rows_of(
        ("a@b.org", {"name": "A", "Price ($)": "1", "Price (%)": "2"}),
        ("b@b.org", {"name": "B", "Timezone": "PST", "Time Zone": "Eastern Time"}),
        ("c@b.org", {"name": "C", "To": "2026-12-05", "Recipient": "Ann Lee"}),
        ("", {"name": " ", "x": ""}),
        ("d@b.org", {"name": "D", "NAME": "x"}),
        ("", {"name": "E"}),
        ("f@b.org", {"name": "F", "Recipient": "f@b.org"}),
    )
    assert [row.recipient for row in block.rows] == ["a@b.org", "b@b.org", "c@b.org"]
    assert [(one.row_number, one.reason) for one in block.rejections] == [
        (5, "DUPLICATE_COLUMN"),
        (6, "EMAIL_MISSING"),
        (7, "DUPLICATE_COLUMN"),
    ]


def test_structured_rows_that_are_all_empty_are_refused() -> None:
    with pytest.raises(InvalidInput, match="every row is empty") as caught:
        rows_of(("", {"name": ""}), (" ", {}))
    assert caught.value.reason == "PAYLOAD_REQUIRED"


@pytest.mark.parametrize("option", [{"email_column": "email"}, {"skip_lines": 1}])
def test_options_of_a_csv_are_refused_for_structured_rows(option: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="is for a CSV"):
        rows_of(("a@b.org", {"name": "A"}), **option)


def test_rows_keep_their_address_as_written_and_are_told_apart_by_lower_case() -> None:
    data = "email\ninfo@fußball.de\ninfo@fussball.de\ngroß@example.com\ngross@example.com\n"
    block = taken(data + "INFO@FUSSBALL.DE\nGROẞ@example.com\n")
    assert len(block.rows) == 4
    assert block.duplicates == 2
    assert isinstance(block.rows[0], JobRow)


def test_no_word_of_the_tables_hides_a_name() -> None:
    """Each name that says e-mail is found beside the fallbacks, in the case of a header."""
    for name in ("Courriel", "Mél", "E-Post", "Sähköpostiosoite", "Eposta adresi", "이메일 주소"):
        columns = ("to", name, "recipient")
        assert find_email_column(columns, [variable_name(one) for one in columns]) == 1
