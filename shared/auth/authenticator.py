"""The authenticator of OUTBOX_AUTH=keys: reads the API key in the call's metadata.

A looked-up key is cached for CACHE_TIME, with the quotas of its user, so that most calls
need no statement. A server knows of a revoked or expired key and of a changed quota after that time
at the latest. If somebody keeps the table of keys locked, keys that were used shortly before work
on for LOCKED_TIME. Strangers can make up keys, so few unknown keys are looked up at a time.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

import structlog
from cachetools import TLRUCache
from sqlalchemy.exc import DBAPIError

from outbox_server.shared.auth.keys import ApiKeyKind, PresentedKey, read_key
from outbox_server.shared.auth.store import ApiKeyStore, StoredKey
from outbox_server.shared.bounds import MAX_METADATA_VALUE
from outbox_server.shared.callers import Caller, CallerKind, Metadata
from outbox_server.shared.database.engine import is_locked
from outbox_server.shared.errors import Unauthenticated

# A revocation or expiry takes effect within this time.
CACHE_TIME: Final = timedelta(seconds=5)
# While the table is locked, nobody else can revoke a key. So a key that was valid is accepted for
# this time after its last look-up.
LOCKED_TIME: Final = timedelta(minutes=10)
# It must also have been looked up within this time before the lock began. Otherwise it may have
# been revoked between the look-up and the lock.
USED_BEFORE_LOCK: Final = timedelta(minutes=1)
# The maximum number of cached keys, including invalid ones. It bounds the memory that strangers can
# make us use.
_CACHE_SIZE: Final = 10_000
# How many unknown keys are looked up at a time. Each needs a connection to PostgreSQL.
_UNKNOWN_AT_ONCE: Final = 4
# How long the place of a key that does not exist rests, in seconds. Without it, made-up keys could
# take all of the server's time. Keys that exist wait a little longer for their first look-up.
_REST_S: Final = 0.02

_HEADER: Final = "authorization"
_SCHEME: Final = "bearer"
_KINDS: Final = {
    ApiKeyKind.USER: CallerKind.USER,
    ApiKeyKind.SERVICE: CallerKind.SERVICE,
    ApiKeyKind.OPERATOR: CallerKind.OPERATOR,
}


@dataclass(frozen=True, slots=True)
class _Known:
    """A cached look-up: the caller of a key, or None if the key is not valid.

    It is used until `until`, and until `last` while the table is locked. It was read at `read_at`.
    """

    caller: Caller | None
    until: float
    last: float
    read_at: float


class KeyAuthenticator:
    """Looks keys up in PostgreSQL, each at most once per `cache_time`."""

    def __init__(self, store: ApiKeyStore, cache_time: timedelta = CACHE_TIME) -> None:
        self._store = store
        self._cache_s = cache_time.total_seconds()
        self._known: TLRUCache[PresentedKey, _Known] = TLRUCache(
            _CACHE_SIZE, ttu=lambda _key, known, _now: known.last, timer=time.monotonic
        )
        # When the table was first found locked. None means that it is not.
        self._locked_at: float | None = None
        # The look-ups in progress: calls with the same key share one.
        self._lookups: dict[PresentedKey, asyncio.Task[Caller | None]] = {}
        self._unknown = asyncio.Semaphore(_UNKNOWN_AT_ONCE)
        self._noting: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("outbox.auth")

    async def authenticate(self, metadata: Metadata) -> Caller:
        """Return the caller whose key is in the metadata.

        Raises:
            Unauthenticated: there is no key (API_KEY_MISSING), or it is unknown, revoked or
                expired (API_KEY_INVALID, which does not say which).
            sqlalchemy.exc.SQLAlchemyError: PostgreSQL is unreachable, or somebody keeps the table
                of keys locked, and the key is not cached.
        """
        presented = _presented(metadata)
        known = self._known.get(presented)
        if known is not None and time.monotonic() < known.until:
            caller = known.caller
        else:
            caller = await self._look_up_once(presented)
        if caller is None:
            raise _invalid()
        return caller

    async def close(self) -> None:
        """Wait for unfinished statements. Call it before the engine is disposed of."""
        tasks = [*self._noting, *self._lookups.values()]
        if tasks:
            await asyncio.wait(tasks)

    async def _look_up_once(self, presented: PresentedKey) -> Caller | None:
        task = self._lookups.get(presented)
        if task is None:
            # The task has an empty context: many calls wait for it, and it belongs to none of them.
            task = asyncio.create_task(self._look_up(presented), context=Context())
            self._lookups[presented] = task
            task.add_done_callback(lambda _: self._lookups.pop(presented, None))
        # If this call is cancelled, the others still wait for the look-up.
        return await asyncio.shield(task)

    async def _look_up(self, presented: PresentedKey) -> Caller | None:
        if presented in self._known:
            return await self._read(presented)
        async with self._unknown:
            caller = await self._read(presented)
            if caller is None:
                await asyncio.sleep(_REST_S)
            return caller

    async def _read(self, presented: PresentedKey) -> Caller | None:
        # The time counts from before the look-up, so a revocation committed during it takes effect
        # in time.
        now = time.monotonic()
        until = now + self._cache_s
        try:
            stored = await self._store.find(presented.key_id)
        except DBAPIError as error:
            if not is_locked(error):
                raise
            return await self._look_up_briefly(presented, now, error)
        self._locked_at = None
        if stored is None or not presented.proves(stored.secret_hash):
            self._known[presented] = _Known(None, until, until, now)
            return None
        caller = Caller(
            stored.user_id,
            _KINDS[stored.kind],
            key_id=presented.key_id,
            quotas=stored.quotas,
            read_only=stored.read_only,
        )
        self._note_use(presented.key_id, stored)
        left = LOCKED_TIME if stored.expires_in is None else min(stored.expires_in, LOCKED_TIME)
        last = max(until, now + left.total_seconds())
        self._known[presented] = _Known(caller, until, last, now)
        return caller

    async def _look_up_briefly(
        self, presented: PresentedKey, now: float, error: DBAPIError
    ) -> Caller | None:
        """Look a known key up while somebody locks its table, or that of the users."""
        known = self._known.get(presented)
        if known is None:
            raise error
        until = min(now + self._cache_s, known.last)
        try:
            valid = await self._store.is_valid(presented.key_id)
        except DBAPIError as again:
            if not is_locked(again):
                raise
        else:
            # Only the table of users, which has the quotas, is locked.
            self._locked_at = None
            if valid:
                known = replace(known, until=until, read_at=now)
            else:
                known = _Known(None, now + self._cache_s, now + self._cache_s, now)
            self._known[presented] = known
            return known.caller
        if self._locked_at is None:
            self._locked_at = now
        if known.read_at < self._locked_at - USED_BEFORE_LOCK.total_seconds():
            raise error
        self._log.warning("table of API keys is locked", key_id=presented.key_id)
        self._known[presented] = replace(known, until=until)
        return known.caller

    def _note_use(self, key_id: str, stored: StoredKey) -> None:
        """Write `last_used_at` in the background: no caller waits for it."""
        if not stored.use_is_old:
            return
        task = asyncio.create_task(self._write_use(key_id))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def _write_use(self, key_id: str) -> None:
        try:
            await self._store.note_use(key_id)
        except Exception as error:  # noqa: BLE001 - a later use writes it
            self._log.warning("last use not written", key_id=key_id, error=type(error).__name__)


def _presented(metadata: Metadata) -> PresentedKey:
    values = [value for name, value in metadata if name == _HEADER]
    if not values:
        raise Unauthenticated(
            "this server requires an API key: send the metadata `authorization: Bearer <key>`",
            reason="API_KEY_MISSING",
        )
    if len(values[0]) > MAX_METADATA_VALUE:
        raise _invalid()
    text = values[0].decode("latin-1") if isinstance(values[0], bytes) else values[0]
    scheme, _, key = text.strip().partition(" ")
    presented = read_key(key.strip()) if scheme.lower() == _SCHEME else None
    if presented is None or len(values) > 1:
        raise _invalid()
    return presented


def _invalid() -> Unauthenticated:
    return Unauthenticated(
        "the API key is not valid: it is unknown, revoked or expired; create one with "
        "`outbox keys create`",
        reason="API_KEY_INVALID",
    )
