from __future__ import annotations

import base64
import email.header
import email.utils
import re
from datetime import UTC, datetime, timedelta, timezone
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from outbox_server.shared.database.message_ids import message_id_for
from outbox_server.shared.mail.message import (
    MessageBuilder,
    MessageError,
    format_date,
    wire_address,
)
from outbox_server.shared.templates.batch import BatchTemplate, RenderError

NOW = datetime(2026, 11, 24, 9, 5, 3, tzinfo=UTC)
LIMIT = 1024 * 1024
ID = "<outbox.7.demo@shop.example>"
HEADERS = ["From", "To", "Subject", "Date", "Message-ID", "MIME-Version"]
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300)
# Characters that are difficult for a transfer encoding, more often than at random.
AWKWARD = st.text(alphabet=" \t\n\r.=?_-é名🎉\u2028\x0b\x0cFrom", max_size=200)


def parse(data: bytes) -> EmailMessage:
    assert data.endswith(b"\r\n")
    for line in data.split(b"\r\n"):
        assert len(line) <= 998
        assert b"\n" not in line
        assert b"\r" not in line
    assert not set(range(32)).difference(b"\r\n\t").intersection(data)
    head = data.partition(b"\r\n\r\n")[0]
    assert all(line.strip() for line in head.split(b"\r\n"))
    for word in re.findall(rb"=\?utf-8\?b\?([^?]*)\?=", head):
        base64.b64decode(word).decode("utf-8")
    assert all(len(line) <= 78 for line in head.split(b"\r\n") if not line.startswith(b"To:"))
    message = BytesParser(policy=policy.default).parsebytes(data)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def build(subject: str, body: str | None, html: str | None, to: str = "ann@example.org") -> bytes:
    builder = MessageBuilder(
        "shop@shop.example", "", BatchTemplate.compile(None, None, None), max_bytes=LIMIT
    )
    values = {"subject": subject, "body": body or "", "html": html or ""}
    return builder.build(to, values, ID, NOW).data


def content(part: EmailMessage) -> str:
    if part["Content-Transfer-Encoding"] != "7bit":
        assert all(len(line) <= 76 for line in str(part.get_payload()).splitlines())
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode("utf-8")


def lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def test_a_text_mail_has_the_headers_and_nothing_else() -> None:
    message = parse(build("Hello", "Dear Ann\n", None))
    assert message.keys() == [*HEADERS, "Content-Type", "Content-Transfer-Encoding"]
    assert message["From"] == "shop@shop.example"
    assert message["To"] == "ann@example.org"
    assert message["Subject"] == "Hello"
    assert message["Message-ID"] == ID
    assert message["Date"].datetime == NOW
    assert message.get_content_type() == "text/plain"
    assert message["Content-Transfer-Encoding"] == "7bit"
    assert message.get_content() == "Dear Ann\r\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain", "7bit"),
        ("Viele Grüße aus der schönen Stadt am Rhein", "quoted-printable"),
        ("名前", "base64"),
    ],
)
def test_a_text_uses_the_shortest_encoding(text: str, encoding: str) -> None:
    assert parse(build("s", text, None))["Content-Transfer-Encoding"] == encoding


def test_an_html_mail_is_one_part() -> None:
    message = parse(build("Hello", None, "<p>Dear Ann</p>"))
    assert message.get_content_type() == "text/html"
    assert message.get_content().rstrip() == "<p>Dear Ann</p>"


def test_text_and_html_are_alternatives_with_the_html_last() -> None:
    message = parse(build("Hello", "text", "<p>html</p>"))
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert [part.get_content() for part in message.iter_parts()] == ["text", "<p>html</p>"]


@given(body=TEXT | AWKWARD, html=TEXT | AWKWARD)
@example(body="trailing blank \nand tab\t\n ", html="é trailing blank \nand tab\t\n ")
@example(body=".\n..\n.x", html="é\n.\n..\n.é")
@example(body="x" * 999, html="é" + "x" * 5000)
@example(body="a\0b", html="\x7f")
def test_every_text_arrives_unchanged_except_for_its_line_ends(body: str, html: str) -> None:
    if body and html:
        message = parse(build("s", body, html))
        parts = list(message.iter_parts())
        assert [lines(content(part)) for part in parts] == [lines(body), lines(html)]  # type: ignore[arg-type]
    for text, kind in ((body, "plain"), (html, "html")):
        if text:
            message = parse(
                build("s", text if kind == "plain" else None, text if kind == "html" else None)
            )
            arrived = lines(content(message))
            assert arrived in {lines(text), lines(text) + "\n"}


@given(TEXT | AWKWARD)
@example("=?utf-8?q?hidden?=")
@example("word " * 60)
@example("a" * 590)
@example("a" * 66 + " " * 90 + "b")
@example("two  blanks " * 20)
@example("名" * 190)
def test_every_subject_arrives_unchanged(subject: str) -> None:
    subject = subject.strip()
    if "\n" in subject or "\r" in subject:
        with pytest.raises(RenderError):
            build(subject, "b", None)
        return
    # Each 45 bytes take 75 as encoded words.
    assume(len(subject.encode()) <= 590)
    message = parse(build(subject, "b", None))
    head = email.message_from_bytes(build(subject, "b", None))
    words = email.header.decode_header(head["Subject"].replace("\r\n", ""))
    decoded = "".join(
        word if isinstance(word, str) else word.decode(charset or "ascii")
        for word, charset in words
    )
    assert decoded == subject
    assert len(message.get_all("Subject", [])) == 1


@given(name=TEXT)
@example('Quoted "name" \\ here')
@example("Müller, Söhne & Co. KG, Abteilung für außerordentlich lange Namen")
@example("x\r\nBcc: victim@example.org")
@example("=?utf-8?q?x?= <evil@example.org>,")
def test_a_display_name_cannot_inject_an_address(name: str) -> None:
    template = BatchTemplate.compile("s", "b", None)
    data = (
        MessageBuilder("shop@shop.example", name, template, max_bytes=LIMIT)
        .build("a@b.org", {}, ID, NOW)
        .data
    )
    message = parse(data)
    assert message.keys()[:6] == HEADERS
    addresses = message["From"].addresses
    assert [address.addr_spec for address in addresses] == ["shop@shop.example"]


def test_a_display_name_arrives_unchanged() -> None:
    template = BatchTemplate.compile("s", "b", None)
    for name in ("Shop", "Ann (Shop)", 'The "Shop" \\', "Müller & Söhne", "名前" * 40, "a. b, c;"):
        builder = MessageBuilder("shop@shop.example", name, template, max_bytes=LIMIT)
        message = parse(builder.build("a@b.org", {}, ID, NOW).data)
        head = email.message_from_bytes(message.as_bytes())["From"]
        # Python's structured parser puts spaces between the encoded words of a long name.
        text = str(email.header.make_header(email.header.decode_header(head.replace("\n", ""))))
        assert email.utils.parseaddr(text)[0] == name or text.startswith(f"{name} <")


HOSTILE = [
    "x\r\nBcc: victim@example.org",
    "x\nBcc: victim@example.org",
    "x\rBcc: victim@example.org",
    "x\r\n\r\nbody",
    "x\r\n.\r\nMAIL FROM:<evil@example.org>",
    "x\u2028Bcc: victim@example.org",
    "x\x85Bcc: victim@example.org",
    "x\x0bBcc: victim@example.org",
    "x\0Bcc: victim@example.org",
    "=?utf-8?q?x=0D=0ABcc:_victim@example.org?=",
]


@pytest.mark.parametrize("word", ["x", "xxxxxxxxx ", "\u00e4", "\U0001f600"])
def test_a_subject_has_at_most_998_bytes_as_it_is_sent(word: str) -> None:
    template = BatchTemplate.compile("{{ v }}", "b", None)
    builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=LIMIT)

    reasons = set()

    def size(words: int) -> int | None:
        try:
            data = builder.build("ann@example.org", {"v": word * words}, ID, NOW).data
        except (MessageError, RenderError) as error:
            reasons.add(error.reason)
            return None
        sent = re.search(rb"\r\nSubject: (.*?)\r\nDate:", data, re.DOTALL)
        assert sent is not None
        return len(sent[1])

    sizes = [size(words) for words in range(1, 1_000)]
    longest = sizes.index(None)
    assert 850 < (sizes[longest - 1] or 0) <= 998
    assert set(sizes[longest:]) == {None}
    assert size(51_000) is None
    assert reasons == {"SUBJECT_TOO_LONG"}


@pytest.mark.parametrize("value", HOSTILE)
def test_no_cell_adds_a_header(value: str) -> None:
    template = BatchTemplate.compile("Hi {{ v }} there", "{{ v }}", "{{ v }}")
    builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=LIMIT)
    if "\r" in value or "\n" in value:
        with pytest.raises(RenderError) as caught:
            builder.build("ann@example.org", {"v": value}, ID, NOW)
        assert caught.value.reason == "SUBJECT_LINE_BREAK"
        template = BatchTemplate.compile("s", "{{ v }}", "{{ v }}")
        builder = MessageBuilder("shop@shop.example", "Shop", template, max_bytes=LIMIT)
    data = builder.build("ann@example.org", {"v": value}, ID, NOW).data
    message = parse(data)
    assert message.keys() == [*HEADERS, "Content-Type"]
    assert len(list(message.iter_parts())) == 2


@pytest.mark.parametrize(
    "recipient",
    [
        "ann@example.org, victim@example.org",
        "ann@example.org;victim@example.org",
        "ann@example.org\r\nBcc: victim@example.org",
        "ann@example.org\nx",
        "ann@example.org\u2028x",
        "ann@exam ple.org",
        "<ann@example.org>",
        "ann@example.org> SIZE=1",
        "ann",
        "",
        "a@b@c.org",
    ],
)
def test_no_recipient_adds_a_recipient_or_a_header(recipient: str) -> None:
    with pytest.raises(MessageError) as caught:
        build("s", "b", None, to=recipient)
    assert caught.value.reason == "ADDRESS_INVALID"


def test_no_message_id_adds_a_header() -> None:
    builder = MessageBuilder("a@b.org", "", BatchTemplate.compile("s", "b", None), max_bytes=LIMIT)
    with pytest.raises(MessageError):
        builder.build("a@b.org", {}, "<a@b>\r\nBcc: c@d.org", NOW)


def test_no_body_can_close_its_part() -> None:
    template = BatchTemplate.compile("s", "{{ v }}", "<p>")
    builder = MessageBuilder("shop@shop.example", "", template, max_bytes=LIMIT)
    first = parse(builder.build("a@b.org", {"v": "x"}, ID, NOW).data)
    boundary = first.get_boundary()
    value = f"x\n--{boundary}\nContent-Type: text/html\n\n<b>\n--{boundary}--\n"
    message = parse(builder.build("a@b.org", {"v": value}, ID, NOW).data)
    parts = [part for part in message.iter_parts() if isinstance(part, EmailMessage)]
    assert [part.get_content_type() for part in parts] == ["text/plain", "text/html"]
    assert lines(content(parts[0])) == value


def test_an_international_domain_is_sent_as_punycode() -> None:
    builder = MessageBuilder(
        "post@bücher.example", "", BatchTemplate.compile("s", "b", None), max_bytes=LIMIT
    )
    message = builder.build("ann@köln.example", {}, ID, NOW)
    assert builder.sender == "post@xn--bcher-kva.example"
    assert message.recipient == "ann@xn--kln-sna.example"
    assert not message.needs_smtputf8
    assert message.data.isascii()


def test_an_international_local_part_needs_smtputf8() -> None:
    template = BatchTemplate.compile("s", "b", None)
    message = MessageBuilder("a@b.org", "", template, max_bytes=LIMIT).build(
        "jürgen@köln.example", {}, ID, NOW
    )
    assert message.needs_smtputf8
    assert message.recipient == "jürgen@köln.example"
    assert "To: jürgen@köln.example\r\n".encode() in message.data
    assert (
        MessageBuilder("ü@b.org", "", template, max_bytes=LIMIT)
        .build("a@b.org", {}, ID, NOW)
        .needs_smtputf8
    )


def test_a_message_id_is_stable_and_belongs_to_the_installation() -> None:
    first = message_id_for(42, "shop@bücher.example", "prod-1")
    assert first == "<outbox.42.prod-1@xn--bcher-kva.example>"
    assert first == message_id_for(42, "shop@bücher.example", "prod-1")
    assert first != message_id_for(42, "shop@bücher.example", "prod-2")
    with pytest.raises(ValueError, match="installation_id"):
        message_id_for(42, "shop@b.example", "a@b>")


@given(st.datetimes(min_value=datetime(1971, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_a_date_round_trips_to_the_second(moment: datetime) -> None:
    text = format_date(moment.astimezone(timezone(timedelta(hours=5, minutes=30))))
    assert email.utils.parsedate_to_datetime(text) == moment.replace(microsecond=0)


def test_a_date_has_the_format_of_rfc_5322() -> None:
    assert format_date(NOW) == "Tue, 24 Nov 2026 09:05:03 +0000"


def test_the_mails_of_a_batch_do_not_leak_into_one_another() -> None:
    template = BatchTemplate.compile("Hi {{ n }}", "Dear {{ n }}", "<p>{{ n }}</p>")
    builder = MessageBuilder("a@b.org", "", template, max_bytes=LIMIT)
    for name in ("Ann", "Bob", "Bob", "名前", "Ann"):
        message = parse(builder.build(f"{name.encode().hex()}@b.org", {"n": name}, ID, NOW).data)
        assert message["Subject"] == f"Hi {name}"
        texts = [part.get_content() for part in message.iter_parts()]
        assert texts == [f"Dear {name}", f"<p>{name}</p>"]


def test_a_plain_address_is_its_own_wire_form() -> None:
    assert wire_address("Ann@Example.org") == "Ann@Example.org"
