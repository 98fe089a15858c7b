"""Servers that are strict about the protocol, and servers that defer mail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from outbox_server.shared.states import ReplyClass
from tests.mail_servers.authority import Authority
from tests.mail_servers.conftest import Configure
from tests.mail_servers.exim import Exim
from tests.mail_servers.greylist import GreylistDaemon
from tests.mail_servers.postfix import Postfix
from tests.mail_servers.sending import MAILS, ODD_BODIES, sending

# The backoff of failed attempts ends before greylisting does, so the mail must be deferred.
_SHORT_BACKOFF = {"retry_backoff": "1ms", "defer_backoff": "200ms"}
_MEGABYTE = "0123456789abcdef\n" * 62_000


@pytest.fixture
async def greylist() -> AsyncIterator[GreylistDaemon]:
    async with GreylistDaemon() as running:
        yield running


def _asks(greylist: GreylistDaemon, recipient: str) -> str:
    """Return a condition of an Exim ACL: the greylist defers the mail."""
    request = f"sender=$sender_address\\nrecipient={recipient}\\n\\n"
    answer = f"${{readsocket{{inet:127.0.0.1:{greylist.port}}}{{{request}}}{{5s}}}}"
    return f"condition = ${{if match{{{answer}}}{{DEFER}}}}"


async def test_bare_newlines_are_forbidden_and_odd_mails_arrive(
    configure: Configure, authority: Authority, tmp_path: Path
) -> None:
    settings = "smtpd_forbid_bare_newline = yes\nsmtpd_forbid_bare_newline_exclusions ="
    async with (
        Postfix(tmp_path / "server", authority, settings) as server,
        sending(server, configure()) as run,
    ):
        await run.check_all_sent(await run.schedule(await run.sender(), ODD_BODIES))


async def test_large_mails_arrive_at_a_server_with_a_deadline_per_request(
    configure: Configure, authority: Authority, tmp_path: Path
) -> None:
    settings = "smtpd_per_record_deadline = yes\nsmtpd_timeout = 5s"
    async with (
        Postfix(tmp_path / "server", authority, settings) as server,
        sending(server, configure()) as run,
    ):
        await run.check_all_sent(await run.schedule(await run.sender(), [_MEGABYTE] * 5))


@pytest.mark.parametrize("offered", ["*", ""], ids=["pipelining", "no-pipelining"])
async def test_a_server_that_enforces_command_synchronization_reports_no_error(
    configure: Configure, authority: Authority, tmp_path: Path, offered: str
) -> None:
    settings = f"smtp_enforce_sync = true\npipelining_advertise_hosts = {offered}"
    async with (
        Exim(tmp_path / "server", authority, settings) as server,
        sending(server, configure()) as run,
    ):
        await run.check_all_sent(await run.schedule(await run.sender(), ODD_BODIES))
        assert "synchronization error" not in server.log()


async def test_a_recipient_that_postfix_greylists_is_tried_later(
    configure: Configure, authority: Authority, greylist: GreylistDaemon, tmp_path: Path
) -> None:
    settings = f"smtpd_recipient_restrictions = check_policy_service inet:127.0.0.1:{greylist.port}"
    async with (
        Postfix(tmp_path / "server", authority, settings) as server,
        sending(server, configure(**_SHORT_BACKOFF)) as run,
    ):
        scheduled = await run.schedule(await run.sender())
        await run.check_all_sent(scheduled)
        assert len(greylist.refused) == MAILS
        for mail in scheduled:
            assert (await run.classes(mail.job))[0] is ReplyClass.DEFERRED


@pytest.mark.parametrize("acl", ["rcpt", "data"])
async def test_a_mail_that_exim_greylists_is_tried_later(
    configure: Configure, authority: Authority, greylist: GreylistDaemon, tmp_path: Path, acl: str
) -> None:
    recipient = {"rcpt": "$local_part@$domain", "data": "$recipients"}[acl]
    defer = f"  defer message = 4.7.1 Greylisted, try again\n    {_asks(greylist, recipient)}\n"
    async with (
        Exim(tmp_path / "server", authority, acls={acl: defer}) as server,
        sending(server, configure(**_SHORT_BACKOFF)) as run,
    ):
        scheduled = await run.schedule(await run.sender())
        await run.check_all_sent(scheduled)
        assert len(greylist.refused) == MAILS
        for mail in scheduled:
            assert (await run.classes(mail.job))[0] is ReplyClass.DEFERRED


async def test_a_server_whose_scanner_fails_for_a_while_loses_no_mail(
    configure: Configure, authority: Authority, greylist: GreylistDaemon, tmp_path: Path
) -> None:
    # Exim's own text when it cannot evaluate an ACL: without an enhanced code.
    defer = f"  defer {_asks(greylist, '$recipients')}\n"
    backoff = {"retry_backoff": "100ms,400ms,1s", "defer_backoff": "200ms"}
    async with (
        Exim(tmp_path / "server", authority, acls={"data": defer}) as server,
        sending(server, configure(**backoff)) as run,
    ):
        await run.check_all_sent(await run.schedule(await run.sender()))
        assert len(greylist.refused) == MAILS
