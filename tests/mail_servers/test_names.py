"""Servers that require a fully qualified name, or an address literal, in EHLO."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.mail_servers.authority import Authority
from tests.mail_servers.conftest import Configure
from tests.mail_servers.exim import Exim
from tests.mail_servers.opensmtpd import OpenSmtpd
from tests.mail_servers.postfix import Postfix
from tests.mail_servers.sending import sending
from tests.mail_servers.server import MailServer

_COMPLETED = 250


def _postfix(folder: Path, authority: Authority) -> MailServer:
    restrictions = "reject_invalid_helo_hostname, reject_non_fqdn_helo_hostname"
    settings = f"smtpd_helo_required = yes\nsmtpd_helo_restrictions = {restrictions}"
    return Postfix(folder, authority, settings)


def _exim(folder: Path, authority: Authority) -> MailServer:
    # The server cannot look up names, so without this list it would accept any name.
    deny = "  deny condition = ${if match{$sender_helo_name}{\\N\\.\\N}{no}{yes}}\n"
    return Exim(folder, authority, acls={"helo": deny})


def _opensmtpd(folder: Path, authority: Authority) -> MailServer:
    lines = """\
table dotted { ".*[.].*" }
filter "names" phase ehlo match !helo regex <dotted> reject "504 5.5.2 need a qualified name"
"""
    return OpenSmtpd(folder, authority, lines, listener="filter names")


@pytest.fixture(params=[_postfix, _exim, _opensmtpd], ids=["postfix", "exim", "opensmtpd"])
async def server(
    request: pytest.FixtureRequest, authority: Authority, tmp_path: Path
) -> AsyncIterator[MailServer]:
    make: Callable[[Path, Authority], MailServer] = request.param
    async with make(tmp_path / "server", authority) as running:
        yield running


async def test_the_default_ehlo_name_is_accepted(configure: Configure, server: MailServer) -> None:
    async with sending(server, configure()) as run:
        await run.check_all_sent(await run.schedule(await run.sender()))


async def test_the_configured_name_is_sent_in_ehlo(
    configure: Configure, server: MailServer
) -> None:
    async with sending(server, configure(smtp_helo="mailer.example.com")) as run:
        await run.check_all_sent(await run.schedule(await run.sender()))
        assert all("mailer.example.com" in mail.trace for mail in server.mails())


@pytest.mark.parametrize(
    ("name", "codes"),
    [("mailer", {504, 550}), ("mailer.example.com", {250}), ("[192.0.2.7]", {250})],
)
async def test_the_servers_accept_only_names_with_a_dot_and_address_literals(
    server: MailServer, name: str, codes: set[int]
) -> None:
    """The servers do check the name; otherwise the tests above would prove nothing."""

    def reply() -> int:
        with smtplib.SMTP("127.0.0.1", server.port, name, timeout=30) as client:
            code, _ = client.ehlo()
            if code == _COMPLETED:
                # Postfix refuses at RCPT.
                server.authenticate(client)
                client.mail("s@x.test")
                code, _ = client.rcpt("r1@y.test")
        return code

    assert await asyncio.to_thread(reply) in codes
