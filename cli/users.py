"""`outbox users`: the commands of UserService, for operators."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Final

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import user_service_pb2 as pb
from outbox.v1.user_pb2 import User, UserQuotas

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, one_user, read_duration
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.shared.bounds import MAX_HOURLY_LIMIT

_COLUMNS = ("user_id", "quotas", "limits", "sender_domains", "update_time")
_DEFAULT: Final = "default"
# Stands for `default`, which removes the override of a quota.
_UNSET: Final = -1
_UNSET_GAP: Final = timedelta(-1)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Show and change the quotas, limits and sender domains of users (operators only).",
)

UserId = Annotated[
    str, typer.Argument(metavar="USER", show_default=False, help="The user; or use --user.")
]
UserOption = Annotated[
    str, typer.Option("--user", metavar="USER", help="The same as the argument.")
]


def _read_quota(text: str) -> int:
    if text.strip().lower() == _DEFAULT:
        return _UNSET
    if not (text.isascii() and text.isdecimal()) or len(text) > len("1000000000"):
        raise typer.BadParameter(f"must be 0 to 1000000000, or {_DEFAULT} (got {text[:40]!r})")
    return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaOptions:
    """The options of the quotas: a number, `default`, or nothing for no change."""

    waiting_jobs: Annotated[
        int | None,
        typer.Option(
            "--waiting-jobs", parser=_read_quota, metavar="N|default", help="Maximum waiting jobs."
        ),
    ] = None
    senders: Annotated[
        int | None,
        typer.Option("--senders", parser=_read_quota, metavar="N|default", help="Maximum senders."),
    ] = None
    calls: Annotated[
        int | None,
        typer.Option(
            "--calls", parser=_read_quota, metavar="N|default", help="Maximum calls in flight."
        ),
    ] = None
    uploads: Annotated[
        int | None,
        typer.Option(
            "--uploads", parser=_read_quota, metavar="N|default", help="Maximum uploads in flight."
        ),
    ] = None
    watches: Annotated[
        int | None,
        typer.Option(
            "--watches", parser=_read_quota, metavar="N|default", help="Maximum open watches."
        ),
    ] = None
    stored_rejections: Annotated[
        int | None,
        typer.Option(
            "--stored-rejections",
            parser=_read_quota,
            metavar="N|default",
            help="Maximum stored rejections.",
        ),
    ] = None
    unproven_endpoints: Annotated[
        int | None,
        typer.Option(
            "--unproven-endpoints",
            parser=_read_quota,
            metavar="N|default",
            help="Maximum sends in flight to mail servers that have not replied yet.",
        ),
    ] = None
    stored_events: Annotated[
        int | None,
        typer.Option(
            "--stored-events",
            parser=_read_quota,
            metavar="N|default",
            help="Maximum stored events of jobs; the oldest ones are removed.",
        ),
    ] = None
    suppressions: Annotated[
        int | None,
        typer.Option(
            "--suppressions", parser=_read_quota, metavar="N|default", help="Maximum suppressions."
        ),
    ] = None
    webhooks: Annotated[
        int | None,
        typer.Option(
            "--webhooks", parser=_read_quota, metavar="N|default", help="Maximum webhooks."
        ),
    ] = None


def _read_limit(text: str) -> int:
    if text.strip().lower() == _DEFAULT:
        return _UNSET
    if not (text.isascii() and text.isdecimal()) or int(text[:10]) > MAX_HOURLY_LIMIT:
        raise typer.BadParameter(
            f"must be 0 to {MAX_HOURLY_LIMIT}, or {_DEFAULT} (got {text[:40]!r})"
        )
    return int(text[:10])


def _read_gap(text: str) -> timedelta:
    if text.strip().lower() == _DEFAULT:
        return _UNSET_GAP
    return read_duration(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLimitOptions:
    """The options of the limits that all senders of a user share."""

    hourly_limit: Annotated[
        int | None,
        typer.Option(
            "--hourly-limit",
            parser=_read_limit,
            metavar="N|default",
            help="Maximum sends per hour, all senders together; 0: no limit.",
        ),
    ] = None
    min_gap: Annotated[
        timedelta | None,
        typer.Option(
            "--min-gap",
            parser=_read_gap,
            metavar="DURATION|default",
            help="Minimum time between two sends of all senders together, such as 500ms; 0s: none.",
        ),
    ] = None


@app.command(name="list")
@with_option_groups
def list_(
    *,
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List all users: those with a sender, a suppression, an API key or settings of their own."""
    request = pb.ListUsersRequest(filter=filtering.filter, order_by=filtering.order_by)
    with connection("scheduler", server) as client:
        page = pages(client.users.ListUsers, request, "users", paging)
    show_list(page, "users", _COLUMNS, output, what="users")


@app.command(name="show")
def show_user(
    user_id: UserId = "",
    user: UserOption = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the quotas of a user, how much of each it uses, and its domains.

    $ outbox users show acme
    """
    with connection("scheduler", server) as client:
        found = client.users.GetUser(pb.GetUserRequest(user_id=one_user(user_id, user)))
    show(found, output)


@app.command(name="set")
@with_option_groups
def set_(
    user_id: UserId = "",
    *,
    user: UserOption = "",
    quotas: QuotaOptions,
    limits: UserLimitOptions,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            metavar="DOMAIN",
            help="Domain that the user may send from, or *.DOMAIN for those below it. "
            "Repeatable. Replaces all domains.",
        ),
    ] = None,
    no_domains: Annotated[
        bool, typer.Option("--no-domains", help="Remove all domains of the user.")
    ] = False,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change the quotas, limits or domains of a user. What exists already stays.

    $ outbox users set acme --waiting-jobs 500000 --domain example.com
    """
    if domain and no_domains:
        raise typer.BadParameter("cannot be combined with --domain", param_hint="--no-domains")
    changed = User(user_id=one_user(user_id, user), sender_domains=domain or ())
    paths = ["sender_domains"] if domain or no_domains else []
    for field in UserQuotas.DESCRIPTOR.fields:
        value = getattr(quotas, field.name)
        if value is not None:
            paths.append(f"quotas.{field.name}")
        if value is not None and value != _UNSET:
            setattr(changed.quotas, field.name, value)
    if limits.hourly_limit is not None:
        paths.append("limits.hourly_limit")
        if limits.hourly_limit != _UNSET:
            changed.limits.hourly_limit = limits.hourly_limit
    if limits.min_gap is not None:
        paths.append("limits.min_gap")
        if limits.min_gap != _UNSET_GAP:
            changed.limits.min_gap.FromTimedelta(limits.min_gap)
    if not paths:
        raise typer.BadParameter("name at least one quota, limit or domain to change")
    request = pb.UpdateUserRequest(user=changed, update_mask=FieldMask(paths=paths))
    with connection("scheduler", server) as client:
        updated = client.users.UpdateUser(change.of(request))
    show(updated, output)
