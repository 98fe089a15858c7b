"""OUTBOX_MAX_MESSAGE_BYTES limits a mail while it is built and encoded."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.blocks import BlockReader, ReadBlock
from outbox_server.shared.intake.payloads import CsvPayload
from outbox_server.shared.mail.message import MessageBuilder, MessageError
from outbox_server.shared.message_size import TextSize, escape_growth, utf8_size
from outbox_server.shared.templates.batch import BatchTemplate, RenderError

NOW = datetime(2026, 11, 24, 9, 5, 3, tzinfo=UTC)
ID = "<outbox.7.demo@shop.example>"
MEBIBYTE = 1024 * 1024


def texts(max_size: int) -> st.SearchStrategy[str]:
    """Return random texts, and texts of the characters that change when they are encoded."""
    return st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=max_size) | st.text(
        alphabet=" \t\n\r.=?_-é名🎉\x01\x0b&<'\"", max_size=max_size
    )


TEXT = texts(300)
# Encoded, it has at most 998 bytes.
SUBJECT = texts(100)


def build(
    values: dict[str, str],
    max_bytes: int,
    subject: str | None = None,
    body: str | None = None,
    html: str | None = None,
) -> bytes:
    template = BatchTemplate.compile(subject, body, html)
    builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=max_bytes)
    return builder.build("ann@example.org", values, ID, NOW).data


def refusal(
    values: dict[str, str],
    max_bytes: int,
    subject: str | None = None,
    body: str | None = None,
    html: str | None = None,
) -> str:
    with pytest.raises((MessageError, RenderError)) as caught:
        build(values, max_bytes, subject, body, html)
    assert isinstance(caught.value, (MessageError, RenderError))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    return caught.value.message


MAILS = {
    "7bit": {"body": "plain text\n" * 500},
    "7bit without a line break at its end": {"body": "plain text"},
    "7bit with line ends of two characters": {"body": "plain text\r\n" * 500},
    "7bit of nothing but line ends": {"body": "\n" * 3000},
    "quoted-printable of control characters": {"body": "\x01" * 3000},
    "quoted-printable of letters": {"body": "Grüße aus der schönen Stadt am Rhein\n" * 100},
    "quoted-printable of one long line": {"body": "x" * 5000},
    "quoted-printable of signs": {"body": "a=b" * 2000},
    "base64": {"body": "名前\n" * 1000},
    "base64 of emoji": {"html": "🎉" * 1000},
    "both parts": {"body": "Grüße\n" * 500, "html": "<p>名前</p>" * 500},
    "a subject of encoded words": {"subject": "名" * 180, "body": "b"},
    "a subject of encoded words in two bytes": {"subject": "é" * 201, "body": "b"},
    "a folded subject": {"subject": "word " * 150, "body": "b"},
}


@pytest.mark.parametrize("name", MAILS)
def test_a_mail_of_exactly_the_limit_is_built_and_one_byte_more_is_refused(name: str) -> None:
    values = {"subject": "s"} | MAILS[name]
    size = len(build(values, MEBIBYTE))

    assert len(build(values, size)) == size
    message = refusal(values, size - 1)

    assert message.endswith(f"OUTBOX_MAX_MESSAGE_BYTES permits {size - 1:,}")
    named = re.search(r"has (at least )?([\d,]+) bytes", message)
    assert named
    exact, reported = named[1] is None, int(named[2].replace(",", ""))
    assert reported == size if exact else size - 1 < reported <= size


@given(subject=SUBJECT, body=TEXT, html=TEXT)
@example(subject="é" * 22, body="x", html="")
@example(subject="", body=" \n" * 40, html="\t\n" * 40)
@example(subject="", body="名\n" * 10, html="é=" * 100)
def test_a_mail_within_the_limit_is_never_refused(subject: str, body: str, html: str) -> None:
    values = {"subject": re.sub(r"[\r\n]", " ", subject), "body": body or "b", "html": html}
    size = len(build(values, MEBIBYTE))

    assert len(build(values, size)) == size
    refusal(values, size - 1)


@given(name=TEXT, times=st.integers(0, 4))
def test_a_row_within_the_limit_is_never_rejected_by_the_estimate(name: str, times: int) -> None:
    source = "{{ name }}" * times + "{{ other | default: 'é' }}"
    template = BatchTemplate.compile("s", source, f"<p>{source}</p>")

    data = build({"name": name}, MEBIBYTE, "s", source, f"<p>{source}</p>")

    assert template.least_size({"name": name}) <= len(data)


def test_a_cached_text_counts_in_every_mail() -> None:
    template = BatchTemplate.compile("{{ s }}", "same\n" * 100, "<p>same</p>")
    size = len(build({"s": "x"}, MEBIBYTE, "{{ s }}", "same\n" * 100, "<p>same</p>"))
    builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=size + 50)
    small = builder.build("ann@example.org", {"s": "x"}, ID, NOW).data

    assert len(builder.build("ann@example.org", {"s": "x" * 51}, ID, NOW).data) == size + 50
    with pytest.raises(MessageError, match=f"^the mail has {size + 51:,} bytes"):
        builder.build("ann@example.org", {"s": "x" * 52}, ID, NOW)
    assert len(builder.build("ann@example.org", {"s": "x"}, ID, NOW).data) == len(small) == size


def test_a_long_display_name_counts() -> None:
    template = BatchTemplate.compile("s", "b", None)
    with pytest.raises(MessageError) as caught:
        MessageBuilder("shop@shop.example", "名" * 1_000, template, max_bytes=2_000)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    builder = MessageBuilder("shop@shop.example", "名" * 300, template, max_bytes=2_000)
    assert 1_500 < len(builder.build("ann@example.org", {}, ID, NOW).data) <= 2_000


CELL = 900_000
LOOP = "{% for i in (1..100) %}{{ t }}{% endfor %}"
# (subject, body, html, the cell): each mail would be at least nine times as large as the limit.
HUGE = {
    "a column twenty times": ("s", "{{ t }}" * 20, None, "x" * CELL),
    "a column a thousand times": ("s", "{{ t }}" * 1_000, None, "x" * CELL),
    "control characters": ("s", "{{ t }}" * 20, None, "\x01" * CELL),
    "line ends": ("s", "{{ t }}" * 20, None, "\n" * CELL),
    "letters in two bytes": ("s", "{{ t }}" * 20, None, "é" * (CELL // 2)),
    "characters in three bytes": ("s", "{{ t }}" * 20, None, "名" * (CELL // 3)),
    "characters in four bytes": ("s", None, "{{ t }}" * 20, "🎉" * (CELL // 4)),
    "text and HTML": ("s", "{{ t }}" * 10, "{{ t }}" * 10, "x\n" * (CELL // 2)),
    "escaping": ("s", None, "{{ t }}" * 2, '"' * CELL),
    "a loop": ("s", LOOP, None, "x" * CELL),
    "a loop over control characters": ("s", LOOP, None, "\x01" * CELL),
    "a loop over characters in four bytes": ("s", LOOP, None, "🎉" * (CELL // 4)),
    "a loop in HTML": ("s", None, LOOP, "<" * CELL),
    "escaping in Liquid": ("s", None, "{% if t %}{{ t }}{% endif %}{{ t }}", '"' * CELL),
    "escaping by echo": ("s", None, "{% if t %}{% echo t %}{{ t }}{% endif %}", '"' * CELL),
    "a subject": ("{{ t }}" * 20, "b", None, "a b" * (CELL // 3)),
    "a subject of encoded words": ("{{ t }}" * 20, "b", None, "名" * (CELL // 3)),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_mail_is_refused_using_little_memory(name: str) -> None:
    subject, body, html, cell = HUGE[name]
    template = BatchTemplate.compile(subject, body, html)
    builder = MessageBuilder("shop@shop.example", "", template, max_bytes=MEBIBYTE)
    tracemalloc.start()
    try:
        with pytest.raises((RenderError, MessageError)) as caught:
            builder.build("ann@example.org", {"t": cell}, ID, NOW)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert isinstance(caught.value, (MessageError, RenderError))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert peak < 4 * MEBIBYTE


# A text that fits when rendered but exceeds the limit when encoded.
GROWING = {
    "quoted-printable": ("body", "\x01" * (MEBIBYTE - 1_000)),
    "line ends": ("body", "\n" * (MEBIBYTE - 1_000)),
    "base64": ("html", "名" * (MEBIBYTE // 3 - 1_000)),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_text_that_is_too_large_only_when_encoded_is_refused_before_it_is_encoded(
    name: str,
) -> None:
    field, text = GROWING[name]
    template = BatchTemplate.compile(None, None, None)
    builder = MessageBuilder("shop@shop.example", "", template, max_bytes=MEBIBYTE)
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="at least") as caught:
            builder.build("ann@example.org", {"subject": "s", "body": "b"} | {field: text}, ID, NOW)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert peak < 3 * MEBIBYTE


def test_a_captured_text_may_be_longer_than_the_mail() -> None:
    source = "{% capture c %}{{ t }}{{ t }}{% endcapture %}{{ c | size }}"

    data = build({"t": "x" * 2_000}, 1_500, "s", source)

    assert data.endswith(b"4000\r\n")


@given(TEXT)
def test_estimated_sizes_equal_the_sizes_of_the_text(text: str) -> None:
    raw = text.encode()
    assert utf8_size(text) == len(raw)
    assert TextSize.of(text) == (len(raw), sum(byte > 127 for byte in raw))
    html = BatchTemplate.compile("s", None, "{{ t }}{% if t %}{% endif %}").render({"t": text}).html
    assert html is not None
    assert len(html) == len(text) + escape_growth(text)


class File:
    """A CSV as one piece of data."""

    def __init__(self, data: str) -> None:
        self._data = data.encode()

    def __iter__(self) -> Iterator[bytes]:
        yield self._data

    def close(self) -> None:
        """Do nothing: there is no file to close."""


def rows_of(csv: str, body: str | None = None, html: str | None = None) -> ReadBlock:
    batch = BatchOptions(request_id="r", sender_id=1, subject="s", body=body, html=html)
    with closing(BlockReader(CsvPayload(File(csv)), batch, 100_000)) as reader:
        block = reader.next()
        assert block
        return block


@pytest.mark.parametrize(
    ("options", "cell"),
    [
        ({"body": "{{ t }}" * 20}, "x" * 6_000),
        ({"body": "{{ t }}" * 10, "html": "{{ t }}" * 10}, "x" * 6_000),
        ({"html": "{{ t }}"}, "&" * 30_000),
        ({"body": "{{ t }}"}, "名" * 30_000),
        ({"body": "{{ t }}{{ t }}"}, "é" * 20_000),
        # A cell that only some templates show. The cell alone exceeds the limit.
        ({"body": "{% if t %}b{% endif %}"}, "x" * 100_001),
    ],
)
def test_a_row_whose_mail_is_certainly_too_large_is_rejected(
    options: dict[str, str], cell: str
) -> None:
    block = rows_of(f"email,t\na@b.org,short\nb@b.org,{cell}\n", **options)

    assert [row.recipient for row in block.rows] == ["a@b.org"]
    assert [(each.row_number, each.reason) for each in block.rejections] == [
        (2, "MESSAGE_TOO_LARGE")
    ]


@pytest.mark.parametrize(
    ("options", "cell"),
    [
        ({"body": "{{ t }}" * 20}, "x" * 4_900),
        # Without rendering, it is unknown whether Liquid shows it.
        ({"body": "{% if t == 'x' %}" + "{{ t }}" * 20 + "{% endif %}"}, "x" * 6_000),
        ({"body": "{{ t }}"}, "名" * 24_000),
    ],
)
def test_a_row_whose_mail_may_fit_is_accepted(options: dict[str, str], cell: str) -> None:
    assert not rows_of(f"email,t\na@b.org,{cell}\n", **options).rejections
