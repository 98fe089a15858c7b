"""Implements ApiKeyService, for operators."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import api_key_pb2, api_key_service_pb2, api_key_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made
from outbox_server.services.scheduler.servicers.calls import Context, acting_user
from outbox_server.services.scheduler.storage.api_keys import list_api_keys
from outbox_server.shared import bounds
from outbox_server.shared.auth import store
from outbox_server.shared.auth.keys import ApiKey, ApiKeyKind, make_key
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.errors import InvalidInput, NotFound, Violations
from outbox_server.shared.filters.resources import KEY_FIELDS, KEY_ORDERS, checked_list
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import from_timestamp, to_timestamp

_KINDS: Final = {
    kind: api_key_pb2.ApiKeyKind.Value(f"API_KEY_KIND_{kind.name}") for kind in ApiKeyKind
}


class ApiKeyServicer(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """Creates, shows and revokes API keys."""

    def __init__(self, engine: AsyncEngine, changes: Changes) -> None:
        self._engine = engine
        self._changes = changes

    async def CreateApiKey(
        self,
        request: api_key_service_pb2.CreateApiKeyRequest,
        context: Context,
    ) -> api_key_service_pb2.CreateApiKeyResponse:
        """Create a key, and return its secret."""
        asked = request.api_key
        wrong = Violations()
        kind = wrong.value(lambda: _kind_of(asked), None)
        user_id = wrong.value(lambda: _user_of(asked, kind), None)
        name = wrong.value(
            lambda: bounds.DISPLAY_NAME.check("api_key.display_name", asked.display_name), ""
        )
        expires_at = wrong.value(lambda: _expiry_of(asked), None)
        wrong.raise_any()
        new = make_key()
        created = False

        async def create(
            connection: AsyncConnection,
        ) -> Made[api_key_service_pb2.CreateApiKeyResponse]:
            nonlocal created
            bind_call(user_id)
            stored = await store.insert_key(
                connection,
                new,
                kind or ApiKeyKind.USER,
                user_id,
                name,
                read_only=asked.read_only,
                expires_at=expires_at,
            )
            created = True
            # The answer is kept for a repeated call, so it has no secret.
            answer = api_key_service_pb2.CreateApiKeyResponse(api_key=_to_key(stored))
            return Made(answer, _target(stored), user_id, after=_audited(stored))

        answer = await self._changes.make(
            request, user_id, api_key_service_pb2.CreateApiKeyResponse, create
        )
        if created and answer.api_key.api_key_id == new.key_id:
            answer.secret = new.text
        return answer

    async def GetApiKey(
        self,
        request: api_key_service_pb2.GetApiKeyRequest,
        context: Context,
    ) -> api_key_pb2.ApiKey:
        """Return one key."""
        bind_call(None)
        async with self._engine.connect() as connection:
            found = await store.read_key(connection, request.api_key_id)
        if found is None:
            raise _not_found(request.api_key_id)
        return _to_key(found)

    async def ListApiKeys(
        self,
        request: api_key_service_pb2.ListApiKeysRequest,
        context: Context,
    ) -> api_key_service_pb2.ListApiKeysResponse:
        """Return one page of the keys."""
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        tree, descending = checked_list(request, KEY_FIELDS, KEY_ORDERS, wrong)
        wrong.raise_any()
        bind_call(user_id)
        page = requested_page(request, "api_keys", user_id, start=("",))
        async with self._engine.connect() as connection:
            found, reached = await list_api_keys(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda key: (key.key_id,), None if reached is None else (reached,)
        )
        return api_key_service_pb2.ListApiKeysResponse(
            api_keys=[_to_key(key) for key in shown], next_page_token=token
        )

    async def RevokeApiKey(
        self,
        request: api_key_service_pb2.RevokeApiKeyRequest,
        context: Context,
    ) -> api_key_pb2.ApiKey:
        """Revoke a key."""

        async def revoke(connection: AsyncConnection) -> Made[api_key_pb2.ApiKey]:
            bind_call(None)
            before = await store.read_key(connection, request.api_key_id)
            if before is None:
                raise _not_found(request.api_key_id)
            revoked = await store.revoke_key(connection, request.api_key_id) or before
            return Made(
                _to_key(revoked),
                _target(revoked),
                revoked.user_id,
                before=_audited(before),
                after=_audited(revoked),
                changed=before.revoked_at is None,
            )

        return await self._changes.make(request, None, api_key_pb2.ApiKey, revoke)


def _kind_of(asked: api_key_pb2.ApiKey) -> ApiKeyKind:
    """Return the kind of a new key.

    Raises:
        InvalidInput: API_KEY_KIND_INVALID.
    """
    kind = next((kind for kind, number in _KINDS.items() if number == asked.kind), None)
    if kind is None:
        raise InvalidInput.field(
            "api_key.kind",
            "must be API_KEY_KIND_USER, API_KEY_KIND_SERVICE or API_KEY_KIND_OPERATOR",
            reason="API_KEY_KIND_INVALID",
        )
    return kind


def _user_of(asked: api_key_pb2.ApiKey, kind: ApiKeyKind | None) -> str | None:
    """Return the user that a new key acts for. A `kind` of None means that the kind is wrong.

    Raises:
        InvalidInput: API_KEY_KIND_INVALID, USER_ID_REQUIRED, USER_ID_INVALID.
    """
    if kind is None:
        return acting_user(asked.user_id, "api_key.user_id")
    if kind is not ApiKeyKind.USER:
        if asked.user_id:
            raise InvalidInput.field(
                "api_key.user_id",
                "must be unset: only a key of kind API_KEY_KIND_USER acts for one user",
                reason="API_KEY_KIND_INVALID",
            )
        return None
    if not asked.user_id:
        raise InvalidInput.field(
            "api_key.user_id",
            "is required for a key of kind API_KEY_KIND_USER",
            reason="USER_ID_REQUIRED",
        )
    return acting_user(asked.user_id, "api_key.user_id")


def _expiry_of(asked: api_key_pb2.ApiKey) -> datetime | None:
    """Return when a new key expires; None means never.

    Raises:
        InvalidInput: EXPIRE_TIME_INVALID.
    """
    if not asked.HasField("expire_time"):
        return None
    at = from_timestamp(asked.expire_time, "api_key.expire_time")
    if at <= datetime.now(UTC):
        raise InvalidInput.field(
            "api_key.expire_time",
            f"must be in the future (got {at.isoformat(timespec='seconds')})",
            reason="EXPIRE_TIME_INVALID",
        )
    return at


def _to_key(key: ApiKey) -> api_key_pb2.ApiKey:
    return api_key_pb2.ApiKey(
        api_key_id=key.key_id,
        kind=_KINDS[key.kind],
        user_id=key.user_id or "",
        display_name=key.name,
        read_only=key.read_only,
        expire_time=_stamp(key.expires_at),
        create_time=_stamp(key.created_at),
        last_use_time=_stamp(key.last_used_at),
        revoke_time=_stamp(key.revoked_at),
    )


def _stamp(time: datetime | None) -> Timestamp | None:
    return None if time is None else to_timestamp(time)


def _audited(key: ApiKey) -> dict[str, str | bool]:
    """Return the values of a key for the audit log."""
    values: dict[str, str | bool] = {
        "kind": key.kind.name,
        "display_name": key.name,
        "read_only": key.read_only,
        "expire_time": "" if key.expires_at is None else key.expires_at.isoformat(),
        "revoke_time": "" if key.revoked_at is None else key.revoked_at.isoformat(),
    }
    return {name: value for name, value in values.items() if value}


def _target(key: ApiKey) -> str:
    return f"api-keys/{key.key_id}"


def _not_found(key_id: str) -> NotFound:
    return NotFound(
        "there is no API key with this id",
        reason="API_KEY_NOT_FOUND",
        metadata={"api_key_id": key_id},
    )
