"""OUTBOX_AUTH=keys: who calls, by the API key of the call's metadata.

A key that was looked up is believed for CACHE_TIME, so that calls cost no statement each; within
that time after `outbox keys revoke` the key stops working, on every server.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog
from cachetools import TLRUCache

from outbox_server.shared.auth.keys import ApiKeyKind, PresentedKey, read_key
from outbox_server.shared.auth.store import ApiKeyStore, StoredKey
from outbox_server.shared.callers import Caller, CallerKind, Metadata
from outbox_server.shared.errors import Unauthenticated

# Revocation takes hold within this time.
CACHE_TIME: Final = timedelta(seconds=5)
# Keys that are remembered, wrong ones among them: bounds what strangers can make us keep.
_CACHE_SIZE: Final = 10_000

_HEADER: Final = "authorization"
_SCHEME: Final = "bearer"
_KINDS: Final = {
    ApiKeyKind.USER: CallerKind.USER,
    ApiKeyKind.SERVICE: CallerKind.SERVICE,
    ApiKeyKind.OPERATOR: CallerKind.OPERATOR,
}


@dataclass(frozen=True, slots=True)
class _Known:
    """What a key came to; None: to nothing."""

    caller: Caller | None
    until: float


class KeyAuthenticator:
    """Looks keys up in PostgreSQL, each at most once in `cache_time`."""

    def __init__(self, store: ApiKeyStore, cache_time: timedelta = CACHE_TIME) -> None:
        self._store = store
        self._cache_s = cache_time.total_seconds()
        self._known: TLRUCache[PresentedKey, _Known] = TLRUCache(
            _CACHE_SIZE, ttu=lambda _key, known, _now: known.until, timer=time.monotonic
        )
        # Of many calls with a key that is not known (any more), one asks.
        self._asking: dict[PresentedKey, asyncio.Task[Caller | None]] = {}
        self._noting: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("outbox.auth")

    async def authenticate(self, metadata: Metadata) -> Caller:
        """Return the caller whose key is in the metadata.

        Raises:
            Unauthenticated: there is no key (API_KEY_MISSING), or it is none of ours or revoked
                (API_KEY_INVALID): the caller cannot tell which.
            sqlalchemy.exc.SQLAlchemyError: PostgreSQL is gone, and the key is not remembered.
        """
        presented = _presented(metadata)
        known = self._known.get(presented)
        caller = await self._ask_once(presented) if known is None else known.caller
        if caller is None:
            raise _invalid()
        return caller

    async def close(self) -> None:
        """Wait for what is being written; to be called before the engine is disposed of."""
        tasks = [*self._noting, *self._asking.values()]
        if tasks:
            await asyncio.wait(tasks)

    async def _ask_once(self, presented: PresentedKey) -> Caller | None:
        task = self._asking.get(presented)
        if task is None:
            # In no call's context: many wait for it, and it is about none of their users.
            task = asyncio.create_task(self._ask(presented), context=Context())
            self._asking[presented] = task
            task.add_done_callback(lambda _: self._asking.pop(presented, None))
        # The call that asks may be cancelled; the others wait for the same answer.
        return await asyncio.shield(task)

    async def _ask(self, presented: PresentedKey) -> Caller | None:
        # From before the look on: a revocation that comes beside it counts from its commit.
        until = time.monotonic() + self._cache_s
        stored = await self._store.find(presented.key_id)
        caller = None
        if stored is not None and presented.proves(stored.secret_hash):
            caller = Caller(user_id=stored.user_id, kind=_KINDS[stored.kind])
            self._note_use(presented.key_id, stored)
        self._known[presented] = _Known(caller, until)
        return caller

    def _note_use(self, key_id: str, stored: StoredKey) -> None:
        """Write `last_used_at` beside the call: no caller waits for it."""
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
            "this server asks for an API key: send the metadata `authorization: Bearer <key>`",
            reason="API_KEY_MISSING",
        )
    text = values[0].decode("latin-1") if isinstance(values[0], bytes) else values[0]
    scheme, _, key = text.strip().partition(" ")
    presented = read_key(key.strip()) if scheme.lower() == _SCHEME else None
    if presented is None or len(values) > 1:
        raise _invalid()
    return presented


def _invalid() -> Unauthenticated:
    return Unauthenticated(
        "the API key is not valid: it was never made here, or it is revoked; "
        "`outbox keys create` makes one",
        reason="API_KEY_INVALID",
    )
