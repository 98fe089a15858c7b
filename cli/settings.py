"""`outbox settings`: the settings that are stored once, and are the same in every process."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import duration_option
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows, utc_text
from outbox_server.cli.terminal import note
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox_server.shared.agreed.storage import SettingsChange
    from outbox_server.shared.agreed.values import AgreedSettings, AgreedValues
    from outbox_server.shared.database.audit_events import RecordedChange
    from outbox_server.shared.queue.queue import Queue

_CHANGES_SHOWN: Final = 20
_POLL_S: Final = 0.2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Show and change the settings that all processes share (OUTBOX_DATABASE_URL).",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredOptions:
    """The new values, as texts that the settings parse. None means no change."""

    shards: Annotated[
        str | None, typer.Option("--shards", metavar="N", help="Shards of the queue.")
    ] = None
    rate_window: Annotated[
        str | None,
        typer.Option(
            "--rate-window", metavar="DURATION", help="The trailing window of hourly_limit."
        ),
    ] = None
    min_gap: Annotated[
        str | None,
        typer.Option("--min-gap", metavar="DURATION", help="Minimum gap of every sender."),
    ] = None
    user_hourly_limit: Annotated[
        str | None,
        typer.Option(
            "--user-hourly-limit",
            metavar="N",
            help="Maximum sends of one user in any window, all its senders together; 0: no limit.",
        ),
    ] = None
    user_gap: Annotated[
        str | None,
        typer.Option(
            "--user-gap",
            metavar="DURATION",
            help="Minimum time between two sends of one user, all its senders together; 0: none.",
        ),
    ] = None
    uncertain_policy: Annotated[
        str | None,
        typer.Option(
            "--uncertain-policy",
            metavar="resend|hold",
            help="What happens to a mail if nobody can know whether it was accepted.",
        ),
    ] = None

    def values(self) -> dict[str, Any]:
        """Return the values that were given, by the names of their settings.

        Raises:
            typer.BadParameter: one is wrong; the text names its option.
        """
        wanted: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            text = getattr(self, name)
            if text is None:
                continue
            try:
                wanted[name] = getattr(load_settings(**{"retention": None, name: text}), name)
            except ConfigurationError as error:
                raise typer.BadParameter(
                    error.message.removeprefix(f"OUTBOX_{name.upper()}: "),
                    param_hint=f"--{name.replace('_', '-')}",
                ) from None
        return wanted


@app.command(name="show")
def show_settings(output: Output = OutputFormat.TABLE) -> None:
    """Show the stored settings.

    The first process that starts on an empty installation stores its own. A
    process whose environment contradicts them does not start.

    $ outbox settings show
    """
    agreed = _read()
    if output is OutputFormat.JSON:
        print_json({"settings": None if agreed is None else _document(agreed.values)})
    elif agreed is None:
        note("no process has started yet: the first one stores the values of its environment")
    else:
        _print_values(agreed.values)
    if agreed is not None:
        _warn(agreed.values)


@app.command(name="set")
@with_option_groups
def set_settings(
    *,
    stored: StoredOptions,
    wait: Annotated[
        timedelta,
        duration_option(
            "--wait",
            "How long to wait until the dispatchers have loaded the queue again; 0s: do not wait.",
        ),
    ] = "1m",  # type: ignore[assignment]  # typer parses defaults
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change stored settings while mail is being sent. Every process adopts them.

    From the change on, no mail is sent by the old values. The dispatchers
    finish the mails in flight and load the queue again from PostgreSQL, with
    the sends of the last window. Set the variables of the environment as well:
    a process that starts with another value is refused.

    $ outbox settings set --shards 4
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.agreed.storage import change_agreed
    from outbox_server.shared.agreed.values import AgreedValues

    wanted = stored.values()
    if not wanted:
        raise typer.BadParameter("name at least one setting to change, such as --shards 4")
    defaults = AgreedValues.from_settings(_installation())
    change: SettingsChange = in_one_transaction(
        lambda connection: change_agreed(connection, wanted, defaults, _actor())
    )
    changed = change.after.values.changed_from(change.before.values)
    before, after = (_document(one.values) for one in (change.before, change.after))
    if output is OutputFormat.JSON:
        print_json(
            {
                "changed": {
                    name: {"before": before[name], "after": after[name]} for name in changed
                },
                "settings": after,
            }
        )
    elif changed:
        rows = [[name, str(before[name]), str(after[name])] for name in changed]
        print_rows(("setting", "before", "after"), rows)
    else:
        note("nothing changed: the stored settings have these values already")
    _warn(change.after.values)
    if change.after.key_space != change.before.key_space and wait:
        asyncio.run(_until_loaded(_installation(), change.after, wait))


@app.command(name="history")
def show_history(output: Output = OutputFormat.TABLE) -> None:
    """Show the last changes of the stored settings: who, when, before and after.

    $ outbox settings history
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.agreed.storage import ACTION
    from outbox_server.shared.database.audit_events import read_changes

    changes = in_one_transaction(partial(read_changes, action=ACTION, limit=_CHANGES_SHOWN))
    if output is OutputFormat.JSON:
        print_json({"changes": [_change_document(change) for change in changes]})
    elif not changes:
        note("the stored settings were never changed")
    else:
        rows = []
        for change in changes:
            for name, value in (change.after or {}).items():
                before = str((change.before or {}).get(name, ""))
                rows.append([_time(change), change.actor, name, before, str(value)])
        print_rows(("time", "actor", "setting", "before", "after"), rows)


def _read() -> AgreedSettings | None:
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.agreed.storage import read_agreed

    async def read(connection: AsyncConnection) -> AgreedSettings | None:
        return await read_agreed(connection)

    return in_one_transaction(read)


def _installation() -> Settings:
    """Return the settings of this environment, with the stores of `outbox up` if it runs here."""
    from outbox_server.cli.addresses import read_endpoints

    settings = load_settings()
    stack = None if "database_url" in settings.model_fields_set else read_endpoints()
    if stack is None:
        return settings
    given = {name: stack[name] for name in ("database_url", "redis_url")}
    return load_settings(**given)


def _actor() -> str:
    """Return who runs this command. A container's user may have no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:200]


def _document(values: AgreedValues) -> dict[str, Any]:
    return {
        name: format_duration(value) if isinstance(value, timedelta) else value
        for name, value in values.by_name().items()
    }


def _change_document(change: RecordedChange) -> Mapping[str, Any]:
    return {
        "time": _time(change),
        "actor": change.actor,
        "before": change.before,
        "after": change.after,
    }


def _time(change: RecordedChange) -> str:
    return "" if change.happened_at is None else utc_text(change.happened_at)


def _print_values(values: AgreedValues) -> None:
    rows = [
        [name, str(value), f"OUTBOX_{name.upper()}"] for name, value in _document(values).items()
    ]
    print_rows(("setting", "value", "variable"), rows)


def _warn(values: AgreedValues) -> None:
    """Name the variables of this environment with which no process would start."""
    for difference in values.differences(load_settings()):
        note(f"warning: {difference}: a process with this environment does not start")


async def _until_loaded(settings: Settings, agreed: AgreedSettings, patience: timedelta) -> None:
    """Wait until the dispatchers have loaded every shard.

    Raises:
        CommandFailed: they have not, within `patience`.
    """
    from outbox_server.shared.queue.connection import QUEUE_ERRORS, connect, open_queues

    applied = agreed.values.apply_to(settings)
    redis = connect(applied)
    report = _reporter(applied.shards)
    try:
        queues = open_queues(redis, applied, key_space=agreed.key_space)
        async with asyncio.timeout(patience.total_seconds()):
            for loaded, queue in enumerate(queues):
                report(loaded)
                await _until_complete(queue)
            report(len(queues))
    except QUEUE_ERRORS as error:
        if isinstance(error, TimeoutError):
            raise CommandFailed(
                "the settings are changed, but after "
                f"{format_duration(patience)} the queue is not loaded: does a dispatcher run?"
            ) from None
        note(f"Redis cannot be reached from here, so the loading is not shown: {error}")
    finally:
        await redis.aclose()


async def _until_complete(queue: Queue) -> None:
    while True:
        if (await queue.count_ready_jobs()).complete:
            return
        await asyncio.sleep(_POLL_S)


def _reporter(shards: int) -> Callable[[int], None]:
    def report(loaded: int) -> None:
        if loaded:
            note(f"{loaded} of {shards} shards are loaded")

    return report
