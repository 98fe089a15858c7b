"""`outbox held`: the commands of HoldService, for operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Annotated, Final

import typer
from outbox.v1 import hold_service_pb2 as pb
from outbox.v1.hold_pb2 import HeldFilter, HeldState, Hold
from outbox_client import Client

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import OfBatch, OfSender, enum_reader, time_option, to_timestamp
from outbox_server.cli.output import Output, OutputFormat, print_rows, show, value_at
from outbox_server.cli.terminal import note

_GROUP_COLUMNS: Final = (
    "state",
    "age",
    "job_count",
    "first_schedule_time",
    "last_schedule_time",
)
_SENDER_COLUMNS: Final = (
    "sender_id",
    "user_id",
    "email",
    "job_count",
    "overdue_count",
    "sending_count",
    "first_schedule_time",
    "last_schedule_time",
)

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOptions:
    """Which held jobs are meant. All options that are given must match."""

    user: Annotated[str, typer.Option("--user", metavar="ID", help="Only jobs of this user.")] = ""
    sender: OfSender = ""
    batch: OfBatch = ""
    due_after: Annotated[
        datetime | None,
        time_option(
            "--due-after",
            "Only jobs that are due at this time or later: RFC 3339, `in 10m` or `now`.",
        ),
    ] = None
    due_before: Annotated[
        datetime | None,
        time_option("--due-before", "Only jobs that are due before this time."),
    ] = None
    state: Annotated[
        int | None,
        typer.Option(
            "--state",
            parser=enum_reader(HeldState, "HELD_STATE_"),
            metavar="STATE",
            help="Only jobs that were in this state when the hold began: waiting or sending.",
        ),
    ] = None


def _filter(options: HeldOptions) -> HeldFilter:
    return HeldFilter(
        user_id=options.user,
        sender_id=options.sender,
        batch_id=options.batch,
        due_start_time=to_timestamp(options.due_after),
        due_end_time=to_timestamp(options.due_before),
        state=HeldState.ValueType(options.state or 0),
    )


def _named(options: HeldOptions, everything: bool) -> HeldFilter:
    """Return the filter of a command that must say which jobs it means."""
    found = _filter(options)
    if found == HeldFilter() and not everything:
        raise typer.BadParameter(
            "say which jobs: --user, --sender, --batch, --due-after, --due-before or --state, "
            "or --all for everything"
        )
    return found


@app.callback()
@with_option_groups
def held(
    ctx: typer.Context,
    *,
    options: HeldOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show, release and cancel what is held after a restore (operators only).

    After a restore of PostgreSQL, dispatchers send nothing by themselves until
    an operator has released it. Without a subcommand, this shows what is held,
    by state and age, and the senders with the most.

    $ outbox held

    $ outbox held --user acme --due-before now
    """
    if ctx.invoked_subcommand is not None:
        if _filter(options) != HeldFilter():
            raise typer.BadParameter(f"write the options after `{ctx.invoked_subcommand}`")
        return
    with connection("scheduler", server) as client:
        found = client.holds.GetHold(pb.GetHoldRequest(filter=_filter(options)))
    _show(found, output)


def _show(hold: Hold, output: OutputFormat) -> None:
    if output is OutputFormat.TABLE and not hold.held:
        note("the installation is not held")
        return
    show(hold, output, without=("groups", "senders"))
    if output is OutputFormat.TABLE:
        for columns, items in ((_GROUP_COLUMNS, hold.groups), (_SENDER_COLUMNS, hold.senders)):
            if items:
                print_rows(columns, ([value_at(item, path) for path in columns] for item in items))
        if hold.sender_count > len(hold.senders):
            note(f"{hold.sender_count - len(hold.senders):,} more senders: use filters")


Everything = Annotated[bool, typer.Option("--all", help="Everything that is held.")]


@app.command()
@with_option_groups
def release(
    *,
    options: HeldOptions,
    everything: Everything = False,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Release held jobs, so that they are sent; with --all, end the hold.

    The filter stays in force until the hold ends, even for mail that is
    accepted later. When nothing is held any more, the hold ends.

    $ outbox held release --sender $SENDER

    $ outbox held release --all
    """
    request = pb.ReleaseHeldJobsRequest(filter=_named(options, everything), all=everything)
    with connection("scheduler", server) as client:
        answer = client.holds.ReleaseHeldJobs(change.of(request))
    show(answer, output)


@app.command()
@with_option_groups
def cancel(
    *,
    options: HeldOptions,
    everything: Everything = False,
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Cancel held jobs: they are never sent.

    If it is interrupted, what is not cancelled yet stays held: run it again.

    $ outbox held cancel --user acme --due-before 2026-11-29T12:00:00Z
    """
    request = pb.CancelHeldJobsRequest(filter=_named(options, everything), all=everything)
    total = pb.CancelHeldJobsResponse()
    with connection("scheduler", server) as client:
        for answer in _until_done(client, request, change):
            answer.cancelled_count += total.cancelled_count
            total = answer
            if answer.more:
                note(f"{answer.cancelled_count:,} cancelled, more follow ...")
    show(total, output)
    if total.sending_count:
        note(
            f"{total.sending_count:,} jobs are still SENDING: run the command again when their "
            "leases have expired (OUTBOX_LEASE)"
        )


def _until_done(
    client: Client, request: pb.CancelHeldJobsRequest, change: ChangeOptions
) -> Iterator[pb.CancelHeldJobsResponse]:
    for part in count():
        answer = client.holds.CancelHeldJobs(change.of(request, part))
        yield answer
        if not answer.more:
            return


@app.command()
@with_option_groups
def begin(
    *, change: ChangeOptions, server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Hold the installation: from now on, only what is released is sent."""
    with connection("scheduler", server) as client:
        found = client.holds.BeginHold(change.of(pb.BeginHoldRequest()))
    _show(found, output)
