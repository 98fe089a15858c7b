"""AUTH with an access token, to a mail server over TLS."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.shared.smtp.oauth2_auth import Login, authenticate
from tests.oauth2_smtp import OAuth2SmtpServer

GOOD = Login("me@example.com", "ya29.good-" + "g" * 1_000)
BAD = Login("me@example.com", "ya29.revoked-token-0123456789")


def accepts(username: str, token: str) -> bool:
    return (username, token) == (GOOD.username, GOOD.token)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


@asynccontextmanager
async def session(
    certificate: Certificate, **options: Any
) -> AsyncIterator[tuple[OAuth2SmtpServer, aiosmtplib.SMTP]]:
    async with OAuth2SmtpServer(server_context(certificate), accepts, **options) as server:
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1",
            port=server.port,
            use_tls=True,
            tls_context=ssl.create_default_context(cafile=str(certificate.public)),
            timeout=5,
        )
        await client.connect()
        await client.ehlo()
        try:
            yield server, client
        finally:
            client.close()


@pytest.mark.parametrize(
    ("offered", "mechanism"),
    [
        ("LOGIN PLAIN XOAUTH2 PLAIN-CLIENTTOKEN OAUTHBEARER XOAUTH", "XOAUTH2"),
        ("LOGIN XOAUTH2", "XOAUTH2"),
        ("PLAIN OAUTHBEARER", "OAUTHBEARER"),
        ("oauthbearer", "OAUTHBEARER"),
    ],
)
async def test_only_a_mechanism_that_the_server_offers_is_used(
    certificate: Certificate, offered: str, mechanism: str
) -> None:
    async with session(certificate, mechanisms=offered) as (server, client):
        await authenticate(client, GOOD)
        (presented,) = server.presented
        assert (presented.mechanism, presented.username) == (mechanism, GOOD.username)
        assert presented.token == GOOD.token
        assert presented.accepted


async def test_a_server_without_either_mechanism_gets_no_token(certificate: Certificate) -> None:
    async with session(certificate, mechanisms="PLAIN LOGIN") as (server, client):
        with pytest.raises(aiosmtplib.SMTPException, match="neither AUTH XOAUTH2 nor"):
            await authenticate(client, GOOD)
        assert server.presented == []


@pytest.mark.parametrize(("mechanism", "dummy"), [("XOAUTH2", ""), ("OAUTHBEARER", "AQ==")])
async def test_a_challenge_is_answered_and_the_refusal_is_read(
    certificate: Certificate, mechanism: str, dummy: str
) -> None:
    async with session(certificate, mechanisms=mechanism) as (server, client):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await authenticate(client, BAD)
        assert (caught.value.code, caught.value.message) == (
            535,
            "5.7.8 Username and Password not accepted",
        )
        assert server.dummies == [dummy]
        # The session is in sync: the next command gets its own reply.
        assert (await client.noop()).code == 250


async def test_a_refusal_without_a_challenge_is_a_refusal(certificate: Certificate) -> None:
    async with session(certificate, challenges=False) as (server, client):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await authenticate(client, BAD)
        assert caught.value.code == 535
        assert server.dummies == []


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
async def test_a_refusal_that_quotes_the_token_is_shown_without_it(
    certificate: Certificate, mechanism: str
) -> None:
    async with session(certificate, mechanisms=mechanism, quotes=True) as (_, client):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await authenticate(client, BAD)
    said = caught.value.message
    assert "[token]" in said
    forms = [BAD.token, BAD.xoauth2(), BAD.oauthbearer()]
    parts = {form[n : n + 12] for form in forms for n in range(len(form) - 11)}
    assert not [part for part in parts if part in said]
