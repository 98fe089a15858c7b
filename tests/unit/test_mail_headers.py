"""Headers of callers: what is allowed, and that no value escapes from its header."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.policy import default
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.batch_options import BatchOptions, check_options
from outbox_server.shared.mail.message import MessageBuilder
from outbox_server.shared.templates.batch import BatchTemplate, RenderError
from outbox_server.shared.templates.head import HeadTexts

UNSUBSCRIBE = "<https://shop.example/u?id={{ id }}>"
ONE_CLICK = "List-Unsubscribe=One-Click"
NAMES = ["From", "Reply-To", "To", "Subject", "Date", "Message-ID", "MIME-Version"]
CONTENT = ["Content-Type", "Content-Transfer-Encoding"]


def mail(head: HeadTexts, values: dict[str, str], *, plain: bool = True) -> bytes:
    build = BatchTemplate.plain if plain else BatchTemplate.compile
    template = build("s", "b", None, head)
    assert template is not None
    builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=100_000)
    date = datetime(2026, 12, 24, tzinfo=UTC)
    return builder.build("ann@b.org", values, "<1@shop.example>", date).data


def parsed(data: bytes) -> EmailMessage:
    head = data.partition(b"\r\n\r\n")[0]
    assert max(map(len, head.split(b"\r\n"))) <= 998
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", data)
    return message_from_bytes(data, policy=default)


def refusal(**options: object) -> tuple[str, str]:
    """Return the reason and the field of the refusal of a batch's options or templates."""
    given_options = BatchOptions("r", 1, "s", "b", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput) as caught:
        BatchTemplate.compile("s", "b", None, check_options(given_options).head)
    [violation] = caught.value.violations
    return caught.value.reason, violation.field


@pytest.mark.parametrize("plain", [True, False])
def test_a_mail_has_the_headers_of_its_batch(plain: bool) -> None:
    head = HeadTexts(
        "{{ agent }} <help@bücher.example>",
        "name",
        (
            (
                "List-Unsubscribe",
                f"{UNSUBSCRIBE}, <mailto:leave@shop.example?subject={{{{ id }}}}>",
            ),
            ("List-Unsubscribe-Post", ONE_CLICK),
            ("X-Campaign", "Grüße an {{ name }}"),
            ("X-Empty", "{{ nothing | default: '' }}"),
            ("References", "<1@a.example> <2@a.example>"),
            ("X-Words", "word " * 40),
        ),
    )
    values = {"agent": "Support, Ltd.", "name": "Änne Müller", "id": "7" * 300}
    found = parsed(mail(head, values, plain=plain))
    assert found["To"].addresses[0].display_name == "Änne Müller"
    assert found["To"].addresses[0].addr_spec == "ann@b.org"
    assert found["Reply-To"].addresses[0].display_name == "Support, Ltd."
    assert found["Reply-To"].addresses[0].addr_spec == "help@xn--bcher-kva.example"
    unsubscribe = str(found["List-Unsubscribe"])
    assert unsubscribe.startswith(f"<https://shop.example/u?id={'7' * 300}>")
    assert unsubscribe.endswith(">")
    assert "<mailto:leave@shop.example" in unsubscribe
    assert found["List-Unsubscribe-Post"] == ONE_CLICK
    assert found["X-Campaign"] == "Grüße an Änne Müller"
    assert found["X-Words"] == ("word " * 40).strip()
    assert found["X-Empty"] is None
    assert found["Message-ID"] == "<1@shop.example>"


def test_a_batch_without_headers_makes_the_same_mail_as_before() -> None:
    found = parsed(mail(HeadTexts(), {}))
    assert found.keys() == [name for name in NAMES if name != "Reply-To"] + CONTENT
    assert found["To"] == "ann@b.org"


@given(st.text(), st.sampled_from(["name", "agent", "x", "id"]))
@example("a\r\nBcc: eve@evil.example", "x")
@example("a\nBcc: eve@evil.example", "name")
@example("a\r\n\r\nbody", "agent")
@example("> \r\nBcc: eve@evil.example", "id")
@example("a\x0bb", "x")
@example("a\u2028b", "x")
@example("=?utf-8?q?=0ABcc:_eve?=", "x")
@example('"\\" <eve@evil.example>', "agent")
@example("\udcff", "x")
def test_no_cell_adds_a_header_or_an_address(cell: str, column: str) -> None:
    head = HeadTexts(
        "{{ agent }} <help@shop.example>",
        "name",
        (("List-Unsubscribe", UNSUBSCRIBE), ("X-Own", "{{ x }}")),
    )
    values = {"name": "n", "agent": "a", "x": "x", "id": "1"} | {column: cell}
    try:
        data = mail(head, values)
    except RenderError:
        return
    found = parsed(data)
    assert set(found.keys()) <= {*NAMES, *CONTENT, "List-Unsubscribe", "X-Own"}
    assert [each.addr_spec for each in found["Reply-To"].addresses] == ["help@shop.example"]
    assert [each.addr_spec for each in found["To"].addresses] == ["ann@b.org"]
    assert found.get_content().strip() == "b"
    if column == "x" and cell.strip() and "\udcff" not in cell:
        raw = cast(str, message_from_bytes(data)["X-Own"])
        text = str(make_header(decode_header(raw.replace("\r\n", ""))))
        assert text.split() == cell.split()


@pytest.mark.parametrize(
    ("header", "cell", "reason"),
    [
        ("X-Own", "a\r\nBcc: eve@evil.example", "HEADER_INVALID"),
        ("X-Own", "a\tb", "HEADER_INVALID"),
        ("X-Own", "a" * 992, "HEADER_TOO_LONG"),
        ("Feedback-ID", "ü", "HEADER_INVALID"),
        ("List-Unsubscribe", "https://shop.example", "HEADER_INVALID"),
        ("List-Unsubscribe", "<javascript:alert(1)>", "HEADER_INVALID"),
        ("List-Unsubscribe", "<https://shop.example/ x>", "HEADER_INVALID"),
        ("List-Unsubscribe-Post", "List-Unsubscribe=one-click", "HEADER_INVALID"),
        ("In-Reply-To", "1@a.example", "HEADER_INVALID"),
    ],
)
def test_a_value_that_a_header_cannot_have_is_refused(header: str, cell: str, reason: str) -> None:
    # From a row: the row is rejected. In the template: the batch is refused.
    template = BatchTemplate.compile("s", "b", None, HeadTexts(headers=((header, "{{ a }}"),)))
    with pytest.raises(RenderError) as caught:
        template.render_head({"a": cell})
    assert (caught.value.reason, caught.value.column) == (reason, "a")
    more = (("List-Unsubscribe", "<https://a.example>"),) if header.endswith("-Post") else ()
    assert refusal(headers=((header, cell), *more)) == (reason, "headers[0].value")


def test_the_longest_header_has_998_bytes_in_one_line() -> None:
    data = mail(HeadTexts(headers=(("X-Own", "a" * 991),)), {})
    assert max(map(len, data.split(b"\r\n"))) == 998


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ((("Bcc", "eve@evil.example"),), "headers[0].name"),
        ((("Subject", "s"),), "headers[0].name"),
        ((("X-Outbox-Job", "1"),), "headers[0].name"),
        ((("x-OUTBOX-job", "1"),), "headers[0].name"),
        ((("X-", "1"),), "headers[0].name"),
        ((("X-A:B", "1"),), "headers[0].name"),
        ((("X-A\r\nBcc", "1"),), "headers[0].name"),
        ((("X-A", "1"), ("x-a", "2")), "headers[1].name"),
        ((("List-Unsubscribe-Post", ONE_CLICK),), "headers"),
    ],
)
def test_headers_that_are_not_allowed_are_refused(
    headers: tuple[tuple[str, str], ...], field: str
) -> None:
    assert refusal(headers=headers) == ("HEADER_INVALID", f"options.{field}")


def test_one_click_needs_an_https_uri_in_every_mail() -> None:
    post = ("List-Unsubscribe-Post", ONE_CLICK)
    mailto = ("List-Unsubscribe", "<mailto:leave@shop.example>")
    assert refusal(headers=(mailto, post)) == ("HEADER_INVALID", "headers")
    template = BatchTemplate.compile(
        "s", "b", None, HeadTexts(headers=(("List-Unsubscribe", "{{ u }}"), post))
    )
    template.render_head({"u": "<mailto:a@b.org>,<HTTPS://shop.example/u>"})
    for missing in ("", "<mailto:a@b.org>"):
        with pytest.raises(RenderError) as caught:
            template.render_head({"u": missing})
        assert caught.value.reason == "HEADER_INVALID"
        assert "https URI" in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["x", "a@b.org, c@d.org", "A <a@b.org>, B <c@d.org>", "A <a b@c.org>", "<>", "A a@b.org"],
)
def test_reply_to_is_one_address(text: str) -> None:
    assert refusal(reply_to=text) == ("REPLY_TO_INVALID", "reply_to")


def test_an_empty_reply_to_and_name_are_left_out() -> None:
    data = mail(HeadTexts("{{ r }}", "n"), {"r": " ", "n": "  "})
    assert "Reply-To" not in parsed(data)
    assert b"To: ann@b.org\r\n" in data


def test_a_reply_to_beyond_ascii_needs_smtputf8() -> None:
    template = BatchTemplate.compile("s", "b", None, HeadTexts("müller@bücher.example"))
    builder = MessageBuilder("a@b.org", "", template, max_bytes=10_000)
    built = builder.build("ann@b.org", {}, "<1@b.org>", datetime.now(UTC))
    assert built.needs_smtputf8
    assert "Reply-To: müller@bücher.example\r\n".encode() in built.data
