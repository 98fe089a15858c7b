"""Each mail server without special limits."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from outbox_server.shared.states import AttemptOutcome, JobState
from tests.eventually import eventually
from tests.listeners import listeners
from tests.mail_servers.authority import Authority
from tests.mail_servers.conftest import Configure
from tests.mail_servers.exim import Exim
from tests.mail_servers.opensmtpd import OpenSmtpd
from tests.mail_servers.postfix import Postfix
from tests.mail_servers.sending import ODD_BODIES, sending
from tests.mail_servers.server import UNKNOWN, USERNAME, MailServer


@pytest.fixture(params=[Postfix, Exim, OpenSmtpd], ids=lambda kind: kind.name)
async def server(
    request: pytest.FixtureRequest, authority: Authority, tmp_path: Path
) -> AsyncIterator[MailServer]:
    async with request.param(tmp_path / "server", authority) as running:
        yield running


async def test_the_server_listens_on_its_port_only_on_loopback(server: MailServer) -> None:
    assert listeners(server.root.processes()) == {f"0100007F:{server.port:04X}"}


async def test_stopping_the_server_ends_every_process_and_removes_its_files(
    authority: Authority, tmp_path: Path
) -> None:
    for kind in (Postfix, Exim, OpenSmtpd):
        server = kind(tmp_path / kind.name, authority)
        await server.start()
        assert server.root.processes()
        await server.stop()
        assert not server.root.processes()
        assert not server.root.path.exists()


async def test_the_server_delivers_after_starttls_and_auth(server: MailServer) -> None:
    def send() -> None:
        with smtplib.SMTP("127.0.0.1", server.port, "client.example.com", timeout=30) as client:
            server.authenticate(client)
            mail = "From: s@x.test\r\nTo: r@y.test\r\nMessage-ID: <1@x.test>\r\n\r\n.dot\r\n"
            client.sendmail("s@x.test", ["r@y.test"], mail)

    await asyncio.to_thread(send)
    [mail] = await eventually(server.mails)
    assert mail.message_id == "<1@x.test>"
    assert "<s@x.test>" in mail.trace
    assert mail.parsed.get_content() == ".dot\n"
    await eventually(lambda: server.queued() == 0)


async def test_the_server_refuses_a_wrong_password_and_mail_without_auth(
    server: MailServer,
) -> None:
    context = ssl.create_default_context(cadata=server.authority.pem)

    def attempt() -> None:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as client:
            client.ehlo("client.example.com")
            assert not client.has_extn("auth")
            client.starttls(context=context)
            client.ehlo("client.example.com")
            with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
                client.login(USERNAME, "wrong")
            assert refused.value.smtp_code == 535
            with pytest.raises((smtplib.SMTPSenderRefused, smtplib.SMTPRecipientsRefused)):
                client.sendmail("s@x.test", ["r@y.test"], "Subject: x\r\n\r\nx\r\n")

    await asyncio.to_thread(attempt)
    assert server.mails() == []


async def test_odd_mails_arrive_once_and_unchanged(
    configure: Configure, server: MailServer
) -> None:
    async with sending(server, configure()) as run:
        scheduled = await run.schedule(await run.sender(), ODD_BODIES)
        await run.check_all_sent(scheduled)


async def test_an_unknown_recipient_fails_alone(configure: Configure, server: MailServer) -> None:
    unknown = dict.fromkeys(("r2", "r3", "r9", "r20"), UNKNOWN)
    async with sending(server, configure()) as run:
        scheduled = await run.schedule(await run.sender(), **unknown)
        known = [mail for mail in scheduled if mail.recipient != UNKNOWN]
        await run.check_arrived(known)
        for mail in scheduled:
            if mail not in known:
                [attempt] = await run.world.attempts(mail.job)
                # Postfix and Exim reply 550, OpenSMTPD 524.
                assert attempt.outcome is AttemptOutcome.PERMANENT_FAILURE
                assert not attempt.counted
                assert await run.world.in_state(JobState.FAILED) >= {mail.job}


async def test_the_senders_own_private_ca_is_trusted(
    configure: Configure, server: MailServer
) -> None:
    async with sending(server, configure(smtp_ca="")) as run:
        scheduled = await run.schedule(await run.sender(smtp_ca=server.authority.pem))
        await run.check_all_sent(scheduled)


async def test_a_server_with_a_certificate_of_an_unknown_ca_gets_no_mail(
    configure: Configure, server: MailServer
) -> None:
    async with sending(server, configure(smtp_ca="")) as run:
        [mail] = await run.schedule(await run.sender(smtp_ca=Authority().pem), ["secret\n"])

        async def tried() -> bool:
            return bool(await run.world.attempts(mail.job))

        await eventually(tried)
        [first, *_] = await run.world.attempts(mail.job)
        assert first.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert "certificate" in (first.message or "")
    assert server.mails() == []
