"""`outbox drill`: kills parts of a private stack under load at random, then audits it."""

from __future__ import annotations

import math
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from outbox_server.cli.foreground import run
from outbox_server.cli.lazy import EXIT_FAILED, CommandFailed
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows
from outbox_server.cli.terminal import note, say
from outbox_server.deploy.drill.clocks import HOW_TO_GET, faketime_library
from outbox_server.deploy.drill.drill import DrillFolder
from outbox_server.deploy.drill.drill import drill as play
from outbox_server.deploy.drill.plan import (
    CLOCK_KINDS,
    KINDS,
    OUTAGE_DRILL_S,
    OUTAGES,
    ROLLOUTS,
    SINGLE_REDIS,
    STORES,
)
from outbox_server.deploy.drill.report import DrillReport
from outbox_server.deploy.drill.stack import DrillStack, Size, drill_settings
from outbox_server.deploy.embedded.pgbouncer import BINARY
from outbox_server.deploy.embedded.pgbouncer import HOW_TO_GET as PGBOUNCER_MISSING

_SEEDS: Final = 10_000


class UncertainPolicy(StrEnum):
    """What to do with a mail that may have been sent."""

    RESEND = "resend"
    HOLD = "hold"


class DrillStores(StrEnum):
    """The kind of stores that a drill uses."""

    SINGLE = "single"
    CLUSTER = "cluster"


app = typer.Typer(add_completion=False)


def _read_faults(text: str) -> str:
    """Return the fault names, checked before anything starts."""
    unknown = [name for name in _split(text) if name not in KINDS]
    if unknown:
        raise typer.BadParameter(
            f"there is no fault {unknown[0]!r}; --list-faults shows all faults"
        )
    if set(_split(text)) & CLOCK_KINDS and faketime_library() is None:
        raise typer.BadParameter(HOW_TO_GET)
    return text


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _list_faults(wanted: bool) -> None:
    if wanted:
        rows = ((name, kind.text, _lasts(kind.lasts)) for name, kind in KINDS.items())
        print_rows(("fault", "what it does", "lasts"), rows)
        raise typer.Exit


def _lasts(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:.1f} to {seconds[1]:.1f} s" if seconds[1] else ""


@app.command()
def drill(
    *,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.05, max=10_000, help="How long to inject faults.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="Seed of the faults, to repeat a drill (default: random)."
        ),
    ] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            "--faults",
            callback=lambda text: text and _read_faults(text),
            metavar="NAME,...",
            help="Inject only these faults (default: all).",
        ),
    ] = None,
    production: Annotated[
        bool,
        typer.Option(
            "--production",
            help="Run the services as in production: TLS, API keys, passwords, secrets in files, "
            "two processes each; with rolling restarts.",
        ),
    ] = False,
    stores: Annotated[
        DrillStores,
        typer.Option(
            "--stores",
            help="cluster: Redis is a cluster of three primaries with replicas, and PostgreSQL has "
            "a synchronous replica and is behind PgBouncer, each with faults of its own.",
        ),
    ] = DrillStores.SINGLE,
    dispatchers: Annotated[
        int, typer.Option("--dispatchers", min=1, max=16, help="Number of dispatchers.")
    ] = 2,
    schedulers: Annotated[
        int | None,
        typer.Option(
            "--schedulers", min=1, max=16, help="Number of schedulers (default: 1; production: 2)."
        ),
    ] = None,
    stats: Annotated[
        int | None,
        typer.Option(
            "--stats", min=1, max=16, help="Number of stats services (default: 1; production: 2)."
        ),
    ] = None,
    policy: Annotated[
        UncertainPolicy, typer.Option("--policy", help="OUTBOX_UNCERTAIN_POLICY of the stack.")
    ] = UncertainPolicy.RESEND,
    _list: Annotated[
        bool,
        typer.Option(
            "--list-faults", is_eager=True, callback=_list_faults, help="Show all faults."
        ),
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Kill parts of a private system under load at random, then audit it.

    Starts all servers in a private folder, with short windows, gaps and
    leases. While batches are uploaded, it injects the faults of the seed:
    kills, pauses, outages and hangs of every part. Each fault is printed
    with the time until mail flowed again. A drill of several minutes also
    has outages of half a minute. With --production, it runs the services
    with TLS, keys and passwords, and sometimes replaces all processes, one
    by one. At the end, it ends all faults, waits for the last job, and
    checks that every limit was kept and no mail was lost.

    Exit code 1 if a promise was broken; the folder with logs, mails and
    data is then kept.

    $ outbox drill --minutes 1 --seed 1
    """
    names = list(KINDS) if faults is None else _split(faults)
    if faults is not None and set(names) & set(OUTAGES) and minutes * 60 < OUTAGE_DRILL_S:
        raise typer.BadParameter(
            f"an outage requires --minutes {math.ceil(OUTAGE_DRILL_S / 60)} or more"
        )
    seed = secrets.randbelow(_SEEDS) if seed is None else seed
    if faults is not None and set(names) & set(ROLLOUTS) and not production:
        raise typer.BadParameter("a rolling restart requires --production")
    clustered = stores is DrillStores.CLUSTER
    _check_stores([] if faults is None else names, clustered=clustered, production=production)
    least = 2 if production else 1
    size = Size(dispatchers, schedulers or least, stats or least)
    if min(size.dispatchers, size.schedulers, size.stats) < least:
        raise typer.BadParameter("--production requires two processes or more of each service")
    with DrillFolder() as folder:
        stack = DrillStack(
            folder.path,
            size,
            drill_settings(policy.value),
            _say,
            production=production,
            cluster=clustered,
        )
        note(f"seed {seed}; starting a stack in {folder.path} ...")
        if stack.without_clocks and CLOCK_KINDS & set(names):
            note(f"faults left out: {', '.join(sorted(CLOCK_KINDS))}. {HOW_TO_GET}")
        report = run(
            lambda: play(stack, seed=seed, names=names, seconds=minutes * 60, say=note),
            lambda: note("stopping ..."),
        )
        folder.keep = report is not None and bool(report.broken)
    if report is None:
        raise CommandFailed("interrupted")
    if output is OutputFormat.JSON:
        place = str(folder.path) if folder.keep else None
        print_json(report.document(seed=seed, minutes=minutes, policy=policy.value, folder=place))
    else:
        _print(report, folder.path, seed)
    if report.broken:
        raise typer.Exit(EXIT_FAILED)


def _check_stores(wanted: list[str], *, clustered: bool, production: bool) -> None:
    """Refuse what cannot be done with the stores. `wanted` are the faults that were named."""
    if clustered and production:
        raise typer.BadParameter("--stores cluster and --production exclude each other")
    if clustered and not BINARY.exists():
        raise typer.BadParameter(PGBOUNCER_MISSING)
    if set(wanted) & (SINGLE_REDIS if clustered else set(STORES)):
        raise typer.BadParameter(
            "the faults of one Redis require --stores single, and those of a cluster and of "
            "PgBouncer --stores cluster"
        )


def _say(text: str) -> None:
    # Show only the first part. If a server did not start, the logs tell more.
    note(text.partition("; /")[0].partition("\n")[0])


def _print(report: DrillReport, folder: Path, seed: int) -> None:
    document = report.document()
    rows = [
        (name, str(number), *_recovery(document["recovery_s"].get(name)))
        for name, number in document["faults"].items()
    ]
    if rows:
        print_rows(("fault", "times", "mail after (median)", "at most"), rows)
    say()
    plain = {name: value for name, value in document.items() if not isinstance(value, dict | list)}
    print_rows(("figure", "value"), ((name, str(value)) for name, value in plain.items()))
    lines = [f"BROKEN: {line}" for line in report.broken] or ["Every promise was kept."]
    if report.broken:
        lines.append(f"Logs, mails and data are kept in {folder}. To repeat: --seed {seed}")
    say("\n" + "\n".join(lines))


def _recovery(times: dict[str, float] | None) -> tuple[str, str]:
    return ("never", "never") if times is None else tuple(f"{t:.2f} s" for t in times.values())  # type: ignore[return-value]
