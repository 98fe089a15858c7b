"""`outbox purge`: removes rows that are older than the retention, once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import read_duration
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows
from outbox_server.cli.terminal import note
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import check_retention, load_settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox_server.shared.retention.purging import PurgedRows
    from outbox_server.shared.retention.storage import OldRows

_TABLES: Final = ("jobs", "attempts", "batches", "rejections")
_BUSY_PAUSE_S: Final = 1.0
_BUSY_TRIES: Final = 60

app = typer.Typer(add_completion=False)


@app.command()
def purge(
    *,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="DURATION",
            help="Age from which rows are removed, such as 90d (default: OUTBOX_RETENTION).",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what would be removed.")
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Remove finished jobs, their attempts and their batches that are older than the retention.

    Waiting jobs and jobs in doubt (UNCERTAIN) are never removed. A batch is
    removed when none of its jobs is left; its request_id may then be used
    again. Counts and suppressions stay.

    The stats service does the same every ten minutes if OUTBOX_RETENTION is
    set. This command connects to OUTBOX_DATABASE_URL, and removes in small
    transactions. If it is interrupted, run it again.

    $ outbox purge --older-than 90d --dry-run
    """
    given: dict[str, Any] = {"retention": read_duration(older_than)} if older_than else {}
    try:
        age = load_settings(**given).retention
    except ConfigurationError as error:
        if not older_than:
            raise
        raise typer.BadParameter(
            error.message.removeprefix("OUTBOX_RETENTION: "), param_hint="--older-than"
        ) from None
    if age is None:
        raise typer.BadParameter(
            "set an age, such as 90d, because OUTBOX_RETENTION is not set",
            param_hint="--older-than",
        )
    _keep_what_limits_need(age)
    months = _count(age)
    found = {name: sum(getattr(row, name) for row in months) for name in _TABLES}
    document = {
        "older_than": format_duration(age),
        "dry_run": dry_run,
        **(found if dry_run else _remove(age, found)),
        "months": [
            {"month": f"{row.month:%Y-%m}", **{name: getattr(row, name) for name in _TABLES}}
            for row in months
        ],
    }
    if output is OutputFormat.JSON:
        print_json(document)
        return
    _print(document, months, dry_run=dry_run)


def _keep_what_limits_need(age: timedelta) -> None:
    """Refuse an age that removes sends which the stored window still has to count."""
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.agreed.storage import read_agreed

    agreed = in_one_transaction(read_agreed)
    if agreed is not None:
        try:
            check_retention(age, agreed.values.rate_window, timedelta(0))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--older-than") from None


def _print(document: dict[str, Any], months: Sequence[OldRows], *, dry_run: bool) -> None:
    if not months:
        note(f"nothing is older than {document['older_than']}")
        return
    rows = [
        [f"{row.month:%Y-%m}", *(f"{getattr(row, name):,}" for name in _TABLES)] for row in months
    ]
    done = "would be removed" if dry_run else "removed"
    rows.append([done, *(f"{document[name]:,}" for name in _TABLES)])
    print_rows(("month", *_TABLES), rows)


def _count(age: timedelta) -> Sequence[OldRows]:
    from outbox_server.shared.retention.storage import count_old

    async def count(engine: AsyncEngine) -> Sequence[OldRows]:
        async with engine.connect() as connection:
            return await count_old(connection, age)

    found: Sequence[OldRows] = _with_engine(count, patient=True)
    return found


def _remove(age: timedelta, found: dict[str, int]) -> dict[str, int]:
    from outbox_server.cli.progress import JobProgress
    from outbox_server.shared.retention.purging import Purger, RemovalBusy

    with JobProgress({name: found[name] for name in ("jobs", "batches")}) as progress:

        def report(rows: PurgedRows) -> None:
            progress.update("jobs", rows.jobs)
            progress.update("batches", rows.batches)

        async def remove(engine: AsyncEngine) -> PurgedRows:
            for _ in range(_BUSY_TRIES):
                try:
                    return await Purger(engine, age, report=report).purge_once()
                except RemovalBusy:
                    # A stats service is removing: it holds its lock for one transaction at a time.
                    await asyncio.sleep(_BUSY_PAUSE_S)
            raise CommandFailed("another process is removing rows; try again later")

        removed = _with_engine(remove, lookups_only=True)
    return {name: getattr(removed, name) for name in _TABLES}


def _with_engine(work: Callable[[AsyncEngine], Awaitable[Any]], **options: bool) -> Any:
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from outbox_server.cli.database import with_engine

    return with_engine(work, **options)
