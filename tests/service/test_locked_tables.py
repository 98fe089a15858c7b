"""The table of API keys, which each call reads, locked by somebody: known callers do not notice.

Health reports a lock on the other tables that many calls read, because mail needs them too.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.sender_service_pb2 import GetSenderRequest
from sqlalchemy.exc import DBAPIError

from outbox_server.services.scheduler.storage import intake
from outbox_server.shared.auth import authenticator as key_authenticator
from outbox_server.shared.auth.authenticator import LOCKED_TIME, KeyAuthenticator
from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import ApiKeyStore, insert_key, revoke_key
from outbox_server.shared.callers import Caller, CallerKind
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.errors import Unauthenticated
from outbox_server.shared.settings import load_settings
from tests.scheduler_stack import refusal_of, running_scheduler
from tests.table_locks import locked
from tests.two_users import rivals

# Far below the time that a statement waits for a lock otherwise.
SOON = 5.0


@pytest.mark.parametrize(
    "mode",
    [
        "ACCESS EXCLUSIVE",
        # Then the time of the last use cannot be written.
        "SHARE",
    ],
)
async def test_calls_with_known_keys_go_on_while_the_table_of_keys_is_locked(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    # So that each call looks its key up.
    monkeypatch.setattr(KeyAuthenticator.__init__, "__defaults__", (timedelta(0),))
    async with rivals(database_url, redis_url, database_pool=2) as both:
        hers = await both.sender(both.ann)
        request = GetSenderRequest(sender_id=hers.sender_id)
        get = both.scheduler.senders.GetSender
        both.scheduler.execute("UPDATE api_keys SET last_used_at = NULL")
        async with locked(database_url, "api_keys", mode):
            for _ in range(3):
                answer = await get(request, metadata=both.ann, timeout=SOON)
                assert answer.sender_id == hers.sender_id
            # Her key was not used before.
            refusal = await refusal_of(get(request, metadata=both.eve, timeout=SOON))
            reads = mode == "SHARE"
            assert refusal.code == ("NOT_FOUND" if reads else "UNAVAILABLE")
            assert refusal.reason == ("SENDER_NOT_FOUND" if reads else "DATABASE_UNAVAILABLE")
        assert (await refusal_of(get(request, metadata=both.eve))).code == "NOT_FOUND"


async def test_a_batch_does_not_wait_for_a_locked_audit_log_for_long(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_LOCK_LIMIT", "500ms")
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        request = ScheduleBatchRequest(csv=b"email\na@b.org\n")
        request.options.sender_id = sender.sender_id
        request.options.request_id = "first"
        request.options.subject, request.options.body = "Hello", "Hi"
        call = scheduler.batches.ScheduleBatch
        async with locked(database_url, "audit_events"):
            refusal = await refusal_of(call(request, timeout=2 * SOON))
            assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert (await call(request)).batch.counts.scheduled_count == 1


async def test_a_locked_table_lengthens_the_life_of_no_key_beyond_its_expiry(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(key_authenticator, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine = create_engine(load_settings(database_url=database_url))
    authenticator = KeyAuthenticator(ApiKeyStore(engine))
    headers = []
    async with engine.begin() as connection:
        for expires_at in (None, datetime.now(UTC) + timedelta(minutes=2)):
            key = make_key()
            kind = ApiKeyKind.SERVICE
            await insert_key(connection, key, kind, None, "", expires_at=expires_at)
            headers.append((("authorization", f"Bearer {key.text}"),))
    for each in headers:
        await authenticator.authenticate(each)
    clock.now += 50.0
    async with locked(database_url, "api_keys"):
        await authenticator.authenticate(headers[0])
        clock.now += 50.0
        for each in headers:
            assert await authenticator.authenticate(each) == Caller(None, CallerKind.SERVICE)
        clock.now += 21.0
        await authenticator.authenticate(headers[0])
        with pytest.raises(DBAPIError):
            await authenticator.authenticate(headers[1])
        clock.now += LOCKED_TIME.total_seconds()
        with pytest.raises(DBAPIError):
            await authenticator.authenticate(headers[0])
    await authenticator.close()
    await engine.dispose()


async def test_a_key_that_was_revoked_before_or_beside_the_lock_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(key_authenticator, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine = create_engine(load_settings(database_url=database_url))
    authenticator = KeyAuthenticator(ApiKeyStore(engine))
    keys = [make_key() for _ in range(3)]
    async with engine.begin() as connection:
        for key in keys:
            await insert_key(connection, key, ApiKeyKind.SERVICE, None, "")
    early, late, kept = ((("authorization", f"Bearer {key.text}"),) for key in keys)
    for each in (early, late, kept):
        await authenticator.authenticate(each)

    async def revoke(key_id: str) -> None:
        async with engine.begin() as connection:
            assert await revoke_key(connection, key_id) is not None

    # A key may be revoked while the table of users is locked, which each look-up reads too.
    async with locked(database_url, "users"):
        await revoke(keys[1].key_id)
        clock.now += 10.0
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(late)
        assert await authenticator.authenticate(kept) == Caller(None, CallerKind.SERVICE)
    # Not used since.
    await revoke(keys[0].key_id)
    clock.now += 55.0
    await authenticator.authenticate(kept)
    clock.now += 6.0
    async with locked(database_url, "api_keys"):
        await authenticator.authenticate(kept)
        with pytest.raises(DBAPIError):
            await authenticator.authenticate(early)
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(early)
    await authenticator.close()
    await engine.dispose()
