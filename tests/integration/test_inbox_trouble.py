"""The faults of the inbox, from the view of a client."""

from __future__ import annotations

import asyncio

import aiosmtplib
import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.trouble import (
    LONG_LINE,
    OF_CONNECTIONS,
    PHASES,
    InboxTrouble,
    Way,
)
from tests.eventually import eventually

MAIL = b"Message-ID: <1@x.test>\r\n\r\nhello\r\n"
# A client that gets no answer gives up.
GONE = (
    aiosmtplib.SMTPConnectError,
    aiosmtplib.SMTPServerDisconnected,
    aiosmtplib.SMTPTimeoutError,
    aiosmtplib.SMTPReadTimeoutError,
)


async def send(inbox: Inbox, limit: float = 10) -> None:
    async with aiosmtplib.SMTP(
        hostname="127.0.0.1", port=inbox.port, use_tls=False, start_tls=False, timeout=limit
    ) as smtp:
        await smtp.login("anybody", "anything")
        await smtp.sendmail("a@x.test", ["to@y.test"], MAIL)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", [Way.HANG, Way.CLOSE])
async def test_the_inbox_is_silent_in_one_phase(inbox: Inbox, phase: str, way: Way) -> None:
    inbox.trouble = InboxTrouble(way, phase)
    hangs = way is Way.HANG
    with pytest.raises(GONE):
        await send(inbox, 0.2 if hangs else 10)
    # A complete mail is stored, although the client got no reply.
    assert len(inbox.mails) == (phase == "reply")
    inbox.trouble = None
    await send(inbox)


async def test_a_cut_ends_a_hanging_connection(inbox: Inbox) -> None:
    inbox.trouble = InboxTrouble(Way.HANG, "rcpt")
    sending = asyncio.create_task(send(inbox))
    await eventually(lambda: any(one.phase == "" for one in inbox.connections))
    inbox.trouble = None
    inbox.cut()
    with pytest.raises(aiosmtplib.SMTPServerDisconnected):
        await sending
    assert inbox.mails == []


@pytest.mark.parametrize("phase", ["mail", "rcpt", "reply"])
async def test_a_permanent_refusal_is_recorded_and_its_mail_not_stored(
    inbox: Inbox, phase: str
) -> None:
    inbox.trouble = InboxTrouble(Way.REFUSE, phase, "552 5.2.2 full")
    with pytest.raises(aiosmtplib.SMTPException) as refusal:
        await send(inbox)
    assert "552" in str(refusal.value)
    assert inbox.refused == ["a@x.test"]
    assert inbox.mails == []
    inbox.trouble = InboxTrouble(Way.REFUSE, phase, "450 4.2.1 busy")
    with pytest.raises(aiosmtplib.SMTPException):
        await send(inbox)
    assert inbox.refused == ["a@x.test"]


async def test_a_wrong_password_is_refused(inbox: Inbox) -> None:
    inbox.trouble = InboxTrouble(Way.REFUSE, "auth", "535 5.7.8 wrong")
    with pytest.raises(aiosmtplib.SMTPAuthenticationError):
        await send(inbox)
    assert "auth" in OF_CONNECTIONS


async def test_replies_come_in_pieces_or_as_a_line_of_a_megabyte(inbox: Inbox) -> None:
    inbox.trouble = InboxTrouble(Way.PIECES)
    await send(inbox)
    assert len(inbox.mails) == 1
    inbox.trouble = InboxTrouble(Way.LONG, "mail")
    reader, writer = await asyncio.open_connection("127.0.0.1", inbox.port, limit=2 * LONG_LINE)
    writer.write(b"HELO x\r\nMAIL FROM:<a@x.test>\r\n")
    lengths = [len(await reader.readline()) for _ in range(3)]
    writer.close()
    assert lengths[2] > LONG_LINE
