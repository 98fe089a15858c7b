"""`outbox keys ... --server`: API keys by the calls of ApiKeyService."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from outbox.v1 import api_key_service_pb2 as pb
from outbox.v1.api_key_pb2 import ApiKey, ApiKeyKind

from outbox_server.cli.client import connection
from outbox_server.cli.options import to_timestamp
from outbox_server.cli.output import OutputFormat, print_json, show, show_list, to_document
from outbox_server.cli.terminal import note, say

_COLUMNS: Final = (
    "api_key_id",
    "kind",
    "user_id",
    "display_name",
    "create_time",
    "last_use_time",
    "revoke_time",
    "expire_time",
    "read_only",
)


def create(
    server: str,
    kind: str,
    user: str,
    name: str,
    *,
    read_only: bool,
    expire_time: datetime | None,
    output: OutputFormat,
) -> None:
    """Create a key, and print its secret."""
    key = ApiKey(
        kind=ApiKeyKind.Value(f"API_KEY_KIND_{kind}"),
        user_id=user,
        display_name=name,
        read_only=read_only,
        expire_time=to_timestamp(expire_time),
    )
    with connection("scheduler", server) as client:
        made = client.api_keys.CreateApiKey(pb.CreateApiKeyRequest(api_key=key))
    if output is OutputFormat.JSON:
        print_json(to_document(made))
    else:
        key_id = made.api_key.api_key_id
        note(f"key {key_id}; it is shown only now, because only its hash is stored")
        say(made.secret)


def show_all(server: str, user: str, output: OutputFormat) -> None:
    """List all keys, or those of one user."""
    with connection("scheduler", server) as client:
        found = pb.ListApiKeysResponse(
            api_keys=client.list_api_keys(pb.ListApiKeysRequest(user_id=user))
        )
    show_list(found, "api_keys", _COLUMNS, output, what="API keys")


def revoke(server: str, key_id: str, output: OutputFormat) -> None:
    """Revoke a key."""
    with connection("scheduler", server) as client:
        revoked = client.api_keys.RevokeApiKey(pb.RevokeApiKeyRequest(api_key_id=key_id))
    show(revoked, output)
