"""`outbox webhooks`: the commands of WebhookService."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final, cast

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import webhook_service_pb2 as pb
from outbox.v1.email_job_pb2 import EmailJobState
from outbox.v1.webhook_pb2 import Webhook

from outbox_server.cli.change_options import ChangeOptions, GuardedChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, User, enum_reader, read_duration
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.cli.terminal import note

_COLUMNS: Final = ("webhook_id", "url", "disabled", "failing_since_time", "last_error")
_DELIVERY_COLUMNS: Final = (
    "webhook_delivery_id",
    "state",
    "event_count",
    "attempt_count",
    "next_attempt_time",
    "http_status",
    "last_error",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Manage the URLs to which changes of jobs are posted.",
)

WebhookId = Annotated[
    str, typer.Argument(metavar="WEBHOOK_ID", help="Id from `outbox webhooks list`.")
]
Url = Annotated[str, typer.Argument(metavar="URL", help="Where to post, an https URL.")]
States = Annotated[
    list[int] | None,
    typer.Option(
        "--state",
        parser=enum_reader(EmailJobState, "EMAIL_JOB_STATE_"),
        metavar="STATE",
        help="Only changes to this state. Repeatable.",
    ),
]


@app.command()
@with_option_groups
def create(
    url: Url,
    *,
    user: User = "",
    sender: Annotated[
        str, typer.Option("--sender", metavar="ID", help="Only jobs of this sender.")
    ] = "",
    state: States = None,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a webhook, and show its secret, which is not shown again.

    $ outbox webhooks create https://example.com/outbox --user acme --state FAILED
    """
    webhook = Webhook(url=url, sender_id=sender, states=_states(state))
    request = pb.CreateWebhookRequest(user_id=user, webhook=webhook)
    with connection("scheduler", server) as client:
        made = client.webhooks.CreateWebhook(change.of(request))
    show(made, output)


@app.command()
def get(
    webhook_id: WebhookId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show one webhook, without its secret."""
    with connection("scheduler", server) as client:
        found = client.webhooks.GetWebhook(
            pb.GetWebhookRequest(webhook_id=webhook_id, user_id=user)
        )
    show(found, output)


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: User = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List a user's webhooks, the oldest first."""
    request = pb.ListWebhooksRequest(
        user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        page = pages(client.webhooks.ListWebhooks, request, "webhooks", paging)
    show_list(page, "webhooks", _COLUMNS, output, what="webhooks")


@app.command()
@with_option_groups
def update(
    webhook_id: WebhookId,
    *,
    user: User = "",
    url: Annotated[str | None, typer.Option("--url", help="Where to post.")] = None,
    state: States = None,
    disabled: Annotated[
        bool | None,
        typer.Option("--disable/--enable", help="Stop posting, or continue where it stopped."),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset",
            metavar="FIELD",
            help="Reset this field: with states, changes to all states are posted. Repeatable.",
        ),
    ] = None,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change a webhook, stop it, or let it continue where it stopped.

    $ outbox webhooks update $WEBHOOK --user acme --enable

    $ outbox webhooks update $WEBHOOK --user acme --unset states
    """
    given = {"url": url, "states": state, "disabled": disabled}
    webhook = Webhook(
        webhook_id=webhook_id,
        url=url or "",
        states=_states(state),
        disabled=bool(disabled),
        etag=change.etag,
    )
    changed = [name for name, value in given.items() if value is not None]
    mask = FieldMask(paths=[*changed, *(name.replace("-", "_") for name in unset or ())])
    if not mask.paths:
        raise CommandFailed(
            "nothing to change; use --url, --state, --disable, --enable or --unset FIELD"
        )
    request = pb.UpdateWebhookRequest(user_id=user, webhook=webhook, update_mask=mask)
    with connection("scheduler", server) as client:
        made = client.webhooks.UpdateWebhook(change.of(request))
    show(made, output)


@app.command(name="rotate-secret")
@with_option_groups
def rotate_secret(
    webhook_id: WebhookId,
    *,
    user: User = "",
    keep_old: Annotated[
        timedelta | None,
        typer.Option(
            "--keep-old",
            parser=read_duration,
            metavar="DURATION",
            help="How long the old secret stays in use, such as 1h; at most 7d (default: 24h).",
        ),
    ] = None,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Give a webhook a new secret, and show it.

    Until the old one ends, each request has two signatures, one by each secret.

    $ outbox webhooks rotate-secret $WEBHOOK --user acme --keep-old 1h
    """
    request = pb.RotateWebhookSecretRequest(webhook_id=webhook_id, user_id=user)
    if keep_old is not None:
        request.old_secret_duration.FromTimedelta(keep_old)
    with connection("scheduler", server) as client:
        made = client.webhooks.RotateWebhookSecret(change.of(request))
    show(made, output)


@app.command()
@with_option_groups
def delete(
    webhook_id: WebhookId,
    *,
    user: User = "",
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete a webhook, with its failed deliveries."""
    with connection("scheduler", server) as client:
        answer = client.webhooks.DeleteWebhook(
            change.of(pb.DeleteWebhookRequest(webhook_id=webhook_id, user_id=user))
        )
    show(answer, output)
    note(f"webhook {webhook_id} is deleted")


@app.command(name="test")
@with_option_groups
def try_(
    webhook_id: WebhookId,
    *,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Post a test message to a webhook; exit code 1 if the answer is not 2xx."""
    with connection("scheduler", server) as client:
        answer = client.webhooks.TestWebhook(
            change.of(pb.TestWebhookRequest(webhook_id=webhook_id, user_id=user))
        )
    show(answer, output)
    if not answer.delivered:
        raise CommandFailed(f"the test message was not delivered: {answer.failure}")


@app.command()
@with_option_groups
def deliveries(
    webhook_id: WebhookId,
    *,
    user: User = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the failed deliveries of a webhook: those to be tried again, and those given up.

    $ outbox webhooks deliveries $WEBHOOK --filter 'state = FAILED'
    """
    request = pb.ListWebhookDeliveriesRequest(
        webhook_id=webhook_id,
        user_id=user,
        filter=filtering.filter,
        order_by=filtering.order_by,
    )
    with connection("scheduler", server) as client:
        page = pages(client.webhooks.ListWebhookDeliveries, request, "webhook_deliveries", paging)
    show_list(page, "webhook_deliveries", _DELIVERY_COLUMNS, output, what="deliveries")


@app.command()
@with_option_groups
def redeliver(
    webhook_id: WebhookId,
    *,
    delivery: Annotated[
        str,
        typer.Option(
            "--delivery", metavar="ID", help="Only this delivery (default: all that were given up)."
        ),
    ] = "",
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Try again the deliveries that were given up, or one delivery."""
    request = pb.RedeliverWebhookRequest(
        webhook_id=webhook_id, user_id=user, webhook_delivery_id=delivery
    )
    with connection("scheduler", server) as client:
        answer = client.webhooks.RedeliverWebhook(change.of(request))
    show(answer, output)


def _states(numbers: list[int] | None) -> list[EmailJobState.ValueType]:
    return cast("list[EmailJobState.ValueType]", numbers or [])
