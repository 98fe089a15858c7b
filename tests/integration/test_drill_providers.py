"""The provider behaviours that a drill's inbox can simulate, as a client sees them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiosmtplib
import pytest

from outbox_server.deploy.drill.plan import KINDS, SLOW_REPLY_S
from outbox_server.deploy.drill.provider_troubles import PROVIDER_TROUBLES
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.trouble import InboxTrouble, Way
from tests.eventually import eventually


@asynccontextmanager
async def client(inbox: Inbox, helo: str = "client.x.test") -> AsyncIterator[aiosmtplib.SMTP]:
    smtp = aiosmtplib.SMTP(
        hostname="127.0.0.1",
        port=inbox.port,
        use_tls=False,
        start_tls=False,
        timeout=10,
        local_hostname=helo,
    )
    try:
        await smtp.connect()
        await smtp.login("drill", "drill")
        yield smtp
    finally:
        smtp.close()


async def send(smtp: aiosmtplib.SMTP, number: int, recipient: str = "to@y.test") -> str:
    """Return 'accepted', or the refusal as `code text`."""
    mail = f"Message-ID: <{number}@x.test>\r\n\r\nhello\r\n"
    try:
        await smtp.sendmail("a@x.test", [recipient], mail)
    except aiosmtplib.SMTPRecipientsRefused as error:
        [one] = error.recipients
        return f"{one.code} {one.message}"
    except aiosmtplib.SMTPResponseException as error:
        return f"{error.code} {error.message}"
    except aiosmtplib.SMTPServerDisconnected:
        return "disconnected"
    return "accepted"


def trouble_of(name: str, variant: str) -> InboxTrouble:
    profile = dataclasses.replace(PROVIDER_TROUBLES[name, variant], reply_delay_s=0)
    return InboxTrouble(Way.PROVIDER, profile=profile)


def test_every_provider_behaviour_is_a_kind_of_fault_with_the_same_variants() -> None:
    names = {name for name, _ in PROVIDER_TROUBLES}
    for name in names:
        variants = {variant for one, variant in PROVIDER_TROUBLES if one == name}
        assert variants == set(KINDS[name].variants or ("",))
        assert KINDS[name].strikes == "smtp"
    assert len(names) == 12


# The first refusal of a client that sends mail after mail on one connection, and the mails before
# it.
REFUSALS = {
    ("smtp_daily_quota", "gmail"): (5, "550 5.4.5 Daily user sending limit exceeded."),
    ("smtp_daily_quota", "exchange"): (5, "554 5.2.0 STOREDRV.Submission.Exception:Submission"),
    ("smtp_daily_quota", "ses"): (5, "454 Throttling failure: Daily message quota exceeded."),
    ("smtp_daily_quota", "workspace"): (5, "550 5.4.5 Daily SMTP relay limit exceeded"),
    ("smtp_hourly_quota", "cpanel"): (5, "550 Domain x.test has exceeded the max emails per h"),
    ("smtp_hourly_quota", "ionos"): (5, "450 Requested mail action not taken"),
    ("smtp_mails_per_connection", "421"): (2, "421 too many messages in this connection"),
    ("smtp_mails_per_connection", "451"): (2, "451 Requested action aborted"),
    ("smtp_mails_per_connection", "452"): (2, "452 4.3.2 Too many messages sent on this"),
    ("smtp_mails_per_connection", "503"): (2, "503 5.5.1 Error: send HELO/EHLO first"),
    ("smtp_rate", "gmail"): (2, "421 4.7.28 Our system has detected an unusual rate"),
    ("smtp_rate", "exchange"): (2, "421 4.4.2 Message submission rate"),
    ("smtp_rate", "ses"): (2, "454 Throttling failure: Maximum sending rate exceeded."),
    ("smtp_rate", "workspace"): (2, "450 4.2.1 Peak SMTP relay limit exceeded"),
    ("smtp_greylist", "rcpt"): (0, "450 4.2.0 <to@y.test>: Recipient address rejected: Greyl"),
    ("smtp_greylist", "reply"): (0, "451 4.7.1 Greylisting in action"),
    ("smtp_account_blocked", "exchange"): (0, "550 5.1.90 Your message can't be sent"),
    ("smtp_account_blocked", "gmail"): (0, "550 5.7.1 Email quota exceeded."),
    ("smtp_helo", ""): (0, "504 5.5.2 <container>: Helo command rejected"),
    ("smtp_mailbox_full", ""): (0, "452 4.2.2 <to@y.test>: the mailbox is full"),
    ("smtp_unknown_recipient", ""): (0, "550 5.1.1 <to@y.test>: User unknown"),
    ("smtp_content", ""): (0, "554 5.7.1 Message rejected because of its content"),
}
FOR_GOOD = {"smtp_unknown_recipient", "smtp_content"}


@pytest.mark.parametrize(("name", "variant"), REFUSALS)
async def test_the_inbox_refuses_as_the_provider_does_and_takes_mail_again_afterwards(
    inbox: Inbox, name: str, variant: str
) -> None:
    most, words = REFUSALS[name, variant]
    inbox.trouble = trouble_of(name, variant)
    async with client(inbox, helo="container") as smtp:
        for number in range(most):
            assert await send(smtp, number) == "accepted"
        assert (await send(smtp, most)).startswith(words)
    assert len(inbox.mails) == most
    assert inbox.refused == (["a@x.test"] if name in FOR_GOOD else [])
    inbox.trouble = None
    async with client(inbox, helo="container") as smtp:
        assert [await send(smtp, number) for number in range(8)] == ["accepted"] * 8


async def test_a_refused_recipient_leaves_nothing_behind_in_the_session(inbox: Inbox) -> None:
    inbox.trouble = trouble_of("smtp_greylist", "rcpt")
    async with client(inbox) as smtp:
        assert (await send(smtp, 1)).startswith("450")

        async def accepted() -> bool:
            return await send(smtp, 1) == "accepted"

        await eventually(accepted)
        assert (await send(smtp, 2, "other@y.test")).startswith("450")
    assert [mail.rcpt_tos for mail in inbox.mails] == [("to@y.test",)]


async def said_to(inbox: Inbox, *commands: str) -> list[str]:
    """Return the reply codes of greeting, EHLO and commands; '' means a closed connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", inbox.port)
    codes = []
    try:
        for command in ("", "EHLO x.test", *commands):
            if command:
                writer.write(f"{command}\r\n".encode())
            while (line := await reader.readline())[3:4] == b"-":
                pass
            codes.append(line[:3].decode())
    finally:
        writer.transport.abort()
    return codes


async def test_a_refused_command_starts_no_transaction(inbox: Inbox) -> None:
    inbox.trouble = trouble_of("smtp_account_blocked", "gmail")
    said = await said_to(inbox, "MAIL FROM:<a@x.test>", "RCPT TO:<b@y.test>")
    assert said == ["220", "250", "550", "503"]
    inbox.trouble = trouble_of("smtp_unknown_recipient", "")
    said = await said_to(inbox, "MAIL FROM:<a@x.test>", "RCPT TO:<b@y.test>", "DATA")
    assert said == ["220", "250", "250", "550", "503"]


async def test_a_refusal_that_closes_is_the_last_reply(inbox: Inbox) -> None:
    trouble = trouble_of("smtp_rate", "gmail")
    assert trouble.profile is not None
    [rate] = trouble.profile.rates
    none = dataclasses.replace(trouble.profile, rates=(dataclasses.replace(rate, most=0),))
    inbox.trouble = dataclasses.replace(trouble, profile=none)
    said = await said_to(inbox, "MAIL FROM:<a@x.test>", "NOOP")
    assert said == ["220", "250", "421", ""]


@pytest.mark.parametrize("variant", KINDS["smtp_mails_per_connection"].variants)
async def test_a_new_connection_takes_two_more_mails(inbox: Inbox, variant: str) -> None:
    inbox.trouble = trouble_of("smtp_mails_per_connection", variant)
    for _ in range(3):
        async with client(inbox) as smtp:
            said = [await send(smtp, number) for number in range(3)]
            assert said[:2] == ["accepted"] * 2
            assert said[2] != "accepted"
    assert len(inbox.mails) == 6


@pytest.mark.parametrize("variant", KINDS["smtp_too_many_connections"].variants)
async def test_two_connections_work_and_a_third_is_refused(inbox: Inbox, variant: str) -> None:
    trouble = trouble_of("smtp_too_many_connections", variant)
    inbox.trouble = trouble
    # Only new connections get a refusal in the greeting.
    assert trouble.of_connections == (variant == "exim")
    async with client(inbox) as first, client(inbox) as second:
        if variant == "exim":
            with pytest.raises(aiosmtplib.SMTPConnectError):
                async with client(inbox):
                    pass
        else:
            async with client(inbox) as third:
                assert (await send(third, 3)).startswith("432 4.3.2 STOREDRV.ClientSubmit")
        assert [await send(one, 1) for one in (first, second)] == ["accepted"] * 2
        first.close()
        await eventually(lambda: len(inbox.connections) == 1)
        async with client(inbox) as fourth:
            assert await send(fourth, 4) == "accepted"


async def test_connections_opened_before_the_fault_count(inbox: Inbox) -> None:
    async with client(inbox) as first, client(inbox) as second, client(inbox) as third:
        inbox.trouble = trouble_of("smtp_too_many_connections", "exchange")
        said = [await send(one, 1) for one in (third, second, first)]
        assert said[0].startswith("432")
        assert said[1:] == ["accepted"] * 2


async def test_a_slow_reply_comes_after_the_mail_was_taken(inbox: Inbox) -> None:
    profile = PROVIDER_TROUBLES["smtp_slow_reply", ""]
    assert profile.reply_delay_s == SLOW_REPLY_S
    inbox.trouble = InboxTrouble(
        Way.PROVIDER, profile=dataclasses.replace(profile, reply_delay_s=0.3)
    )
    async with client(inbox) as smtp:
        sending = asyncio.create_task(send(smtp, 1))
        await eventually(lambda: inbox.mails)
        inbox.trouble = None
        assert await sending == "accepted"
        assert time.time() - inbox.mails[0].received_at >= 0.3


async def test_accounts_are_counted_separately_from_senders_without_one(inbox: Inbox) -> None:
    inbox.trouble = trouble_of("smtp_daily_quota", "gmail")
    async with client(inbox) as smtp:
        for number in range(5):
            await send(smtp, number)
        assert (await send(smtp, 5)).startswith("550 5.4.5")
    async with aiosmtplib.SMTP(
        hostname="127.0.0.1", port=inbox.port, use_tls=False, start_tls=False
    ) as anonymous:
        assert await send(anonymous, 6) == "accepted"
