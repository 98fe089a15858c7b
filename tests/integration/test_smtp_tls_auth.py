"""TLS, logins, and the endpoints that a user may set."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.services.dispatcher.smtp import pool as pools
from outbox_server.shared.egress import Egress
from outbox_server.shared.states import AttemptOutcome, SmtpSecurity
from tests.dns_server import DnsServer
from tests.eventually import eventually
from tests.smtp_pools import (
    all_closed,
    endpoint_of,
    open_connections,
    pool_of,
    relay_at,
    send,
)
from tests.smtp_servers import (
    Close,
    Say,
    ScriptedServer,
    Succeed,
    Wait,
    plain_login,
)

SENT = AttemptOutcome.SENT
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
IN_DOUBT = AttemptOutcome.IN_DOUBT


# TLS and AUTH --------------------------------------------------------------------------------


@pytest.mark.parametrize("security", [SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
async def test_a_mail_goes_over_tls(
    security: SmtpSecurity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    context = server_context(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context, implicit_tls=security is SmtpSecurity.TLS) as server:
        for _ in range(3):
            result = await send(pool, endpoint_of(server, security=security))
            assert result.outcome is SENT, result.message

        assert server.connections == 1
        assert server.visits["starttls"] == (security is SmtpSecurity.STARTTLS)
        await pool.close()
        await eventually(lambda: not server.open)


@pytest.mark.parametrize("security", [SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
async def test_a_server_with_an_untrusted_certificate_gets_no_mail(
    security: SmtpSecurity, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path, host=host)
    context = server_context(certificate)
    if host != "127.0.0.1":
        # The certificate is trusted, but for another host.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context, implicit_tls=security is SmtpSecurity.TLS) as server:
        endpoint = endpoint_of(server, security=security, username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "certificate" in (result.message or "").lower()
        assert "AUTH" not in " ".join(server.commands)
        assert open_connections(pool) == 0


async def test_a_server_with_an_expired_certificate_gets_no_mail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path, until=-timedelta(minutes=1))
    context = server_context(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context) as server:
        result = await send(pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "expired" in (result.message or "")
        assert server.visits["mail"] == 0


async def test_a_server_that_does_not_offer_starttls_gets_no_mail(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        assert open_connections(pool) == 0


@pytest.mark.parametrize("action", [Say("454 4.7.0 not now"), Close(), Wait()])
async def test_a_server_whose_starttls_fails_gets_no_mail(
    short_pool: SmtpPool, action: Any, tmp_path: Path
) -> None:
    context = server_context(self_signed(tmp_path))
    async with ScriptedServer({"starttls": action}, tls=context) as server:
        result = await send(short_pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        await all_closed(short_pool)


AUTH = ("8BITMIME", "AUTH PLAIN")


async def test_a_sender_with_a_password_logs_in_once_per_connection(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        endpoint = relay_at(server, username="anna", password="s3cret-word")
        for _ in range(2):
            assert (await send(pool, endpoint)).outcome is SENT

    logins = [command for command in server.commands if command.startswith("AUTH")]
    assert logins == [f"AUTH PLAIN {plain_login('anna', 's3cret-word')}"]


@pytest.mark.parametrize(
    ("extensions", "action"),
    [
        (AUTH, Say("535 5.7.8 bad credentials")),
        (AUTH, Say("454 4.7.0 ask later")),
        (AUTH, Close()),
        (("8BITMIME",), Succeed()),
        (("8BITMIME", "AUTH GSSAPI"), Succeed()),
        (AUTH, Say(f"500 5.5.2 what? AUTH PLAIN {plain_login('anna', 's3cret-word')}")),
        (AUTH, Say("535 5.7.8 s3cret-word is wrong")),
    ],
)
async def test_a_failed_login_counts_against_the_endpoint_and_does_not_leak_the_password(
    pool: SmtpPool, extensions: tuple[str, ...], action: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with ScriptedServer({"auth": action}, extensions=extensions) as server:
        endpoint = relay_at(server, username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        await all_closed(pool)
        texts = [result.message, pool.states()[0].last_error, repr(endpoint), caplog.text]
        for secret in ("s3cret-word", plain_login("anna", "s3cret-word")):
            assert not any(secret in (text or "") for text in texts)


async def test_senders_with_other_credentials_never_share_a_connection(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        for user in ("anna", "bert", "anna"):
            await send(pool, relay_at(server, username=user, password="x"))

        assert server.connections == 2


# Endpoints that a user may set


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::ffff:127.0.0.1"])
async def test_a_users_endpoint_cannot_reach_the_operators_network(host: str) -> None:
    pool = pool_of(egress=Egress(), timeout=5.0)
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, host=host))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert result.message == (
            f"{host} is in the operator's network, which senders' endpoints must not use; "
            "the operator can permit it in OUTBOX_SMTP_ALLOW"
        )
        assert server.connections == 0
        assert open_connections(pool) == 0


async def test_the_operators_relay_may_be_anywhere_and_shares_no_connection() -> None:
    pool = pool_of(egress=Egress(), timeout=5.0)
    async with ScriptedServer() as server:
        assert (await send(pool, relay_at(server))).outcome is SENT
        assert (await send(pool, endpoint_of(server))).outcome is CONNECTION
        assert server.connections == 1
    await pool.close()


@pytest.mark.parametrize("host", ["0", "2130706433", "127.1", "0x7f000001"])
async def test_an_unusual_form_of_a_loopback_address_is_only_a_name(
    names: DnsServer, host: str
) -> None:
    pool = pool_of(egress=Egress(resolver=names.resolver()), timeout=5.0)
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, host=host))
        assert result.outcome is CONNECTION
        assert result.message == f"{host} cannot be resolved: the name has no address"
        assert server.connections == 0
    await pool.close()


async def test_a_name_is_resolved_once_and_the_checked_address_is_used(names: DnsServer) -> None:
    names.answers["rebinding.test"] = [["127.0.0.1"], ["192.0.2.1"]]
    pool = pool_of(timeout=5.0, egress=Egress(["127.0.0.0/8"], names.resolver()))
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, host="rebinding.test"))
        assert result.outcome is SENT, result.message
        assert (server.connections, names.asked("rebinding.test", "A")) == (1, 1)
    await pool.close()


@pytest.mark.parametrize(
    ("reply", "tries"),
    [("535 5.7.8 wrong password", 1), ("454 4.7.0 later", 1), ("504 5.5.4 not this method", 2)],
)
async def test_a_password_is_tried_once_unless_the_server_lacks_the_method(
    pool: SmtpPool, reply: str, tries: int
) -> None:
    plan = {"auth": [Say(reply), Succeed()]}
    async with ScriptedServer(plan, extensions=("AUTH CRAM-MD5 PLAIN",)) as server:
        endpoint = dataclasses.replace(relay_at(server), username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert server.visits["auth"] == tries
        assert (result.outcome is SENT) == (tries == 2)


async def test_a_users_password_is_never_sent_in_clear(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        result = await send(pool, endpoint_of(server, username="anna", password="s3cret-word"))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "TLS only" in (result.message or "")
        assert server.connections == 0


async def test_the_number_of_remembered_endpoints_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user may set another endpoint of a sender before each mail."""
    monkeypatch.setattr(pools, "MOST_ENDPOINTS", 3)
    pool = pool_of(mails_per_connection=1)
    async with ScriptedServer() as server:
        for number in range(6):
            result = await send(pool, endpoint_of(server, ca=f"another {number}"))
            assert result.outcome is AttemptOutcome.SENT
            await eventually(lambda: not any(each.connection_count for each in pool.states()))
        assert len(pool.states()) == 3
