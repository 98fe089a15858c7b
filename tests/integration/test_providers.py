"""Each simulated provider, driven by an independent client: its limits, its replies, its counts."""

from __future__ import annotations

import dataclasses
import smtplib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.providers.catalog import (
    IONOS,
    PLAIN,
    POSTGREY,
    PROFILES,
    SES,
    SHARED_HOST,
    SLOW_SCANNER,
    STRICT_POSTFIX,
)
from outbox_server.deploy.providers.google import GMAIL, WORKSPACE_RELAY
from outbox_server.deploy.providers.microsoft import EXCHANGE_BLOCKED, EXCHANGE_ONLINE
from outbox_server.deploy.providers.profile import CONTENT_MARKER, DAY_S, MINUTE_S, Profile
from outbox_server.deploy.providers.server import Provider
from outbox_server.deploy.providers.tally import Ending
from outbox_server.deploy.record import read_record
from tests.eventually import eventually
from tests.provider_clients import (
    ACCOUNTS,
    HELO,
    PASSWORD,
    USER,
    ForeignClient,
    client_context,
    foreign_client,
)

LOGIN = (USER, PASSWORD)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"))


def rate(profile: Profile, seconds: float, most: int, *, last: float | None = None) -> Profile:
    """Return a profile that has only the rate of one period, with another value."""
    [found] = [one for one in profile.rates if one.seconds == seconds]
    changed = dataclasses.replace(found, most=most, seconds=last or seconds)
    return dataclasses.replace(profile, rates=(changed,))


def of_day(profile: Profile, most: int, last: float | None = None) -> Profile:
    return rate(profile, DAY_S, most, last=last)


@pytest.mark.parametrize("name", sorted(PROFILES.keys() - {EXCHANGE_BLOCKED.name}))
async def test_every_provider_takes_a_mail_over_tls_with_its_login(
    name: str, certificate: Certificate, tmp_path: Path
) -> None:
    profile = PROFILES[name].scaled(0.001)
    store = MailStore(tmp_path / "maildir")
    async with Provider(
        profile, accounts=ACCOUNTS, tls=server_context(certificate), store=store
    ) as provider:
        login = LOGIN if profile.requires_auth else None
        tls = client_context(certificate)
        async with foreign_client(provider, tls=tls, login=login) as client:

            async def accepted() -> bool:
                return await client.send(1) == "accepted"

            # postgrey accepts the mail at the second try.
            await eventually(accepted)
        await eventually(lambda: provider.tally.endings == {Ending.QUIT: 1})
    [mail] = provider.tally.mails
    assert (mail.message_id, mail.recipients, mail.mail_from) == (
        "<1@x.test>",
        ("ann@y.test",),
        "a@x.test",
    )
    assert (mail.connection, mail.helo, mail.account) == (1, HELO, USER if login else "")
    [recorded] = read_record(store.record)
    assert recorded.message_id == "<1@x.test>"
    stored = (store.maildir / "new" / recorded.file).read_bytes()
    assert stored.endswith(b"Hello.\r\n.one dot\r\n..two dots\r\n.\r\nend\r\n")
    assert PASSWORD not in str(provider.tally.summary())


DAILY = [
    (GMAIL, "550 5.4.5 Daily user sending limit exceeded. For more information on Gmail\n5.4.5 "),
    (WORKSPACE_RELAY, "550 5.4.5 Daily SMTP relay limit exceeded for user."),
    (
        EXCHANGE_ONLINE,
        "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; ",
    ),
    (SES, "454 Throttling failure: Daily message quota exceeded."),
]


@pytest.mark.parametrize(("profile", "words"), DAILY, ids=lambda one: getattr(one, "name", ""))
async def test_a_daily_quota_is_refused_until_the_oldest_mail_is_a_day_old(
    profile: Profile, words: str
) -> None:
    profile = of_day(profile, 3, last=1.5)
    async with Provider(profile) as provider:
        async with foreign_client(provider, login=LOGIN) as client:
            said = [await client.send(number) for number in range(5)]
            assert said[:3] == ["accepted"] * 3
            assert said[3].startswith(words), said[3]
            assert said[4].startswith(words)

            async def accepted() -> bool:
                return await client.send(6) == "accepted"

            await eventually(accepted)
        first, *_, last = provider.tally.mails
        assert last.received_at - first.received_at >= 1.5
        assert provider.tally.accepted == 4
        assert [reply[:3] for reply in provider.tally.refusals] == [words[:3]]
        assert provider.tally.refused_for_good == 0


MINUTES = [
    (GMAIL, "421 4.7.28 Our system has detected an unusual rate", True),
    (WORKSPACE_RELAY, "450 4.2.1 Peak SMTP relay limit exceeded for customer.", False),
    (EXCHANGE_ONLINE, "421 4.4.2 Message submission rate for this client has exceeded", True),
]


@pytest.mark.parametrize(
    ("profile", "words", "closes"), MINUTES, ids=lambda one: getattr(one, "name", "")
)
async def test_mails_per_minute_are_refused_at_mail(
    profile: Profile, words: str, closes: bool
) -> None:
    async with Provider(rate(profile, MINUTE_S, 2)) as provider:
        async with foreign_client(provider, login=LOGIN) as client:
            said = [await client.send(number) for number in range(3)]
            assert said[:2] == ["accepted"] * 2
            assert said[2].startswith(words), said[2]
            if closes:
                await eventually(lambda: provider.tally.endings == {Ending.SERVER: 1})
        async with foreign_client(provider, login=LOGIN) as client:
            # The account exceeds its rate, not the connection.
            assert (await client.send(3)).startswith(words)
        assert provider.tally.accepted == 2


async def test_ses_takes_one_mail_per_second() -> None:
    async with Provider(SES) as provider, foreign_client(provider, login=LOGIN) as client:
        assert [await client.send(1), await client.send(2)] == [
            "accepted",
            "454 Throttling failure: Maximum sending rate exceeded.",
        ]


async def test_a_shared_host_counts_mails_per_hour_and_names_the_domain() -> None:
    [hourly] = SHARED_HOST.rates
    profile = dataclasses.replace(SHARED_HOST, rates=(dataclasses.replace(hourly, most=2),))
    async with Provider(profile) as provider, foreign_client(provider, login=LOGIN) as client:
        assert [await client.send(number) for number in range(3)] == [
            "accepted",
            "accepted",
            (
                "550 Domain x.test has exceeded the max emails per hour (2/2 (100%)) allowed.  "
                "Message discarded."
            ),
        ]


async def test_ionos_counts_mails_per_hour() -> None:
    async with Provider(IONOS.with_quota(2)) as provider:
        async with foreign_client(provider, login=LOGIN) as client:
            said = [await client.send(number) for number in range(3)]
        assert said[2] == (
            "450 Requested mail action not taken: mailbox unavailable\nMail send limit exceeded."
        )


@pytest.mark.parametrize(
    ("profile", "words", "closes"),
    [
        (SHARED_HOST, "421 too many messages in this connection", True),
        (IONOS, "451 Requested action aborted\nMails per session limit exceeded.", False),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
async def test_mails_per_connection_are_limited_and_a_new_connection_resets_the_count(
    profile: Profile, words: str, closes: bool
) -> None:
    async with Provider(profile) as provider:
        for connection in (1, 2):
            async with foreign_client(provider, login=LOGIN) as client:
                said = [await client.send(connection * 10 + number) for number in range(6)]
                assert said == ["accepted"] * 5 + [words]
        await eventually(lambda: provider.tally.open_connections == 0)
        assert provider.tally.accepted == 10
        assert provider.tally.endings == {Ending.SERVER if closes else Ending.QUIT: 2}
        assert {mail.connection for mail in provider.tally.mails} == {1, 2}


async def test_exchange_takes_mail_on_three_connections_of_an_account_at_once() -> None:
    accounts = {**ACCOUNTS, "ben": ACCOUNTS[USER]}
    async with Provider(EXCHANGE_ONLINE, accounts=accounts) as provider, AsyncExitStack() as stack:
        logins = [LOGIN] * 4 + [("ben", PASSWORD)]
        clients = [
            await stack.enter_async_context(foreign_client(provider, login=login))
            for login in logins
        ]
        said = [await client.send(number) for number, client in enumerate(clients)]
        assert said[3].startswith("432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded")
        del said[3]
        assert said == ["accepted"] * 4
        await clients[0].do(lambda smtp: smtp.quit())
        await eventually(lambda: provider.tally.open_connections == 4)
        assert await clients[3].send(9) == "accepted"
        assert provider.tally.most_open_connections == 5


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (SHARED_HOST, "421 Too many concurrent SMTP connections; please try again later."),
        (SES, "421 Too many concurrent SMTP connections"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
async def test_one_connection_too_many_is_refused_in_the_greeting(
    profile: Profile, words: str
) -> None:
    cap = profile.connections
    assert cap is not None
    async with Provider(profile) as provider, AsyncExitStack() as stack:
        for _ in range(cap.most):
            await stack.enter_async_context(foreign_client(provider))
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            async with foreign_client(provider):
                pass
        assert f"{refused.value.smtp_code} {_text(refused.value)}" == words
        assert provider.tally.endings == {Ending.SERVER: 1}


def _text(error: smtplib.SMTPResponseException) -> str:
    said = error.smtp_error
    return said.decode() if isinstance(said, bytes) else said


async def test_gmail_refuses_connections_beyond_its_limit_at_ehlo() -> None:
    assert GMAIL.connections is not None
    one = dataclasses.replace(GMAIL.connections, most=1)
    async with Provider(dataclasses.replace(GMAIL, connections=one)) as provider:
        async with foreign_client(provider) as first, foreign_client(provider) as second:
            assert (first.smtp.does_esmtp, second.smtp.does_esmtp) == (True, False)
        assert list(provider.tally.refusals) == [
            "421 4.7.0 Try again later, closing connection. (EHLO)"
        ]


async def test_postgrey_refuses_a_new_triplet_and_takes_it_after_the_delay() -> None:
    async with Provider(POSTGREY.scaled(0.001)) as provider:
        async with foreign_client(provider) as client:
            words = (
                "450 4.2.0 <ann@y.test>: Recipient address rejected: Greylisted, see "
                "http://postgrey.schweikert.ch/help/y.test.html"
            )
            assert await client.send(1) == words

            async def accepted() -> bool:
                said = await client.send(1)
                assert said in ("accepted", words)
                return said == "accepted"

            await eventually(accepted)
            # This triplet is known now, but another one is not.
            assert await client.send(2) == "accepted"
            assert (await client.send(3, "ben@y.test")).startswith("450 4.2.0 <ben@y.test>")
            assert (await client.send(4, mail_from="b@x.test")).startswith("450 4.2.0")
        assert provider.tally.accepted == 2


async def test_a_slow_scanner_accepts_the_mail_before_it_replies() -> None:
    async with Provider(dataclasses.replace(SLOW_SCANNER, reply_delay_s=60.0)) as provider:
        async with foreign_client(provider) as client:
            assert client.smtp.sock is not None
            client.smtp.sock.settimeout(0.2)
            assert await client.send(1) == "disconnected"
            client.smtp.close()
        assert provider.tally.accepted == 1
    assert SLOW_SCANNER.reply_delay_s == 25


@pytest.mark.parametrize("profile", [STRICT_POSTFIX, WORKSPACE_RELAY], ids=lambda one: one.name)
@pytest.mark.parametrize("helo", ["9f2c1d0b7a3e", "mail.x.test", "[192.0.2.7]"])
async def test_a_name_in_ehlo_must_be_qualified(profile: Profile, helo: str) -> None:
    async with Provider(profile) as provider:
        async with foreign_client(provider, helo=helo) as client:
            said = await client.send(1)
        if "." in helo:
            assert said == "accepted"
        elif profile is STRICT_POSTFIX:
            assert said == (
                "504 5.5.2 <9f2c1d0b7a3e>: Helo command rejected: need fully-qualified hostname"
            )
        else:
            assert said == "disconnected"
        assert provider.tally.helo_names.keys() == {helo}


async def test_a_blocked_account_is_refused_at_mail() -> None:
    provider = Provider(EXCHANGE_BLOCKED)
    async with provider, foreign_client(provider, login=LOGIN) as client:
        said = await client.send(1)
    assert said.startswith("550 5.1.90 Your message can't be sent because you've reached your")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
async def test_a_wrong_password_is_refused_with_the_reply_of_the_provider(profile: Profile) -> None:
    async with Provider(profile, accounts=ACCOUNTS) as provider:
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            async with foreign_client(provider, login=(USER, "wrong")):
                pass
    first = profile.wrong_password.text.partition("\n")[0].partition(" [")[0]
    assert refused.value.smtp_code == 535
    assert first in _text(refused.value)


@pytest.mark.parametrize(
    "profile", [one for one in PROFILES.values() if not one.always], ids=lambda one: one.name
)
async def test_permanent_refusals_are_counted_and_the_session_continues(
    profile: Profile,
) -> None:
    profile = dataclasses.replace(profile, greylist=None, reply_delay_s=0)
    async with Provider(profile) as provider:
        async with foreign_client(provider, login=LOGIN) as client:
            assert (await client.send(1, "unknown@y.test")).startswith("550 ")
            marked = await client.send(2, subject=CONTENT_MARKER.decode())
            assert marked[:3] in ("552", "554")
            assert (await client.send(3, "full@y.test")).startswith("452 ")
            assert await client.send(4) == "accepted"
        tally = provider.tally
        assert (tally.accepted, tally.refused_for_good, tally.copies) == (1, 2, 0)


async def test_a_repeated_message_id_counts_as_a_copy() -> None:
    async with Provider(PLAIN) as provider:
        async with foreign_client(provider) as client:
            for number in (1, 2, 1, 1):
                await client.send(number)
        assert (provider.tally.accepted, provider.tally.copies) == (4, 2)


async def test_accounts_are_counted_separately() -> None:
    accounts = {**ACCOUNTS, "ben": ACCOUNTS[USER]}
    async with Provider(of_day(GMAIL, 1), accounts=accounts) as provider:
        clients: list[ForeignClient] = []
        async with AsyncExitStack() as stack:
            for user in (USER, "ben", USER):
                login = (user, PASSWORD)
                clients.append(
                    await stack.enter_async_context(foreign_client(provider, login=login))
                )
            said = [await client.send(number) for number, client in enumerate(clients)]
    assert said[:2] == ["accepted"] * 2
    assert said[2].startswith("550 5.4.5")
