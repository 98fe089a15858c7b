"""Access tokens shared by processes: requested once, in time, and never lost."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from psycopg.rows import namedtuple_row
from sqlalchemy import Engine, event, insert
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import OAuth2CredentialsRow, Sender
from outbox_server.shared.egress import Egress
from outbox_server.shared.oauth2.credentials import OAuth2Ref, TokenRefused, TokenUnavailable
from outbox_server.shared.oauth2.token_client import TokenClient
from outbox_server.shared.oauth2.token_source import TokenSource
from outbox_server.shared.secrets import SecretBox, generate_key
from outbox_server.shared.settings import load_settings
from outbox_server.shared.tls import TlsContexts
from tests.conftest import Stores
from tests.eventually import eventually
from tests.oauth2_provider import Hold, OAuth2Provider, PlannedAnswer

ROOT = Path(__file__).parent.parent.parent
KEY = generate_key()
BOX = SecretBox([KEY])


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


@pytest.fixture
async def provider(certificate: Certificate) -> AsyncIterator[OAuth2Provider]:
    async with OAuth2Provider(server_context(certificate)) as running:
        yield running


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=database_url))
    yield engine
    await engine.dispose()


class NewSource(Protocol):
    def __call__(
        self, *, box: SecretBox = BOX, lease: timedelta = timedelta(seconds=20)
    ) -> TokenSource: ...


@pytest.fixture
async def new_source(database_url: str, certificate: Certificate) -> AsyncIterator[NewSource]:
    """Return a function that creates the token source of another process."""
    async with AsyncExitStack() as stack:

        def make(*, box: SecretBox = BOX, lease: timedelta = timedelta(seconds=20)) -> TokenSource:
            settings = load_settings(database_url=database_url)
            own = create_engine(settings, lookups_only=True, single_statements=True)
            stack.push_async_callback(own.dispose)
            tls = TlsContexts(certificate.public.read_text())
            source = TokenSource(own, box, TokenClient(Egress(["127.0.0.1"]), tls), lease=lease)
            stack.push_async_callback(source.close)
            return source

        yield make


async def store(engine: AsyncEngine, provider: OAuth2Provider, **columns: Any) -> OAuth2Ref:
    """Store a sender with credentials, as the scheduler does."""
    values = {
        "token_url": provider.url,
        "client_id": provider.client_id,
        "scope": "https://mail.google.com/",
        "client_secret": BOX.encrypt(provider.client_secret),
        "refresh_token": BOX.encrypt(provider.refresh_token),
        **columns,
    }
    sender = insert(Sender).values(user_id="ann", email="a@x.test", hourly_limit=1)
    async with engine.begin() as connection:
        sender_id = (await connection.execute(sender.returning(Sender.id))).scalar_one()
        made = await connection.execute(
            insert(OAuth2CredentialsRow)
            .values(sender_id=sender_id, **values)
            .returning(OAuth2CredentialsRow.id)
        )
        return OAuth2Ref(made.scalar_one())


async def change(database_url: str, ref: OAuth2Ref, assignments: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        statement = f"UPDATE oauth2_credentials SET {assignments} WHERE id = %s"
        await connection.execute(statement.encode(), [ref.credentials_id])


async def row(database_url: str, ref: OAuth2Ref) -> Any:
    async with await psycopg.AsyncConnection.connect(
        database_url, row_factory=namedtuple_row
    ) as connection:
        found = await connection.execute(
            "SELECT *, expires_at - clock_timestamp() AS left,"
            " refresh_at - clock_timestamp() AS until_refresh,"
            " retry_at - clock_timestamp() AS until_retry, clock_timestamp() AS now"
            " FROM oauth2_credentials WHERE id = %s",
            [ref.credentials_id],
        )
        return await found.fetchone()


EXPIRE = "expires_at = clock_timestamp() - interval '1 s', refresh_at = clock_timestamp()"
AGE = "refresh_at = clock_timestamp() - interval '1 s'"


async def test_a_token_is_requested_once_and_shared(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    first, second = new_source(), new_source()
    token = await first.token(ref)
    assert {token} == provider.access_tokens
    assert await second.token(ref) == token
    assert await first.token(ref) == token
    assert len(provider.requests) == 1
    stored = await row(database_url, ref)
    assert token.encode() not in stored.access_token
    assert BOX.decrypt(stored.access_token) == token
    assert timedelta(seconds=3500) < stored.left <= timedelta(seconds=3599)
    # The next token is requested five minutes before the end of this one.
    assert abs(stored.left - stored.until_refresh - timedelta(minutes=5)) < timedelta(seconds=1)


async def test_a_short_lived_token_is_used_until_a_tenth_of_its_lifetime_is_left(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    provider.lifetime = 100
    ref = await store(engine, provider)
    await new_source().token(ref)
    stored = await row(database_url, ref)
    assert abs(stored.left - stored.until_refresh - timedelta(seconds=10)) < timedelta(seconds=1)


async def test_processes_that_need_a_token_at_once_request_one(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    sources = [new_source() for _ in range(3)]
    asking = [asyncio.create_task(source.token(ref)) for source in sources for _ in range(4)]
    await eventually(lambda: provider.held == 1)
    hold.event.set()
    tokens = set(await asyncio.gather(*asking))
    assert tokens == provider.access_tokens
    assert len(provider.requests) == 1


async def test_a_request_of_another_process_is_polled_less_and_less_often(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    requesting = asyncio.create_task(new_source().token(ref))
    await eventually(lambda: provider.held == 1)
    statements: list[str] = []

    def count(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(Engine, "before_cursor_execute", count)
    try:
        began = time.monotonic()
        waiting = asyncio.create_task(new_source().token(ref))
        # Two statements for each look, at 0, 0.1, 0.3, 0.7 and 1.5 s.
        await eventually(lambda: time.monotonic() - began > 2 and len(statements) > 2)
        assert len(statements) < 16
    finally:
        event.remove(Engine, "before_cursor_execute", count)
        hold.event.set()
    assert await waiting == await requesting


async def test_a_token_about_to_expire_is_replaced_while_it_is_still_used(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    first, second = new_source(), new_source()
    old = await first.token(ref)
    await change(database_url, ref, AGE)
    hold = Hold()
    provider.plan = [hold]
    # The request for the next token does not wait for it either.
    assert await first.token(ref) == old
    await eventually(lambda: provider.held == 1)
    assert await first.token(ref) == old
    assert await second.token(ref) == old
    hold.event.set()
    await first.close()
    new = await second.token(ref)
    assert new != old
    assert await first.token(ref) == new
    assert len(provider.requests) == 2


async def test_a_token_that_has_expired_is_not_used(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    source = new_source()
    old = await source.token(ref)
    await change(database_url, ref, EXPIRE)
    assert await source.token(ref) != old


async def test_a_token_that_a_mail_server_refused_is_replaced_once_for_all_processes(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    first, second = new_source(), new_source()
    refused = await first.token(ref)
    replaced = await asyncio.gather(
        *(source.token(ref, refused=refused) for source in (first, second) for _ in range(3))
    )
    assert len(set(replaced)) == 1
    assert replaced[0] != refused
    assert len(provider.requests) == 2


# A process that requests a token, with a lease of half a second.
REQUESTER = """
import asyncio, sys
from datetime import timedelta
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.egress import Egress
from outbox_server.shared.oauth2.credentials import OAuth2Ref
from outbox_server.shared.oauth2.token_client import TokenClient
from outbox_server.shared.oauth2.token_source import TokenSource
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import load_settings

async def main():
    settings = load_settings()
    source = TokenSource(
        create_engine(settings, lookups_only=True, single_statements=True),
        SecretBox.from_settings(settings),
        TokenClient.from_settings(settings, Egress.from_settings(settings)),
        lease=timedelta(milliseconds=500),
    )
    await source.token(OAuth2Ref(int(sys.argv[1])))

asyncio.run(main())
"""


async def test_the_token_of_a_process_that_was_killed_is_requested_by_another(
    engine: AsyncEngine,
    new_source: NewSource,
    provider: OAuth2Provider,
    database_url: str,
    certificate: Certificate,
) -> None:
    ref = await store(engine, provider)
    provider.plan = [Hold()]
    environment = {name: text for name, text in os.environ.items() if name[:7] != "OUTBOX_"} | {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_ENCRYPTION_KEYS": KEY,
        "OUTBOX_SMTP_ALLOW": "127.0.0.1",
        "OUTBOX_SMTP_CA": str(certificate.public),
    }
    command = (sys.executable, "-c", REQUESTER, str(ref.credentials_id))
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT)
    try:
        await eventually(lambda: provider.held == 1)
    finally:
        process.kill()
        await process.wait()
    assert (await row(database_url, ref)).lease_until is not None
    token = await new_source().token(ref)
    assert {token} == provider.access_tokens
    assert len(provider.requests) == 2
    assert (await row(database_url, ref)).lease_until is None


async def test_a_caller_that_gives_up_does_not_lose_the_token(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    provider.style = "microsoft"
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    source = new_source()
    asking = asyncio.create_task(source.token(ref))
    await eventually(lambda: provider.held == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    hold.event.set()
    await source.close()
    stored = await row(database_url, ref)
    assert BOX.decrypt(stored.refresh_token) == provider.refresh_token
    assert await new_source().token(ref) in provider.access_tokens
    assert len(provider.requests) == 1


async def test_the_newest_refresh_token_is_the_one_that_is_used(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    provider.style = "microsoft"
    ref = await store(engine, provider)
    for source in (new_source(), new_source(), new_source()):
        await change(database_url, ref, "access_token = NULL, refresh_at = NULL, expires_at = NULL")
        await source.token(ref)
        newest = provider.refresh_token
        assert BOX.decrypt((await row(database_url, ref)).refresh_token) == newest
        # A provider that invalidates the old tokens does the same.
        provider.refresh_tokens = {newest}
    assert [form["refresh_token"][-4:] for form in provider.requests] == ["0000", "0001", "0002"]


async def test_a_provider_that_names_no_new_refresh_token_keeps_the_old(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    await new_source().token(ref)
    kept = (await row(database_url, ref)).refresh_token
    assert BOX.decrypt(kept) == provider.refresh_token


async def test_a_token_is_stored_although_its_lease_ran_out(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    """The new refresh token is stored: it may have invalidated the old one."""
    provider.style = "microsoft"
    ref = await store(engine, provider)
    slow, late = Hold(), Hold()
    provider.plan = [slow, late]
    first, second = new_source(lease=timedelta(milliseconds=50)), new_source()
    asking = asyncio.create_task(first.token(ref))
    await eventually(lambda: provider.held == 1)
    other = asyncio.create_task(second.token(ref))
    await eventually(lambda: provider.held == 2)
    slow.event.set()
    token = await asking
    stored = await row(database_url, ref)
    assert BOX.decrypt(stored.access_token) == token
    assert BOX.decrypt(stored.refresh_token) == provider.refresh_token
    # The later process discards its own token and uses the stored one.
    late.event.set()
    assert await other == token
    assert (await row(database_url, ref)).refresh_token == stored.refresh_token


async def test_a_token_that_cannot_be_stored_at_once_is_stored_later(
    new_source: NewSource, provider: OAuth2Provider, engine: AsyncEngine, stores: Stores
) -> None:
    provider.style = "microsoft"
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    source = new_source()
    asking = asyncio.create_task(source.token(ref))
    await eventually(lambda: provider.held == 1)
    await stores.postgres.stop()
    try:
        hold.event.set()
        await eventually(lambda: provider.held == 0)
    finally:
        await stores.postgres.start()
    token = await asking
    assert {token} == provider.access_tokens
    assert len(provider.requests) == 1


async def test_a_refusal_is_reported_with_the_providers_text(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    provider.refresh_tokens.clear()
    first, second = new_source(), new_source()
    for source in (first, second, first):
        with pytest.raises(TokenRefused) as caught:
            await source.token(ref)
        assert str(caught.value) == ("OAuth 2.0: invalid_grant: Token has been expired or revoked.")
    # Many concurrent sends make one request.
    assert len(provider.requests) == 1


async def test_a_refusal_is_shared_with_the_processes_that_wait_for_it(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    sources = [new_source() for _ in range(4)]
    asking = [asyncio.create_task(source.token(ref)) for source in sources]
    await eventually(lambda: provider.held == 1)
    provider.refresh_tokens.clear()
    hold.event.set()
    for each in asking:
        with pytest.raises(TokenRefused, match="expired or revoked"):
            await each
    assert len(provider.requests) == 1


async def test_after_a_refusal_the_provider_is_asked_again(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    good = provider.refresh_token
    ref = await store(engine, provider)
    provider.refresh_tokens.clear()
    source = new_source()
    with pytest.raises(TokenRefused):
        await source.token(ref)
    stored = await row(database_url, ref)
    assert timedelta(0) < stored.until_retry <= timedelta(seconds=5)
    provider.refresh_tokens.add(good)
    await change(database_url, ref, "retry_at = clock_timestamp()")
    assert await source.token(ref) in provider.access_tokens
    stored = await row(database_url, ref)
    assert (stored.error, stored.retry_at, stored.refused) == (None, None, False)


async def test_a_refused_refresh_leaves_the_token_that_is_still_valid(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    source = new_source()
    token = await source.token(ref)
    provider.refresh_tokens.clear()
    await change(database_url, ref, AGE)
    assert await source.token(ref) == token
    await source.close()
    assert (await row(database_url, ref)).refused
    assert await source.token(ref) == token
    await change(database_url, ref, EXPIRE)
    with pytest.raises(TokenRefused):
        await source.token(ref)


async def test_a_provider_that_fails_is_asked_less_and_less_often(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    source = new_source()
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        provider.plan = [PlannedAnswer(503)]
        await change(database_url, ref, "retry_at = clock_timestamp(), error = ''")
        before = (await row(database_url, ref)).now
        with pytest.raises(TokenUnavailable, match="answered 503"):
            await source.token(ref)
        after = await row(database_url, ref)
        assert before <= after.retry_at - timedelta(seconds=seconds) <= after.now
    assert len(provider.requests) == 8


async def test_the_wait_that_a_provider_asks_for_holds_for_all(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    provider.plan = [PlannedAnswer(429, headers={"Retry-After": "120"})]
    for source in (new_source(), new_source()):
        with pytest.raises(TokenUnavailable, match="answered 429"):
            await source.token(ref)
    assert len(provider.requests) == 1
    assert (await row(database_url, ref)).until_retry > timedelta(seconds=100)


async def test_a_provider_that_hangs_for_one_sender_delays_no_other(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    stuck, other = await store(engine, provider), await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    source = new_source()
    asking = asyncio.create_task(source.token(stuck))
    await eventually(lambda: provider.held == 1)
    token = await source.token(other)
    assert not asking.done()
    hold.event.set()
    assert await asking != token


async def test_credentials_that_were_replaced_give_no_token(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = OAuth2Ref((await store(engine, provider)).credentials_id + 1000)
    with pytest.raises(TokenUnavailable, match="were replaced meanwhile"):
        await new_source().token(ref)
    assert provider.requests == []


async def test_credentials_replaced_during_a_request_do_not_get_its_token(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider, database_url: str
) -> None:
    ref = await store(engine, provider)
    hold = Hold()
    provider.plan = [hold]
    asking = asyncio.create_task(new_source().token(ref))
    await eventually(lambda: provider.held == 1)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("DELETE FROM oauth2_credentials")
    hold.event.set()
    with pytest.raises(TokenUnavailable, match="were replaced meanwhile"):
        await asking


async def test_a_sender_with_undecryptable_credentials_waits_and_requests_no_token(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    ref = await store(engine, provider)
    with pytest.raises(TokenRefused, match="no key of OUTBOX_ENCRYPTION_KEYS"):
        await new_source(box=SecretBox([generate_key()])).token(ref)
    assert provider.requests == []


async def test_an_undecryptable_access_token_is_replaced(
    engine: AsyncEngine, new_source: NewSource, provider: OAuth2Provider
) -> None:
    lost = SecretBox([generate_key()])
    ref = await store(engine, provider)
    await new_source().token(ref)
    async with engine.begin() as connection:
        await connection.execute(
            OAuth2CredentialsRow.__table__.update().values(access_token=lost.encrypt("lost"))  # type: ignore[attr-defined]
        )
    assert await new_source().token(ref) in provider.access_tokens
    assert len(provider.requests) == 2


async def test_an_unreachable_database_is_not_a_refusal(
    new_source: NewSource, provider: OAuth2Provider, engine: AsyncEngine, stores: Stores
) -> None:
    ref = await store(engine, provider)
    source = new_source()
    await stores.postgres.stop()
    try:
        with pytest.raises(TokenUnavailable, match="PostgreSQL does not reply"):
            await source.token(ref)
    finally:
        await stores.postgres.start()
    assert await source.token(ref) in provider.access_tokens
