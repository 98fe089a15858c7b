"""The dispatcher's connections to a mail server that accepts access tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.egress import Egress
from outbox_server.shared.oauth2.credentials import OAuth2Ref
from outbox_server.shared.oauth2.token_client import TokenClient
from outbox_server.shared.oauth2.token_source import TokenSource
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import AttemptOutcome, ReplyClass, SmtpSecurity
from outbox_server.shared.tls import TlsContexts
from tests.dispatchers import settings_of
from tests.eventually import eventually
from tests.oauth2_installation import MAILBOX, REVOKED, OAuth2Installation, installed
from tests.oauth2_provider import Hold, PlannedAnswer
from tests.smtp_pools import all_closed, endpoint_of, open_connections, pool_of, send


@pytest.fixture
async def installation(
    database_url: str, redis_url: str, tmp_path: Path
) -> AsyncIterator[OAuth2Installation]:
    async with installed(database_url, redis_url, tmp_path) as running:
        yield running


@asynccontextmanager
async def pooled(installation: OAuth2Installation) -> AsyncIterator[SmtpPool]:
    """Run a pool with one connection per endpoint and tokens as in a dispatcher."""
    settings = settings_of(installation.values)
    engine = create_engine(settings, lookups_only=True, single_statements=True)
    box = SecretBox.from_settings(settings)
    client = TokenClient.from_settings(settings, Egress.from_settings(settings))
    tokens = TokenSource(engine, box, client)
    pool = pool_of(timeout=5.0, size=1, tls=TlsContexts.from_settings(settings), tokens=tokens)
    try:
        yield pool
    finally:
        await pool.close()
        await tokens.close()
        await engine.dispose()


async def new_endpoint(
    installation: OAuth2Installation, security: SmtpSecurity = SmtpSecurity.TLS
) -> Endpoint:
    """Return the endpoint of a new sender."""
    await installation.sender()
    ref = OAuth2Ref(installation.scheduler.value("SELECT max(id) FROM oauth2_credentials"))
    return endpoint_of(installation.server, security=security, username=MAILBOX, oauth2=ref)


async def test_a_connection_is_reused_with_the_token_that_it_was_opened_with(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        for _ in range(3):
            assert (await send(pool, endpoint)).reply_class is ReplyClass.SENT
        assert len(installation.server.presented) == installation.server.connections == 1


async def test_a_refused_token_has_the_class_account_and_no_code(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        good = set(installation.provider.refresh_tokens)
        installation.provider.refresh_tokens.clear()
        result = await send(pool, endpoint)
        assert result.outcome is AttemptOutcome.TEMPORARY_FAILURE
        assert (result.reply_class, result.smtp_code) == (ReplyClass.ACCOUNT, None)
        assert result.message == REVOKED
        assert not result.body_begun
        assert installation.server.connections == 0
        # Its slot is free again, and the endpoint is not counted as failed.
        assert [(each.connection_count, each.last_error) for each in pool.states()] == [(0, "")]
        installation.provider.refresh_tokens |= good
        installation.scheduler.execute("UPDATE oauth2_credentials SET retry_at = now()")
        assert (await send(pool, endpoint)).outcome is AttemptOutcome.SENT


async def test_a_provider_without_a_usable_answer_is_a_connection_failure(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        installation.provider.plan = [PlannedAnswer(503)]
        result = await send(pool, endpoint)
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert (result.reply_class, result.smtp_code) == (None, None)
        assert "answered 503" in (result.message or "")
        assert open_connections(pool) == 0


async def test_a_send_whose_lease_ends_during_the_request_stops_waiting(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        hold = Hold()
        installation.provider.plan = [hold]
        sending = asyncio.create_task(send(pool, endpoint, within=1.0))
        await eventually(lambda: installation.provider.held == 1)
        result = await sending
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert result.message == "OAuth 2.0: no access token in time"
        assert installation.server.connections == open_connections(pool) == 0
        # The request continues for the next send.
        hold.event.set()
        assert (await send(pool, endpoint)).outcome is AttemptOutcome.SENT
        assert len(installation.provider.requests) == 1


async def test_a_revoked_token_is_replaced_once_on_a_new_connection(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        assert (await send(pool, endpoint)).outcome is AttemptOutcome.SENT
    installation.provider.access_tokens.clear()
    installation.server.presented.clear()
    installation.server.quits.clear()
    async with pooled(installation) as pool:
        result = await send(pool, endpoint)
        assert result.outcome is AttemptOutcome.SENT
        first, second = installation.server.presented
        assert (first.accepted, second.accepted) == (False, True)
        assert first.connection != second.connection
        # The refused connection is closed before the next is opened, since only one is permitted.
        assert installation.server.quits == [first.connection]
        assert open_connections(pool) == 1


async def test_a_second_refusal_is_a_failed_authentication(
    installation: OAuth2Installation,
) -> None:
    installation.server._accepts = lambda _name, _token: False
    installation.server._quotes = True
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        result = await send(pool, endpoint)
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert (result.reply_class, result.smtp_code) == (ReplyClass.AUTH, 535)
        assert "[token]" in (result.message or "")
        assert len(installation.server.presented) == 2
        assert len(installation.provider.requests) == 2
        await all_closed(pool)


async def test_a_refused_token_begins_a_cooldown_if_the_provider_refuses_another(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation)
    async with pooled(installation) as pool:
        assert (await send(pool, endpoint)).outcome is AttemptOutcome.SENT
    installation.provider.access_tokens.clear()
    installation.provider.refresh_tokens.clear()
    installation.server.presented.clear()
    # The pool of another process has no connection, and reads the stored token.
    async with pooled(installation) as pool:
        result = await send(pool, endpoint)
        assert result.reply_class is ReplyClass.ACCOUNT
        assert result.message == REVOKED
        assert len(installation.server.presented) == 1
        assert open_connections(pool) == 0


async def test_no_token_is_requested_for_a_session_in_clear(
    installation: OAuth2Installation,
) -> None:
    endpoint = await new_endpoint(installation, SmtpSecurity.NONE)
    async with pooled(installation) as pool:
        result = await send(pool, endpoint)
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert result.message == "the access token is sent over TLS only: use STARTTLS or TLS"
        assert installation.provider.requests == []
