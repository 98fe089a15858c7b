from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime

import pytest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.blocks import BlockReader, ReadBlock
from outbox_server.shared.intake.csv_reader import read_csv
from outbox_server.shared.intake.payloads import CsvPayload, RowsPayload, WholeFile
from outbox_server.shared.intake.rows import (
    Block,
    CsvPlan,
    JobRow,
    RawRow,
    ReadingRules,
    RecipientPlan,
    RowRejection,
    read_blocks,
)
from outbox_server.shared.templates.batch import BatchTemplate, decode_variables

PLAIN = BatchTemplate.compile("s", "Dear {{ name }}", None)


def read(text: str, template: BatchTemplate = PLAIN, zone: str = "UTC") -> Block:
    table = read_csv(iter([text.encode()]))
    blocks = list(read_blocks(table.rows(), CsvPlan(table, template, ReadingRules(zone))))
    assert len(blocks) == 1
    return blocks[0]


def rendered(text: str, subject: str) -> ReadBlock:
    """Read a CSV whose rows are also rendered."""
    options = BatchOptions("request", 1, subject=subject, body="b", html="h")
    with closing(BlockReader(CsvPayload(WholeFile(text.encode())), options, 100_000)) as reader:
        block = reader.next()
    assert block is not None
    return block


def rejection(text: str, template: BatchTemplate = PLAIN) -> RowRejection:
    block = read(text, template)
    assert not block.rows
    (only,) = block.rejections
    return only


def read_recipient(
    email: str, columns: dict[str, str], template: BatchTemplate = PLAIN
) -> JobRow | RowRejection:
    return RecipientPlan(template).read(1, RawRow(email, columns))


def test_a_good_row_keeps_only_what_the_templates_use() -> None:
    block = read("Name,To,city\nAnn, Ann@EXAMPLE.com ,Köln\n")
    assert block.rows == [JobRow(1, "Ann@example.com", "ann@example.com", None, '["Ann"]')]
    assert block.rejections == []


def test_variables_are_stored_in_the_order_of_the_plans_names() -> None:
    template = BatchTemplate.compile("{{ z }}", '{{ b | default: "" }}{{ a }}', None)
    table = read_csv(iter([b'email,a,z\nann@example.com,"1 ""x""\n",2\n']))
    plan = CsvPlan(table, template)
    ((row,), _) = next(read_blocks(table.rows(), plan))
    assert plan.variable_names == ("a", "z")
    assert decode_variables(plan.variable_names, row.variables) == {"a": '1 "x"\n', "z": "2"}


def test_a_batch_without_variables_stores_no_variables() -> None:
    template = BatchTemplate.compile("s", "b", "h")
    assert read("email\nann@example.com\n", template).rows[0].variables is None


def test_the_address_is_a_variable_under_any_column_name() -> None:
    template = BatchTemplate.compile("s", "for {{ email }}", "h")
    assert read("recipient\nann@example.com\n", template).rows[0].variables == '["ann@example.com"]'
    row = read_recipient("ann@example.com", {}, BatchTemplate.compile("s", "for {{ email }}", "h"))
    assert isinstance(row, JobRow)


@pytest.mark.parametrize(
    ("line", "column", "reason", "message"),
    [
        ("ann@example.com", "", "RAGGED_ROW", "the row has 1 cells, not 2"),
        ("ann@example.com,Ann,x", "", "RAGGED_ROW", "the row has 3 cells, not 2"),
        (",Ann", "email", "EMAIL_MISSING", "there is no address"),
        ("ann,Ann", "email", "ADDRESS_INVALID", "must have an @"),
        ('"a@b.com, c@d.com",Ann', "email", "TWO_ADDRESSES", "more than one"),
        ('"a@b.com\nBcc: c@d.com",Ann', "email", "CONTROL_CHARACTER", "U+000A"),
    ],
)
def test_a_bad_row_is_rejected_with_column_and_reason(
    line: str, column: str, reason: str, message: str
) -> None:
    found = rejection(f"email,name\n{line}\n")
    assert found[:3] == (1, column, reason)
    assert message in found.message


def test_empty_cells_beyond_the_header_are_tolerated() -> None:
    assert len(read("email,name\nann@example.com,Ann,,\n").rows) == 1
    assert len(read("email,name,,\nann@example.com,Ann\n").rows) == 1


def test_the_first_problem_of_a_row_is_reported() -> None:
    text = "email,schedule_time,time_zone\nann,never,Mars\n"
    assert rejection(text).reason == "ADDRESS_INVALID"
    assert rejection(text.replace("ann", "a@example.com")).reason == "SCHEDULE_TIME_INVALID"
    good = "email,schedule_time,time_zone\nann@example.com,2026-11-24 09:00,UTC\n"
    assert rejection(good).reason == "COLUMN_MISSING"


@pytest.mark.parametrize(
    ("header", "column"),
    [("time_zone", "time_zone"), ("Time Zone", "time_zone"), ("Timezone", "timezone")],
)
def test_a_row_may_have_its_own_time(header: str, column: str) -> None:
    template = BatchTemplate.compile("s", "b", "h")
    block = read(
        f"email,schedule_time,{header}\n"
        "a@example.com,2026-11-24 09:00,Europe/Berlin\n"
        "b@example.com,2026-11-24T09:00:00+02:00,\n"
        "c@example.com,2026-11-24 09:00,\n"
        "d@example.com, ,\n"
        "e@example.com,2026-02-30 09:00,\n"
        "f@example.com,,Mars/Phobos\n",
        template,
        zone="America/New_York",
    )
    assert [row.schedule_time for row in block.rows] == [
        datetime(2026, 11, 24, 8, tzinfo=UTC),
        datetime(2026, 11, 24, 7, tzinfo=UTC),
        datetime(2026, 11, 24, 14, tzinfo=UTC),
        None,
    ]
    assert [found[:3] for found in block.rejections] == [
        (5, "schedule_time", "SCHEDULE_TIME_INVALID"),
        (6, column, "UNKNOWN_TIME_ZONE"),
    ]


def test_a_time_zone_that_nothing_uses_may_be_any_text() -> None:
    template = BatchTemplate.compile("s", "{{ time_zone }}", "h")
    assert read("email,Time Zone\na@example.com,Pacific Time\n", template).rows
    row = RecipientPlan(template).read(1, RawRow("a@example.com", {"time_zone": "Pacific Time"}))
    assert isinstance(row, JobRow)


def test_a_missing_column_rejects_every_row_and_is_named() -> None:
    block = read("email,FirstName\na@example.com,A\nb@example.com,B\n")
    assert [(found.row_number, found.column, found.reason) for found in block.rejections] == [
        (1, "name", "COLUMN_MISSING"),
        (2, "name", "COLUMN_MISSING"),
    ]
    assert "{{ name }}" in block.rejections[0].message
    camel = BatchTemplate.compile("s", "{{ FirstName }}", None)
    assert "write {{ firstname }}" in rejection("email,FirstName\na@example.com,A\n", camel).message


def test_an_empty_cell_is_not_missing() -> None:
    assert read("email,name\na@example.com,\n").rows[0].variables == '[""]'


def test_a_subject_that_no_mail_can_have_rejects_the_row() -> None:
    own = BatchTemplate.compile(None, "b", "h")
    text = f"email,subject\na@example.com,{'x' * 999}\n"
    assert rejection(text, own)[1:3] == ("subject", "SUBJECT_TOO_LONG")
    shared = BatchTemplate.compile("{{ name }}", "b", "h")
    text = f"email,name\na@example.com,{'x' * 999}\n"
    assert rejection(text, shared)[1:3] == ("name", "SUBJECT_TOO_LONG")
    assert rendered(text, "{{ name | truncate: 50 }}").rows
    (found,) = rendered(text, "{{ name | upcase }}").rejections
    assert found[1:3] == ("name", "SUBJECT_TOO_LONG")


def test_a_line_break_in_a_subject_rejects_the_row() -> None:
    own = BatchTemplate.compile(None, "b", "h")
    text = 'email,subject\na@example.com,"x\r\nBcc: b@example.com"\n'
    assert rejection(text, own)[1:3] == ("subject", "SUBJECT_LINE_BREAK")
    shared = BatchTemplate.compile("Hi {{ name }} there", "b", "h")
    text = 'email,name\na@example.com,"x\ny"\n'
    assert rejection(text, shared)[1:3] == ("name", "SUBJECT_LINE_BREAK")
    # Text at its ends is trimmed, and a filter may remove text; both are permitted.
    assert read(
        'email,name\na@example.com,"x\n"\n', BatchTemplate.compile("{{ name }}", "b", "h")
    ).rows
    assert rendered(text, "Hi {{ name | squish }} there").rows
    (found,) = rendered(text, "Hi {{ name | upcase }} there").rejections
    assert found[1:3] == ("name", "SUBJECT_LINE_BREAK")
    decoded = "email,name\na@example.com,x%0Ay\n"
    (found,) = rendered(decoded, "Hi {{ name | url_decode }} there").rejections
    assert found[1:3] == ("subject", "SUBJECT_LINE_BREAK")


def test_a_row_without_a_subject_is_rejected() -> None:
    found = rejection("email\na@example.com\n", BatchTemplate.compile(None, "b", "h"))
    assert found[1:3] == ("subject", "COLUMN_MISSING")


def test_a_row_with_neither_text_nor_html_is_rejected() -> None:
    own = BatchTemplate.compile("s", None, None)
    block = read("email,body,html\na@example.com,,\nb@example.com,x,\nc@example.com,,y\n", own)
    assert [row.variables for row in block.rows] == ['["x",""]', '["","y"]']
    assert [found[:3] for found in block.rejections] == [(1, "", "NO_CONTENT")]
    assert rejection("email\na@example.com\n", own).reason == "NO_CONTENT"


def test_blocks_have_the_requested_size() -> None:
    lines = [f"user{n}@example.com" if n % 3 else "bad" for n in range(10)]
    table = read_csv(iter([("email\n" + "\n".join(lines)).encode()]))
    plan = CsvPlan(table, BatchTemplate.compile("s", "b", "h"))
    blocks = list(read_blocks(table.rows(), plan, block_size=4))
    assert [len(block.rows) + len(block.rejections) for block in blocks] == [4, 4, 2]
    numbers = [row.row_number for block in blocks for row in block.rows]
    numbers += [found.row_number for block in blocks for found in block.rejections]
    assert sorted(numbers) == list(range(1, 11))


def test_inline_rows_are_read_like_csv_rows() -> None:
    row = read_recipient("Ann@EXAMPLE.com", {"Name": "Ann", "schedule_time": "2026-11-24 09:00"})
    at = datetime(2026, 11, 24, 9, tzinfo=UTC)
    assert row == JobRow(1, "Ann@example.com", "ann@example.com", at, '[null,"Ann"]')


@pytest.mark.parametrize(
    ("email", "columns", "reason"),
    [
        ("ann", {"name": "Ann"}, "ADDRESS_INVALID"),
        ("", {"name": "Ann"}, "EMAIL_MISSING"),
        ("a@example.com", {}, "COLUMN_MISSING"),
        ("a@example.com", {"name": "Ann", "E-Mail": "b@example.com"}, "DUPLICATE_COLUMN"),
        ("a@example.com", {"name": "Ann", "Name": "Bob"}, "DUPLICATE_COLUMN"),
        ("a@example.com", {"name": "Ann", "schedule_time": "soon"}, "SCHEDULE_TIME_INVALID"),
        (
            "a@example.com",
            {"name": "Ann", "schedule_time": "", "time_zone": "Mars"},
            "UNKNOWN_TIME_ZONE",
        ),
        (
            "a@example.com",
            {"name": "Ann", "schedule_time": "", "timezone": "Mars"},
            "UNKNOWN_TIME_ZONE",
        ),
        (
            "a@example.com",
            {"name": "Ann", "schedule_time": "", "timezone": "UTC", "Time Zone": "UTC"},
            "DUPLICATE_COLUMN",
        ),
    ],
)
def test_a_bad_inline_row_is_rejected(email: str, columns: dict[str, str], reason: str) -> None:
    found = read_recipient(email, columns)
    assert isinstance(found, RowRejection)
    assert found.reason == reason


def test_columns_may_differ_from_row_to_row() -> None:
    template = BatchTemplate.compile("s", '{{ name | default: "you" }}', "h")
    plan = RecipientPlan(template)
    rows = [RawRow("a@example.com", {"name": "A"}), RawRow("b@example.com", {"x": "y"})]
    ((first, second), _) = next(read_blocks(enumerate(rows, 1), plan))
    assert decode_variables(plan.variable_names, first.variables) == {"name": "A"}
    assert decode_variables(plan.variable_names, second.variables) == {}


@pytest.mark.parametrize(
    ("columns", "reason", "said"),
    [
        ({str(n): "" for n in range(1_001)}, "TOO_MANY_COLUMNS", "at most 1,000 columns"),
        ({"a" * 257: ""}, "COLUMN_NAME_TOO_LONG", "at most 256 characters (got 257)"),
        ({"a" + "\u0301\u0316" * 25_000: ""}, "COLUMN_NAME_TOO_LONG", "(got 50,001)"),
    ],
)
def test_a_structured_row_with_too_much_is_rejected_alone(
    columns: dict[str, str], reason: str, said: str
) -> None:
    found = read_recipient("ann@example.com", columns)
    assert isinstance(found, RowRejection)
    assert (found.reason, found.column) == (reason, "")
    assert said in found.message
    assert len(found.message) < 300


def test_a_rejection_is_short_even_if_the_missing_column_has_a_long_name() -> None:
    template = BatchTemplate.compile("s", f"{{{{ {'a' * 100_000} }}}}", None)
    found = read_recipient("ann@example.com", {}, template)
    assert isinstance(found, RowRejection)
    assert found.reason == "COLUMN_MISSING"
    assert "100,000 characters" in found.message
    assert len(found.message) + len(found.column) < 500


def test_the_values_that_structured_rows_store_are_limited() -> None:
    names = [f"v{n}" for n in range(999)]  # and `html`
    body = "".join(f"{{{{ {name} | default: '' }}}}" for name in names)
    template = BatchTemplate.compile("s", body, None)

    def opened(count: int) -> object:
        return RowsPayload((("a@b.org", {}) for _ in range(count)), count).open(
            template, ReadingRules()
        )

    opened(10_000)
    with pytest.raises(InvalidInput, match="at most 10,000 entries if the templates use 1,000"):
        opened(10_001)


@pytest.mark.parametrize("zone", ["a" * 65, "Europe/" + "\u0301" * 100_000])
def test_a_long_time_zone_is_unknown(zone: str) -> None:
    found = read_recipient(
        "ann@example.com", {"name": "", "schedule_time": "2026-11-24 09:00", "time_zone": zone}
    )
    assert isinstance(found, RowRejection)
    assert found.reason == "UNKNOWN_TIME_ZONE"
    assert len(found.message) < 200
