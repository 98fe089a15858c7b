"""Makes the changes that calls ask for: once per `request_id`, and with an event in the audit log.

Both are written in the transaction of the change. So a call that was repeated because its answer
got lost finds the answer of the first one, and no change is without its event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.shared.database import change_requests as storage
from outbox_server.shared.database.audit_events import RecordedChange, record_changes
from outbox_server.shared.database.change_requests import RequestKey, StoredRequest
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.errors import Aborted, OutboxError
from outbox_server.shared.intake.addresses import folded_key
from outbox_server.shared.rpc.requested_changes import request_digest, requested_change, reused
from outbox_server.shared.secrets import SecretBox

M = TypeVar("M", bound=Message)

_PURPOSE: Final = b"outbox change requests"
# The first and the longest pause before the answer of another call is read again, in seconds. The
# pauses get longer, so that many calls with one id cost little.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0
# How long the request of a call that failed may take to be forgotten, in seconds.
_FORGET_S: Final = 2.0


class ChangeMessage(Protocol):
    """The fields that the requests of all changing methods have."""

    @property
    def request_id(self) -> str:
        """The id by which a repeated call is recognised; empty means none."""

    @property
    def identity(self) -> str:
        """Who asks for the change, in the caller's words."""

    @property
    def reason(self) -> str:
        """Why, in the caller's words."""


async def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Made(Generic[M]):
    """A change that was made: the answer for the caller, and the values for the audit log.

    `user_id` owns `target`. `before` and `after` are the values that changed. `address` is the
    recipient that the change is about. `changed` is False if the call changed nothing, or if
    `Changes.record_part` has recorded the change: then no further event is written. Repeated calls
    get `stored` in place of `answer`; it lacks texts that can be read again. `afterwards` is called
    after the commit; if the process dies before that, a marker remains, so that a dispatcher loads
    the head.
    """

    answer: M
    target: str = ""
    user_id: str | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    address: str = ""
    changed: bool = True
    stored: M | None = None
    afterwards: Callable[[], Awaitable[object]] = _nothing

    @property
    def address_key(self) -> str | None:
        """Return the key by which an erasure finds the stored parts of the change."""
        return folded_key(self.address) if self.address else None


@dataclass(frozen=True, slots=True)
class AskedChange:
    """A change before it is made: the id and the digest of its request, and who asks for it."""

    key: RequestKey
    digest: bytes
    change: RecordedChange


class Changes:
    """Makes changes for the servicers."""

    def __init__(self, engine: AsyncEngine, secrets: SecretBox) -> None:
        self._engine = engine
        # Keyed, because a request may contain a password.
        self._key = secrets.derive_key(_PURPOSE)

    async def make(
        self,
        request: Message,
        user_id: str | None,
        answer: type[M],
        change: Callable[[AsyncConnection], Awaitable[Made[M]]],
        complete: Callable[[AsyncConnection, M], Awaitable[M]] | None = None,
        *,
        validate_only: bool = False,
    ) -> M:
        """Run `change` in a transaction, unless this request was made before.

        `user_id` is the user that the call acts for; None means any user. `complete` makes the
        answer of a repeated call from what was stored, and may change it; None means that the whole
        answer was stored. With `validate_only`, the transaction is rolled back, and the request is
        not stored.

        Raises:
            AlreadyExists: the id belongs to another request (REQUEST_ID_REUSED).
            InvalidInput: REQUEST_ID_INVALID, IDENTITY_INVALID, CHANGE_REASON_INVALID.
        """
        asked = self.ask(request, user_id, validate_only=validate_only)
        key = asked.key

        async def once(connection: AsyncConnection) -> M | Made[M]:
            if key.request_id:
                earlier = (
                    await storage.find_request(connection, key)
                    if validate_only
                    else await storage.begin_request(connection, key, asked.digest)
                )
                if earlier is not None:
                    kept = replayed(earlier, asked, answer)
                    return kept if complete is None else await complete(connection, kept)
            made = await change(connection)
            if validate_only:
                await connection.rollback()
                return made.answer
            if key.request_id:
                await _store(connection, key, made)
            await _record(connection, asked.change, made)
            return made

        result = await in_transaction(self._engine, once)
        if not isinstance(result, Made):
            return result
        await result.afterwards()
        return result.answer

    async def make_in_parts(
        self,
        request: Message,
        user_id: str | None,
        answer: type[M],
        change: Callable[[], Awaitable[Made[M]]],
        *,
        repeatable: bool = True,
    ) -> M:
        """Run `change`, which has transactions of its own.

        It records its parts by `record_part`, or is recorded when it has ended. The request is
        stored before the change, so that calls at the same time wait for the first one. If the
        process dies within it, a repeated call makes the rest. With `repeatable` False, that would
        do harm: a repeated call is refused then.

        Raises:
            AlreadyExists, InvalidInput: as `make`.
            Aborted: the first call was interrupted, or takes long (CHANGE_INTERRUPTED).
        """
        asked = self.ask(request, user_id)
        key = asked.key
        if key.request_id:
            earlier = await self._earlier(asked)
            if earlier is not None and not (repeatable and earlier.answer is None):
                return replayed(earlier, asked, answer)
        try:
            made = await change()
        except (OutboxError, asyncio.CancelledError, *DATABASE_ERRORS):
            if key.request_id and repeatable:
                # It may be made again at once, even with other content.
                await asyncio.shield(self._forget(asked))
            raise

        async def store(connection: AsyncConnection) -> M:
            # This change is recorded even if another call with the same id was faster.
            await _record(connection, asked.change, made)
            if key.request_id:
                if repeatable:
                    return await _begin_and_store(connection, asked, made, answer)
                await _store(connection, key, made)
            return made.answer

        stored = await in_transaction(self._engine, store)
        await made.afterwards()
        return stored

    async def _earlier(self, asked: AskedChange) -> StoredRequest | None:
        """Store the request, and return None; or return an earlier one with this id.

        If the earlier one is in progress, wait for its answer. It has none if it was interrupted.

        Raises:
            AlreadyExists: it is another request (REQUEST_ID_REUSED).
        """
        pause = _FIRST_PAUSE_S
        while True:
            earlier = await in_transaction(
                self._engine, partial(storage.begin_request, key=asked.key, digest=asked.digest)
            )
            if earlier is not None and earlier.digest != asked.digest:
                raise reused(asked.key.request_id)
            if earlier is None or earlier.answer is not None or not earlier.recent:
                return earlier
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _forget(self, asked: AskedChange) -> None:
        forget = partial(storage.forget_unanswered, key=asked.key, digest=asked.digest)
        with suppress(*DATABASE_ERRORS):
            async with asyncio.timeout(_FORGET_S):
                await in_transaction(self._engine, forget)

    async def remember(self, asked: AskedChange, made: Made[M], answer: type[M]) -> M:
        """Store the request of a change that was made and recorded. Return its answer.

        Raises:
            AlreadyExists, Aborted: as `replayed`, if another call with the same id was faster.
        """
        return await in_transaction(
            self._engine, lambda connection: _begin_and_store(connection, asked, made, answer)
        )

    async def record_part(
        self, connection: AsyncConnection, request: Message, made: Made[Any]
    ) -> None:
        """Write the event of a part of a change, in the part's own transaction.

        So a call that is interrupted between two parts leaves no part without an event.
        """
        await _record(connection, requested_change(request), made)

    def ask(
        self, request: Message, user_id: str | None, *, validate_only: bool = False
    ) -> AskedChange:
        """Return what is known of a change before it is made. `user_id` is as in `make`.

        Raises:
            InvalidInput: as `make`.
        """
        change = requested_change(request)
        key = RequestKey(user_id, getattr(request, "request_id", ""))
        if validate_only:
            # The digest is that of the call that would make the change.
            copy = type(request)()
            copy.CopyFrom(request)
            copy.ClearField("validate_only")
            request = copy
        return AskedChange(key, request_digest(request, self._key), change)


def check_etag(given: str, present: str, target: str) -> None:
    """Check the `etag` that a caller passes back. An empty one is not checked.

    Raises:
        Aborted: the resource was changed since the caller read it (ETAG_MISMATCH).
    """
    if given and given != present:
        raise Aborted(
            f"{target} was changed since it was read; read it again, and repeat the change",
            reason="ETAG_MISMATCH",
            metadata={"etag": present},
        )


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], always: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that differ, before and after. Those named by `always` are kept too."""
    names = [
        name
        for name in {**before, **after}
        if name in always or before.get(name) != after.get(name)
    ]
    return (
        {name: before[name] for name in names if name in before},
        {name: after[name] for name in names if name in after},
    )


async def record_all(
    connection: AsyncConnection, changes: Sequence[tuple[AskedChange, Made[Any]]]
) -> None:
    """Write the events of several calls whose changes this transaction makes."""
    events = [
        (_event(asked.change, made), made.address_key) for asked, made in changes if made.changed
    ]
    if events:
        await record_changes(connection, events)


def replayed(earlier: StoredRequest, asked: AskedChange, answer: type[M]) -> M:
    """Return the answer of an earlier request with the same id.

    Raises:
        AlreadyExists: REQUEST_ID_REUSED.
        Aborted: CHANGE_INTERRUPTED.
    """
    key = asked.key
    if earlier.digest != asked.digest:
        raise reused(key.request_id)
    if earlier.answer is None:
        raise Aborted(
            f"an earlier call with the request_id {key.request_id!r} is in progress, or was "
            "interrupted and may have changed a part; see what it has changed, and use a new id",
            reason="CHANGE_INTERRUPTED",
            metadata={"request_id": key.request_id},
        )
    return answer.FromString(earlier.answer)


async def _begin_and_store(
    connection: AsyncConnection, asked: AskedChange, made: Made[M], answer: type[M]
) -> M:
    earlier = await storage.begin_request(connection, asked.key, asked.digest, lock=True)
    if earlier is not None and (earlier.answer is not None or earlier.digest != asked.digest):
        return replayed(earlier, asked, answer)
    await _store(connection, asked.key, made)
    return made.answer


async def _store(connection: AsyncConnection, key: RequestKey, made: Made[Any]) -> None:
    answer = (made.answer if made.stored is None else made.stored).SerializeToString()
    await storage.store_answer(connection, key, answer, made.user_id, made.address_key)


async def _record(connection: AsyncConnection, change: RecordedChange, made: Made[Any]) -> None:
    if made.changed:
        await record_changes(connection, [(_event(change, made), made.address_key)])


def _event(change: RecordedChange, made: Made[Any]) -> RecordedChange:
    return replace(
        change, target=made.target, before=made.before, after=made.after, user_id=made.user_id
    )
