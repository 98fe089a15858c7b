"""Servers with limits on connections, mails and rates: each mail arrives, and none fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from outbox_server.shared.states import JobState
from tests.eventually import eventually
from tests.mail_servers.authority import Authority
from tests.mail_servers.conftest import Configure
from tests.mail_servers.exim import Exim
from tests.mail_servers.opensmtpd import OpenSmtpd
from tests.mail_servers.postfix import Postfix
from tests.mail_servers.sending import MAILS, sending
from tests.mail_servers.server import UNKNOWN, MailServer


@dataclass(frozen=True)
class ServerLimit:
    """A limit of one server, and the text in its log that shows that the limit was reached."""

    make: Callable[[Path, Authority], MailServer]
    logged: str
    # Settings of the dispatcher: few mails per connection make it connect often.
    mails_per_connection: int = 100


def _postfix(*settings: str) -> Callable[[Path, Authority], MailServer]:
    lines = "\n".join(("anvil_rate_time_unit = 2s", "smtpd_error_sleep_time = 0", *settings))
    return lambda folder, authority: Postfix(folder, authority, lines)


def _exim(settings: str = "", **acls: str) -> Callable[[Path, Authority], MailServer]:
    return lambda folder, authority: Exim(folder, authority, settings, acls)


def _opensmtpd(settings: str) -> Callable[[Path, Authority], MailServer]:
    return lambda folder, authority: OpenSmtpd(folder, authority, settings)


# Few mails, because the rate limits permit one connection or three mails every two seconds. These
# limits are low enough to be reached on a busy machine.
_MAILS = 10
_EXIM_RATE = """\
  defer message = 4.7.1 Sender rate overlimit - $sender_rate / $sender_rate_period
    log_message = ratelimit
    ratelimit = 3 / 2s / $authenticated_id
"""
_LIMITS = {
    "postfix-connections": ServerLimit(
        _postfix("smtpd_client_connection_count_limit = 1"),
        "Connection concurrency limit exceeded",
    ),
    "postfix-connection-rate": ServerLimit(
        _postfix("smtpd_client_connection_rate_limit = 1"),
        "Connection rate limit exceeded",
        mails_per_connection=5,
    ),
    "postfix-message-rate": ServerLimit(
        _postfix("smtpd_client_message_rate_limit = 3"), "Message delivery request rate limit"
    ),
    "postfix-recipient-rate": ServerLimit(
        _postfix("smtpd_client_recipient_rate_limit = 3"), "Recipient address rate limit exceeded"
    ),
    "postfix-auth-rate": ServerLimit(
        _postfix("smtpd_client_auth_rate_limit = 1"),
        "AUTH command rate limit exceeded",
        mails_per_connection=5,
    ),
    "postfix-tls-rate": ServerLimit(
        _postfix("smtpd_client_new_tls_session_rate_limit = 1"),
        "New TLS session rate limit exceeded",
        mails_per_connection=5,
    ),
    "exim-mails-per-connection": ServerLimit(
        _exim("smtp_accept_max_per_connection = 1"), "too many messages"
    ),
    "exim-connections-per-host": ServerLimit(
        _exim("smtp_accept_max_per_host = 1"), "too many connections"
    ),
    "exim-connections": ServerLimit(_exim("smtp_accept_max = 1"), "too many connections"),
    "exim-rate": ServerLimit(_exim(mail=_EXIM_RATE), "ratelimit"),
    "opensmtpd-mails-per-connection": ServerLimit(
        _opensmtpd("smtp limit max-mails 1"), "Too many messages sent"
    ),
}


@pytest.fixture(params=list(_LIMITS.values()), ids=list(_LIMITS))
def limit(request: pytest.FixtureRequest) -> ServerLimit:
    chosen: ServerLimit = request.param
    return chosen


@pytest.fixture
async def server(
    limit: ServerLimit, authority: Authority, tmp_path: Path
) -> AsyncIterator[MailServer]:
    async with limit.make(tmp_path / "server", authority) as running:
        yield running


async def test_no_mail_fails_at_a_limit_of_the_server(
    configure: Configure, limit: ServerLimit, server: MailServer
) -> None:
    values = configure(smtp_mails_per_connection=limit.mails_per_connection)
    async with sending(server, values) as run:
        scheduled = await run.schedule(await run.sender(), ["Hello\n"] * _MAILS)
        await run.finished()
        assert limit.logged in server.log()
        await run.check_all_sent(scheduled)
        await run.check_no_attempt_used()


async def test_refused_recipients_up_to_the_hard_error_limit_do_not_harm_other_mail(
    configure: Configure, authority: Authority, tmp_path: Path
) -> None:
    settings = "smtpd_hard_error_limit = 3\nsmtpd_error_sleep_time = 0"
    unknown = {f"r{number}": UNKNOWN for number in range(1, MAILS, 2)}
    async with (
        Postfix(tmp_path / "server", authority, settings) as server,
        sending(server, configure()) as run,
    ):
        scheduled = await run.schedule(await run.sender(), **unknown)
        await run.check_arrived([mail for mail in scheduled if mail.recipient != UNKNOWN])
        assert await run.world.states() == {
            JobState.SENT: MAILS - len(unknown),
            JobState.FAILED: len(unknown),
        }
        assert "too many errors" in server.log()


async def test_a_connection_that_the_server_closed_while_idle_costs_no_attempt(
    configure: Configure, authority: Authority, tmp_path: Path
) -> None:
    async with (
        Postfix(tmp_path / "server", authority, "smtpd_timeout = 1s") as server,
        sending(server, configure()) as run,
    ):
        sender = await run.sender()
        scheduled = await run.schedule(sender, ["first\n"] * 5)
        await run.finished()
        await eventually(lambda: "timeout after" in server.log())
        scheduled += await run.schedule(sender, ["second\n"] * 5)
        await run.check_all_sent(scheduled)
        await run.check_no_attempt_used()


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (Postfix, "message_size_limit = 20000"),
        (Exim, "message_size_limit = 20000"),
        (OpenSmtpd, "smtp max-message-size 20000"),
    ],
    ids=["postfix", "exim", "opensmtpd"],
)
async def test_a_mail_over_the_servers_size_limit_fails_alone(
    configure: Configure,
    authority: Authority,
    tmp_path: Path,
    kind: Callable[[Path, Authority, str], MailServer],
    setting: str,
) -> None:
    texts = ["small\n"] * 10
    texts[3] = "large " * 5000
    async with (
        kind(tmp_path / "server", authority, setting) as server,
        sending(server, configure()) as run,
    ):
        scheduled = await run.schedule(await run.sender(), texts)
        large = scheduled.pop(3)
        await run.check_arrived(scheduled)
        assert await run.world.in_state(JobState.FAILED) == {large.job}
