"""Gives access tokens to sessions. One process requests a token, and all processes use it."""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.oauth2 import token_store
from outbox_server.shared.oauth2.credentials import OAuth2Ref, TokenRefused, TokenUnavailable
from outbox_server.shared.oauth2.token_answers import Failure, Grant, outage, refusal
from outbox_server.shared.oauth2.token_client import LIMIT, TokenClient, TokenRequest
from outbox_server.shared.oauth2.token_store import LeasedCredentials, StoredToken
from outbox_server.shared.secrets import SecretBox

# The next token is requested when this much of the lifetime is left, or a tenth of it if less.
REFRESH_MARGIN: Final = timedelta(minutes=5)
_TENTH: Final = 10
# For how long one process may request a token: the request, and the reads and writes around it. If
# the process dies, another may request the token after this time.
LEASE: Final = 2 * LIMIT
# For how long every caller gets the same refusal, so that many sends at once make one request. It
# is shorter than the steps of OUTBOX_COOLDOWN, which decides when the provider is asked again.
REFUSAL_HOLDS: Final = timedelta(seconds=5)
# For how long every caller gets the same temporary failure. Each further failure doubles it.
FIRST_PAUSE: Final = timedelta(seconds=1)
LAST_PAUSE: Final = timedelta(minutes=1)
# For how long writing a new token is tried if PostgreSQL cannot be reached. The token must not be
# lost, because the provider may have ended the old refresh token.
_WRITE_LIMIT_S: Final = 60.0
_WRITE_PAUSE_S: Final = 0.5
# How long to wait for another process's request, and the first and the longest pause between two
# reads of its state. The pauses grow, because a provider that hangs does so for many senders.
_WAIT_LIMIT_S: Final = LEASE.total_seconds() + 5
_WAIT_PAUSE_S: Final = 0.1
_LONGEST_WAIT_PAUSE_S: Final = 1.0
_CLOSE_LIMIT_S: Final = LIMIT.total_seconds() + 2
_log = structlog.get_logger(__name__)


class TokenSource:
    """Reads access tokens from PostgreSQL, and requests new ones before the old ones expire."""

    def __init__(
        self,
        engine: AsyncEngine,
        secrets: SecretBox,
        client: TokenClient,
        *,
        lease: timedelta = LEASE,
    ) -> None:
        self._engine = engine
        self._secrets = secrets
        self._client = client
        self._lease = lease
        # The requests in progress by the id of the credentials, so that senders do not wait for
        # each other.
        self._renewals: dict[int, asyncio.Task[None]] = {}

    async def token(self, ref: OAuth2Ref, *, refused: str | None = None) -> str:
        """Return a valid access token, other than `refused`, which a mail server did not accept.

        It returns within about half a minute. If the call is cancelled, the request goes on for
        other callers.

        Raises:
            TokenRefused: the provider refuses an access token.
            TokenUnavailable: the provider or PostgreSQL gives no usable answer, or the credentials
                were replaced meanwhile.
        """
        try:
            stored = await self._read(ref)
            token = self._usable(stored, refused)
            if token is None and stored.failure is None:
                await asyncio.shield(self._renewal(ref, stored.version))
                stored = await self._read(ref)
                token = self._usable(stored, refused)
            elif not (stored.fresh or stored.leased or stored.failure):
                # The request runs in the background, because the current token is still valid.
                self._renewal(ref, stored.version)
        except TokenUnavailable:
            raise
        except DATABASE_ERRORS as error:
            raise TokenUnavailable("OAuth 2.0: PostgreSQL does not reply") from error
        if token is not None:
            return token
        failure = stored.failure or outage("another process is still requesting an access token")
        raise (TokenRefused if failure.refused else TokenUnavailable)(failure.message)

    async def close(self) -> None:
        """Wait for requests in progress, for about 12 s, and cancel the rest."""
        if self._renewals:
            _, stuck = await asyncio.wait(self._renewals.values(), timeout=_CLOSE_LIMIT_S)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    async def _read(self, ref: OAuth2Ref) -> StoredToken:
        async with self._engine.connect() as connection:
            stored = await token_store.read_token(connection, ref.credentials_id)
        if stored is None:
            raise TokenUnavailable("OAuth 2.0: the sender's credentials were replaced meanwhile")
        return stored

    def _usable(self, stored: StoredToken, refused: str | None) -> str | None:
        if stored.access_token is None:
            return None
        try:
            token = self._secrets.decrypt(stored.access_token)
        except FailedPrecondition:
            # Its encryption key was removed. The next token is encrypted with a current key.
            return None
        return None if token == refused else token

    def _renewal(self, ref: OAuth2Ref, version: UUID) -> asyncio.Task[None]:
        """Return the task that requests the token after `version`. There is one per process."""
        running = self._renewals.get(ref.credentials_id)
        if running is None:
            # The task has a context of its own, because it outlives the call that starts it.
            running = asyncio.create_task(self._renew(ref, version), context=Context())
            self._renewals[ref.credentials_id] = running
            running.add_done_callback(lambda done: self._ended(ref, done))
        return running

    def _ended(self, ref: OAuth2Ref, done: asyncio.Task[None]) -> None:
        del self._renewals[ref.credentials_id]
        error = None if done.cancelled() else done.exception()
        if error is not None:
            _log.warning("oauth2_request_failed", error=type(error).__name__)

    async def _renew(self, ref: OAuth2Ref, version: UUID) -> None:
        """Request the next token, or wait until another process has done so."""
        give_up = time.monotonic() + _WAIT_LIMIT_S
        pause = _WAIT_PAUSE_S
        while time.monotonic() < give_up:
            async with self._engine.begin() as connection:
                leased = await token_store.take_lease(
                    connection, ref.credentials_id, version, self._lease
                )
            if leased is not None:
                await self._request(leased)
                return
            async with self._engine.connect() as connection:
                stored = await token_store.read_token(connection, ref.credentials_id)
            if stored is None or stored.version != version or stored.failure is not None:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_PAUSE_S)

    async def _request(self, leased: LeasedCredentials) -> None:
        started = time.monotonic()
        try:
            wanted = TokenRequest(
                token_url=leased.token_url,
                client_id=leased.client_id,
                scope=leased.scope,
                client_secret=self._clear(leased.client_secret),
                refresh_token=self._clear(leased.refresh_token),
                user_id=leased.user_id,
            )
        except FailedPrecondition as error:
            await self._record(leased, refusal(error.message), started)
            return
        await self._record(leased, await self._client.request(wanted), started)

    def _clear(self, encrypted: bytes | None) -> str:
        return "" if encrypted is None else self._secrets.decrypt(encrypted)

    async def _record(
        self, leased: LeasedCredentials, answer: Grant | Failure, started: float
    ) -> None:
        """Store an answer, with retries: a new refresh token exists nowhere else."""
        give_up = time.monotonic() + _WRITE_LIMIT_S
        while True:
            try:
                if isinstance(answer, Grant):
                    await self._store_grant(leased, answer, started)
                else:
                    await self._store_failure(leased, answer)
            except DATABASE_ERRORS:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(_WRITE_PAUSE_S)
            else:
                return

    async def _store_grant(self, leased: LeasedCredentials, grant: Grant, started: float) -> None:
        # The lifetime began before the answer arrived, but not before the request.
        left = grant.lifetime - timedelta(seconds=time.monotonic() - started)
        replaces = grant.refresh_token
        access_token = self._secrets.encrypt(grant.access_token)
        refresh_token = None if replaces is None else self._secrets.encrypt(replaces)
        async with self._engine.begin() as connection:
            stored = await token_store.store_token(
                connection,
                leased,
                access_token,
                refresh_token,
                refresh_in=left - min(REFRESH_MARGIN, grant.lifetime / _TENTH),
                expires_in=left,
            )
        _log.info("oauth2_renewed", sender=leased.sender_id, stored=stored)

    async def _store_failure(self, leased: LeasedCredentials, failure: Failure) -> None:
        wait = REFUSAL_HOLDS
        if not failure.refused:
            pause = min(FIRST_PAUSE * 2 ** min(leased.failures, 10), LAST_PAUSE)
            wait = max(pause, failure.retry_after or timedelta(0))
        async with self._engine.begin() as connection:
            await token_store.store_failure(connection, leased, failure, wait)
        _log.warning(
            "oauth2_refused" if failure.refused else "oauth2_unavailable",
            sender=leased.sender_id,
            error=failure.message,
        )
