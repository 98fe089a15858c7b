"""`outbox api-keys`: the commands of ApiKeyService, for operators."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from outbox.v1 import api_key_service_pb2 as pb
from outbox.v1.api_key_pb2 import ApiKey, ApiKeyKind

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.key_options import (
    ExpireTime,
    KeyName,
    KeyOfOperator,
    KeyOfService,
    KeyOfUser,
    OnlyOfUser,
    ReadOnly,
    key_id_of,
    key_kind,
    show_new_key,
)
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, to_timestamp
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json,
    show,
    show_list,
    to_document,
)

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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Create, show and revoke API keys over gRPC (operators only).",
)

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="Id from `outbox api-keys list`.")]


@app.command()
@with_option_groups
def create(
    *,
    user: KeyOfUser = "",
    service: KeyOfService = False,
    operator: KeyOfOperator = False,
    name: KeyName = "",
    read_only: ReadOnly = False,
    expire_time: ExpireTime = None,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Create an API key. It is printed only once.

    $ outbox api-keys create --service --name reports --read-only \
      --expire-time 'in 720h'
    """
    kind = key_kind(user, name, service=service, operator=operator)
    key = ApiKey(
        kind=ApiKeyKind.Value(f"API_KEY_KIND_{kind.name}"),
        user_id=user,
        display_name=name,
        read_only=read_only,
        expire_time=to_timestamp(expire_time),
    )
    with connection("scheduler", server) as client:
        made = client.api_keys.CreateApiKey(change.of(pb.CreateApiKeyRequest(api_key=key)))
    if output is OutputFormat.JSON:
        print_json(to_document(made))
    else:
        show_new_key(made.api_key.api_key_id, made.secret)


@app.command()
def get(key_id: KeyId, server: Server = None, output: Output = OutputFormat.TABLE) -> None:
    """Show an API key, without its secret."""
    with connection("scheduler", server) as client:
        found = client.api_keys.GetApiKey(pb.GetApiKeyRequest(api_key_id=key_id_of(key_id)))
    show(found, output)


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: OnlyOfUser = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the API keys by id, revoked and expired ones included, without their secrets.

    $ outbox api-keys list --filter 'kind = OPERATOR AND read_only = false'
    """
    request = pb.ListApiKeysRequest(
        user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        found = pages(client.api_keys.ListApiKeys, request, "api_keys", paging)
    show_list(found, "api_keys", _COLUMNS, output, what="API keys")


@app.command()
@with_option_groups
def revoke(
    key_id: KeyId,
    *,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Revoke an API key for good. After at most 5 s, no server accepts it.

    $ outbox api-keys revoke KEY_ID
    """
    request = change.of(pb.RevokeApiKeyRequest(api_key_id=key_id_of(key_id)))
    with connection("scheduler", server) as client:
        revoked = client.api_keys.RevokeApiKey(request)
    show(revoked, output)
