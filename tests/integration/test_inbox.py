"""The development inbox over SMTP."""

from __future__ import annotations

import asyncio
import mailbox
import signal
import sys
import time
from pathlib import Path

import aiosmtplib
import pytest

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.ports import free_port
from outbox_server.deploy.record import read_record
from tests.eventually import eventually

MAIL = b"From: a@x.test\r\nMessage-ID: <1@x.test>\r\n\r\nHello\r\n"


async def client(inbox: Inbox) -> aiosmtplib.SMTP:
    smtp = aiosmtplib.SMTP(hostname="127.0.0.1", port=inbox.port, use_tls=False, start_tls=False)
    await smtp.connect()
    return smtp


async def send(inbox: Inbox, content: bytes = MAIL, sender: str = "a@x.test") -> None:
    async with await client(inbox) as smtp:
        await smtp.sendmail(sender, ["to@y.test", "too@y.test"], content)


def stored(inbox: Inbox) -> list[bytes]:
    return [(inbox.maildir / "new" / mail.file).read_bytes() for mail in inbox.mails]


@pytest.mark.parametrize(
    "content",
    [
        MAIL,
        b"Subject: dots\r\n\r\n.\r\n..\r\n.hidden\r\nend.\r\n",
        b"Subject: 8 bits\r\n\r\n" + bytes(range(0x80, 0x100)) + b"\r\n\r\n\r\n",
        b"\r\nno header\r\n",
        b"Subject: long\r\n\r\n" + b"x" * 998 + b"\r\n" + b"line\r\n" * 50_000,
    ],
)
async def test_a_mail_is_stored_byte_by_byte(inbox: Inbox, content: bytes) -> None:
    await send(inbox, content)

    assert stored(inbox) == [content]


async def test_the_maildir_opens_with_the_standard_library(inbox: Inbox) -> None:
    await send(inbox)
    await send(inbox)

    messages = list(mailbox.Maildir(inbox.maildir, create=False))

    assert [message["Message-ID"] for message in messages] == ["<1@x.test>"] * 2
    assert not list((inbox.maildir / "tmp").iterdir())


async def test_the_record_holds_sender_message_recipient_and_times(inbox: Inbox) -> None:
    before = time.time()
    async with await client(inbox) as smtp:
        connected = time.time()
        await smtp.sendmail("a@x.test", ["to@y.test", "too@y.test"], MAIL)
    after = time.time()

    (mail,) = inbox.mails
    assert mail.mail_from == "a@x.test"
    assert mail.rcpt_tos == ("to@y.test", "too@y.test")
    assert mail.message_id == "<1@x.test>"
    assert mail.bytes == len(MAIL)
    assert before <= connected <= mail.started_at <= mail.received_at <= after
    assert read_record(inbox.record) == [mail]


async def test_a_mail_starts_at_its_mail_from_and_ends_with_its_body(inbox: Inbox) -> None:
    async with await client(inbox) as smtp:
        connected = time.time()
        await smtp.mail("a@x.test")
        opened = time.time()
        await smtp.rcpt("to@y.test")
        body_began = time.time()
        await smtp.data(MAIL)

    (mail,) = inbox.mails
    assert connected <= mail.started_at <= opened
    assert mail.received_at >= body_began


async def test_each_mail_of_one_connection_has_its_own_times(inbox: Inbox) -> None:
    async with await client(inbox) as smtp:
        for _ in range(3):
            await smtp.sendmail("a@x.test", ["to@y.test"], MAIL)

    times = [at for mail in inbox.mails for at in (mail.started_at, mail.received_at)]
    assert len(times) == 6
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("headers", "message_id"),
    [
        (b"message-id:<1@x.test>\r\n", "<1@x.test>"),
        (b"Message-ID:\r\n <folded@x.test>\r\nTo: b\r\n", "<folded@x.test>"),
        (b"Subject: none\r\n", ""),
    ],
)
async def test_the_message_id_is_read_from_the_headers_alone(
    inbox: Inbox, headers: bytes, message_id: str
) -> None:
    await send(inbox, headers + b"\r\nMessage-ID: <in.the.body@x.test>\r\n")

    assert inbox.mails[0].message_id == message_id


async def test_non_ascii_addresses_are_offered_and_accepted(inbox: Inbox) -> None:
    async with await client(inbox) as smtp:
        await smtp.ehlo()
        offered = {
            name for name in ("size", "8bitmime", "smtputf8") if smtp.supports_extension(name)
        }
        await smtp.sendmail(
            "j\u00fcrgen@x.test",
            ["\u4f60\u597d@y.test"],
            MAIL,
            mail_options=["SMTPUTF8", "BODY=8BITMIME"],
        )

    assert offered == {"size", "8bitmime", "smtputf8"}
    assert inbox.mails[0].mail_from == "j\u00fcrgen@x.test"
    assert inbox.mails[0].rcpt_tos == ("\u4f60\u597d@y.test",)
    assert read_record(inbox.record) == inbox.mails


async def test_a_bounce_with_an_empty_sender_is_accepted(inbox: Inbox) -> None:
    async with await client(inbox) as smtp:
        await smtp.ehlo()
        await smtp.execute_command(b"MAIL", b"FROM:<>")
        await smtp.rcpt("to@y.test")
        await smtp.data(MAIL)

    assert inbox.mails[0].mail_from == "<>"


async def test_a_mail_over_the_size_limit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with Inbox(tmp_path / "inbox", size_limit=1000) as inbox:
        async with await client(inbox) as smtp:
            await smtp.ehlo()
            await smtp.mail("a@x.test")
            await smtp.rcpt("to@y.test")
            with pytest.raises(aiosmtplib.SMTPDataError) as refused:
                await smtp.data(b"\r\n" + b"line\r\n" * 200)
            await smtp.sendmail("a@x.test", ["to@y.test"], MAIL)

        assert refused.value.code == 552
        assert stored(inbox) == [MAIL]


async def test_a_connection_that_dies_in_the_body_leaves_nothing(inbox: Inbox) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", inbox.port)
    for command in (
        b"",
        b"EHLO x\r\n",
        b"MAIL FROM:<a@x.test>\r\n",
        b"RCPT TO:<b@y.test>\r\n",
        b"DATA\r\n",
    ):
        writer.write(command)
        while (await reader.readline())[3:4] == b"-":
            pass
    writer.write(b"Subject: half\r\n")
    writer.close()
    await writer.wait_closed()
    await send(inbox)

    assert stored(inbox) == [MAIL]
    assert len(read_record(inbox.record)) == 1


async def test_concurrent_connections_neither_lose_nor_mix_mails(inbox: Inbox) -> None:
    contents = {f"m{n}@x.test": b"Subject: %d\r\n\r\n%s\r\n" % (n, b"y" * n) for n in range(100)}

    await asyncio.gather(*(send(inbox, content, name) for name, content in contents.items()))

    kept = {
        mail.mail_from: content for mail, content in zip(inbox.mails, stored(inbox), strict=True)
    }
    assert kept == contents


async def test_an_inbox_keeps_its_port_mails_and_record_over_a_restart(
    tmp_path: Path,
) -> None:
    inbox = Inbox(tmp_path / "inbox")
    async with inbox:
        port = inbox.port
        idle = await client(inbox)
        await send(inbox)
    await eventually(lambda: not idle.is_connected)
    async with inbox:
        assert inbox.port == port
        await send(inbox)

    assert len(read_record(inbox.record)) == 2
    assert len(list((inbox.maildir / "new").iterdir())) == 2


async def test_a_port_in_use_is_an_error_that_names_it(inbox: Inbox, tmp_path: Path) -> None:
    with pytest.raises(LocalServerError, match="address already in use"):
        await Inbox(tmp_path / "other", port=inbox.port).start()


async def test_the_inbox_runs_as_a_separate_process(tmp_path: Path) -> None:
    port, maildir = free_port(), tmp_path / "inbox"
    argv = [sys.executable, "-m", "outbox_server.deploy.embedded.inbox"]
    argv += ["--port", str(port), "--maildir", str(maildir)]
    child = Child("inbox", argv, log=tmp_path / "log", cwd=Path.cwd())
    child.start()
    try:

        async def answers() -> bool:
            try:
                await aiosmtplib.send(
                    MAIL,
                    sender="a@x.test",
                    recipients=["b@y.test"],
                    hostname="127.0.0.1",
                    port=port,
                )
            except aiosmtplib.SMTPException:
                return False
            return True

        await eventually(answers)
        assert [mail.bytes for mail in read_record(maildir / "record.jsonl")] == [len(MAIL)]
    finally:
        await child.stop((signal.SIGTERM, 5.0))

    assert await child.wait() == 0
