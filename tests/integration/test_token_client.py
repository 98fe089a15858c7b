"""Requests for access tokens over TLS, to providers that behave well and to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.ports import free_port
from outbox_server.shared.egress import Egress
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.oauth2.token_answers import Failure, Grant
from outbox_server.shared.oauth2.token_client import MAX_ANSWER_BYTES, TokenClient, TokenRequest
from outbox_server.shared.settings import load_settings
from outbox_server.shared.tls import TlsContexts
from tests.dns_server import DnsServer
from tests.oauth2_provider import Endless, Hold, OAuth2Provider, PlannedAnswer

LOOPBACK = Egress(["127.0.0.0/8"])


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


@pytest.fixture
async def provider(certificate: Certificate) -> AsyncIterator[OAuth2Provider]:
    async with OAuth2Provider(server_context(certificate)) as running:
        yield running


def client_of(certificate: Certificate, **settings: Any) -> TokenClient:
    allow = {"smtp_allow": "127.0.0.0/8", "smtp_ca": str(certificate.public), **settings}
    chosen = load_settings(**allow)
    return TokenClient.from_settings(chosen, Egress.from_settings(chosen))


@pytest.fixture
def client(certificate: Certificate) -> TokenClient:
    return client_of(certificate)


def wanted(provider: OAuth2Provider, **changes: str) -> TokenRequest:
    fields = {
        "token_url": provider.url,
        "client_id": provider.client_id,
        "scope": "https://mail.google.com/",
        "client_secret": provider.client_secret,
        "refresh_token": provider.refresh_token,
        **changes,
    }
    return TokenRequest(**fields)


async def failure(client: TokenClient, request: TokenRequest) -> Failure:
    answer = await client.request(request)
    assert isinstance(answer, Failure), answer
    for secret in (request.client_secret, request.refresh_token):
        assert not secret or secret not in answer.message
    return answer


async def test_a_refresh_token_becomes_an_access_token(
    client: TokenClient, provider: OAuth2Provider
) -> None:
    answer = await client.request(wanted(provider))
    assert isinstance(answer, Grant)
    assert provider.access_tokens == {answer.access_token}
    assert (answer.lifetime, answer.refresh_token) == (timedelta(seconds=3599), None)
    assert provider.requests == [
        {
            "grant_type": "refresh_token",
            "client_id": provider.client_id,
            "client_secret": provider.client_secret,
            "refresh_token": "1//refresh-token-of-the-mailbox-0000",
            "scope": "https://mail.google.com/",
        }
    ]


async def test_client_credentials_become_an_access_token(
    client: TokenClient, provider: OAuth2Provider
) -> None:
    answer = await client.request(wanted(provider, refresh_token="", scope=""))
    assert isinstance(answer, Grant)
    assert provider.requests == [
        {
            "grant_type": "client_credentials",
            "client_id": provider.client_id,
            "client_secret": provider.client_secret,
        }
    ]


async def test_a_new_refresh_token_is_returned(
    client: TokenClient, certificate: Certificate
) -> None:
    async with OAuth2Provider(server_context(certificate), style="microsoft") as provider:
        answer = await client.request(wanted(provider))
        assert isinstance(answer, Grant)
        assert answer.refresh_token == provider.refresh_token


async def test_the_errors_of_both_providers_are_refusals(
    client: TokenClient, certificate: Certificate
) -> None:
    said = {
        "google": "OAuth 2.0: invalid_grant: Token has been expired or revoked.",
        "microsoft": "OAuth 2.0: invalid_grant: AADSTS70008: The refresh token has expired due to "
        "inactivity. Trace ID: 0a1b Correlation ID: 2c3d Timestamp: 2026-11-28 12:00:00Z",
    }
    for style, message in said.items():
        async with OAuth2Provider(server_context(certificate), style=style) as provider:  # type: ignore[arg-type]
            revoked = await failure(client, wanted(provider, refresh_token="1//revoked-0001"))
            assert revoked == Failure(message, refused=True)
            wrong = await failure(client, wanted(provider, client_secret="a-wrong-secret"))
            assert wrong.refused
            assert wrong.message.startswith("OAuth 2.0: invalid_client: ")


async def test_the_retry_delay_of_a_busy_provider_is_returned(
    client: TokenClient, provider: OAuth2Provider
) -> None:
    provider.plan = [PlannedAnswer(429, {"error": "too_many"}, {"Retry-After": "42"})]
    found = await failure(client, wanted(provider))
    assert (found.refused, found.retry_after) == (False, timedelta(seconds=42))


async def test_a_redirect_is_not_followed(client: TokenClient, provider: OAuth2Provider) -> None:
    provider.plan = [PlannedAnswer(307, headers={"Location": f"{provider.url}?again"})]
    found = await failure(client, wanted(provider))
    assert found.refused
    assert "redirect" in found.message
    assert provider.connections == 1


async def test_an_endless_answer_is_cut_off(client: TokenClient, provider: OAuth2Provider) -> None:
    provider.plan = [Endless()]
    found = await failure(client, wanted(provider))
    assert not found.refused
    assert f"more than {MAX_ANSWER_BYTES} bytes" in found.message


async def test_a_compressed_answer_is_not_decompressed(
    client: TokenClient, provider: OAuth2Provider
) -> None:
    provider.plan = [PlannedAnswer(200, body=b"\x1f\x8b...", headers={"Content-Encoding": "gzip"})]
    assert "without a usable access_token" in (await failure(client, wanted(provider))).message


async def test_an_incomplete_answer_is_not_a_token(
    client: TokenClient, provider: OAuth2Provider
) -> None:
    token = {"access_token": "ya29.half", "refresh_token": "1//half"}
    provider.plan = [PlannedAnswer(200, token, cut=True)]
    found = await failure(client, wanted(provider))
    assert not found.refused
    assert found.message.startswith("OAuth 2.0: no answer from 127.0.0.1: ")


async def test_a_silent_provider_times_out(
    certificate: Certificate, provider: OAuth2Provider
) -> None:
    provider.plan = [Hold()]
    tls = TlsContexts(certificate.public.read_text())
    client = TokenClient(LOOPBACK, tls, limit=timedelta(milliseconds=300))
    found = await failure(client, wanted(provider))
    assert found == Failure(
        "OAuth 2.0: 127.0.0.1 gave no complete answer within 0.3 s", refused=False
    )


async def test_a_port_without_a_listener_is_not_a_refusal(client: TokenClient) -> None:
    request = TokenRequest(f"https://127.0.0.1:{free_port()}/token", "id", "", "secret-of-mine")
    found = await failure(client, request)
    assert not found.refused
    assert "no connection to 127.0.0.1" in found.message


async def test_an_error_about_an_answer_that_is_not_http_quotes_no_secret(
    client: TokenClient, certificate: Certificate
) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        writer.write(await reader.readexactly(length) + b"\r\n\r\n")
        await writer.drain()
        writer.close()

    tls = server_context(certificate)
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        request = TokenRequest(
            f"https://127.0.0.1:{port}/token", "id", "", "secret/of&mine=0001", "1//refresh-0001"
        )
        found = await failure(client, request)
    assert not found.refused
    for part in ("of%26mine", "%2F%2Frefresh"):
        assert part not in found.message


async def test_a_certificate_of_an_unknown_ca_is_not_trusted(provider: OAuth2Provider) -> None:
    client = TokenClient.from_settings(load_settings(), Egress(["127.0.0.1"]))
    found = await failure(client, wanted(provider))
    assert not found.refused
    assert "its certificate is not trusted: " in found.message
    assert "_ssl" not in found.message
    assert provider.requests == []


async def test_a_certificate_for_another_name_is_not_trusted(
    tmp_path: Path,
) -> None:
    other = self_signed(tmp_path / "other", host="127.0.0.2")
    async with OAuth2Provider(server_context(other)) as provider:
        found = await failure(client_of(other), wanted(provider))
    assert "its certificate is not trusted: " in found.message
    assert "_ssl" not in found.message
    assert provider.requests == []


def test_a_ca_file_that_cannot_be_read_prevents_the_start(tmp_path: Path) -> None:
    for content in (None, "no certificate"):
        path = tmp_path / "ca.pem"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigurationError, match="OUTBOX_SMTP_CA"):
            TokenClient.from_settings(load_settings(smtp_ca=str(path)), Egress())


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1"]
)
async def test_the_operators_network_cannot_be_reached(
    certificate: Certificate, provider: OAuth2Provider, host: str
) -> None:
    client = client_of(certificate, smtp_allow="")
    request = wanted(provider, token_url=f"https://{host}:{provider.port}/token")
    found = await failure(client, request)
    assert found.refused
    assert found.message == (
        f"OAuth 2.0: {host.strip('[]')} is in the operator's network, which senders' endpoints "
        "must not use; the operator can permit it in OUTBOX_SMTP_ALLOW"
    )
    assert provider.connections == 0


async def test_the_client_connects_to_the_address_that_was_checked(
    certificate: Certificate, provider: OAuth2Provider, names: DnsServer
) -> None:
    """A name that resolves to another address at each look-up (DNS rebinding)."""
    names.answers["rebinding.test"] = [["127.0.0.2"], ["127.0.0.1"]]
    tls = TlsContexts(certificate.public.read_text())
    # The first address is allowed but has no listener; the provider listens at the second.
    client = TokenClient(Egress(["127.0.0.2"], names.resolver()), tls)
    url = f"https://rebinding.test:{provider.port}/token"
    found = await failure(client, wanted(provider, token_url=url))
    assert not found.refused
    assert names.asked("rebinding.test", "A") == 1
    assert provider.connections == 0
    # The next request checks the name again.
    found = await failure(client, wanted(provider, token_url=url))
    assert found.refused
    assert "rebinding.test is in the operator's network" in found.message


async def test_a_name_that_does_not_exist_is_not_a_refusal(names: DnsServer) -> None:
    client = TokenClient(Egress(resolver=names.resolver()), TlsContexts())
    found = await failure(client, TokenRequest("https://nowhere.invalid/token", "id", "", "s" * 20))
    assert not found.refused
    assert "nowhere.invalid cannot be resolved" in found.message
