"""Replies of any shape, split at any byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.smtp.reply_parser import (
    MAX_LINE_BYTES,
    MAX_REPLY_BYTES,
    MalformedReply,
    ReplyParser,
    WireReply,
)


def parse(*pieces: bytes) -> list[WireReply]:
    parser = ReplyParser()
    for piece in pieces:
        parser.feed(piece)
    return list(parser.replies)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"250 2.1.0 ok\r\n", [(250, "2.1.0 ok")]),
        (b"250\r\n", [(250, "")]),
        (b"250 \r\n", [(250, "")]),
        (b"250\n", [(250, "")]),
        (b"250 ok\n", [(250, "ok")]),
        (b"250\tok\r\n", [(250, "ok")]),
        (b"250-a\r\n250-b\r\n250 c\r\n", [(250, "a\nb\nc")]),
        (b"250-a\r\n250\r\n", [(250, "a\n")]),
        (b"250-\r\n250 c\r\n", [(250, "\nc")]),
        # The last line decides.
        (b"250-a\r\n550 b\r\n", [(550, "a\nb")]),
        (b"550-a\r\n250 b\r\n", [(250, "a\nb")]),
        (b"\r\n\n \t\r\n250 ok\r\n", [(250, "ok")]),
        (b"250-a\r\n\r\n250 b\r\n\r\n354 go\r\n", [(250, "a\nb"), (354, "go")]),
        (
            b"250 ok\r\n550-no\r\n550 never\r\n354 go\r\n",
            [(250, "ok"), (550, "no\nnever"), (354, "go")],
        ),
        (b"250 \xff\xfe \xc3\xbc\r\n", [(250, "\ufffd\ufffd \u00fc")]),
        (b"299 unknown\r\n599 unknown\r\n", [(299, "unknown"), (599, "unknown")]),
        (b"250 o", []),
        (b"250-ok\r\n", []),
        (b"\r\n\r\n", []),
    ],
)
def test_complete_replies_are_parsed(data: bytes, expected: list[tuple[int, str]]) -> None:
    assert [tuple(reply) for reply in parse(data)] == expected
    # Byte by byte, the result is the same.
    assert [
        tuple(reply) for reply in parse(*(data[i : i + 1] for i in range(len(data))))
    ] == expected


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"25\r\n",
        b"25x ok\r\n",
        b"x250 ok\r\n",
        b"250x ok\r\n",
        b"2500 ok\r\n",
        b"250_ok\r\n",
        b"150 what\r\n",
        b"600 what\r\n",
        b"000 what\r\n",
        b"\xff\xfe\x00\r\n",
        b" 250 ok\r\n",
        "\u0662\u0665\u0660 ok\r\n".encode(),
        b"250-a\r\nb\r\n",
    ],
)
def test_input_that_is_not_smtp_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedReply):
        parse(data)


def test_replies_before_invalid_input_are_kept() -> None:
    parser = ReplyParser()
    with pytest.raises(MalformedReply, match="the server does not speak SMTP"):
        parser.feed(b"552 no\r\nhello\r\n")
    assert [reply.code for reply in parser.replies] == [552]


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_the_length_of_a_line_is_limited(end: bytes) -> None:
    fits = b"250 " + b"x" * (MAX_LINE_BYTES - 6) + b"\r\n"
    assert len(parse(fits)) == 1
    with pytest.raises(MalformedReply, match="a line of more than 8192 bytes"):
        parse(b"250 " + b"x" * MAX_LINE_BYTES + end)
    with pytest.raises(MalformedReply, match="a line of more than 8192 bytes"):
        parse(*[b"x" * 1_000] * 9)


@pytest.mark.parametrize("line", [b"250-" + b"x" * 96 + b"\r\n", b"\r\n"])
def test_the_length_of_a_reply_is_limited(line: bytes) -> None:
    count = MAX_REPLY_BYTES // len(line)
    assert parse(line * (count - 4), b"250 ok\r\n")
    with pytest.raises(MalformedReply, match="a reply of more than 32768 bytes"):
        parse(line * (count + 1))
    # The limit applies to each reply, not to a session.
    parser = ReplyParser()
    for _ in range(2 * count):
        parser.feed(b"250 " + b"x" * 94 + b"\r\n")
        parser.replies.clear()


LINE = st.tuples(
    st.integers(200, 599),
    st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20),
)


@given(
    replies=st.lists(st.tuples(st.lists(LINE, max_size=3), LINE), max_size=6),
    ends=st.randoms(use_true_random=False),
)
def test_replies_split_at_any_byte_are_parsed_the_same(
    replies: list[tuple[list[tuple[int, str]], tuple[int, str]]], ends: object
) -> None:
    data = b"".join(
        b"".join(f"{code}-{text}\r\n".encode() for code, text in before)
        + f"{last[0]} {last[1]}\r\n".encode()
        for before, last in replies
    )
    whole = parse(data)
    assert [reply.code for reply in whole] == [last[0] for _, last in replies]
    pieces, rest = [], data
    while rest:
        size = ends.randint(1, len(rest))  # type: ignore[attr-defined]  # a Random
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parse(*pieces) == whole
