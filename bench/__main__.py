"""`python -m bench`: prints a table and writes build/bench.json. All figures are from this run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import (
    accounts,
    backlog,
    dispatching,
    ending,
    intake,
    lateness,
    pages,
    promises,
    reading,
    standing,
)
from bench.bench import Bench
from bench.results import RowResult
from bench.rivals.installing import InstalledRivals
from bench.row import BenchRow
from bench.size import SHORT, BenchSize
from bench.world import sink_name, smtp_sink
from outbox_server.deploy.embedded.stack import Servers
from outbox_server.shared.database.migrating import migrate

TARGET: Final = Path("build/bench.json")
# Those in `ending` come last of those that share a backlog: they leave senders without mail.
_MODULES: Final = (
    *(dispatching, accounts, intake, lateness, backlog),
    *(reading, standing, ending, promises),
)
ROWS: Final = {row.name: row for module in _MODULES for row in module.ROWS}


async def measure(names: Sequence[str], size: BenchSize) -> dict[str, Any]:
    """Measure rows one after the other; in each, the contenders take turns.

    The file is written after each row, so that an interrupted run leaves what it has measured.
    """
    console = Console(stderr=True)
    run = _described(size)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="build") as folder:
        async with Servers(Path(folder), inbox=False) as servers:
            await asyncio.to_thread(migrate, servers.database_url)
            with smtp_sink() as (sink_pid, smtp_port):
                bench = Bench(servers, sink_pid, smtp_port, size, InstalledRivals(), console.print)
                for name in names:
                    console.print(f"{name} ...")
                    result = await _measure_row(bench, ROWS[name])
                    run["rows"][name] = result.as_json()
                    await asyncio.to_thread(_write, run)
    return run


def _write(run: dict[str, Any]) -> None:
    TARGET.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _described(size: BenchSize) -> dict[str, Any]:
    """Return a run without rows: when, where and how much is measured."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "sink": sink_name(),
        "fsync": "on",
        "size": {"jobs": size.jobs, "mails": size.mails, "is_full": size.is_full},
        "rounds": size.rounds,
        "rows": {},
    }


async def _measure_row(bench: Bench, row: BenchRow) -> RowResult:
    result = RowResult(row.name, row.what, row.targets, row.notes, row.size(bench.size))
    for number in range(bench.size.rounds):
        for label, contender in row.contenders.items():
            try:
                result.add(label, await contender(bench, number))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the other rows still count
                traceback.print_exc()
                result.error = f"{label}, round {number + 1}: {error!r}"
                return result
    return result


def print_table(run: dict[str, Any]) -> None:
    """Print the rows with their medians, spreads and ratios."""
    table = Table("row", "contender", "figure", "median", "spread", "ratio", "target", "met")
    for name, row in run["rows"].items():
        first = True
        for label, figures in row["contenders"].items():
            for figure, found in figures.items():
                low, high = (pages.short(value) for value in found["spread"])
                median = pages.short(found["median"])
                start = (name if first else "", label, figure)
                table.add_row(*start, median, f"{low} to {high}", "", "", "")
                first = False
        for target in row["targets"]:
            table.add_row(name if first else "", "", "", "", "", *pages.verdict(target))
            first = False
        table.add_row("", row["size"], *[""] * 6)
        if row["error"]:
            table.add_row("", row["error"], *[""] * 6)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for note in sorted({note for row in run["rows"].values() for note in row["notes"]}):
        print(f"- {note}")
    size = run["size"]
    print(
        f"{size['jobs']:,} jobs of backlog, {size['mails']:,} mails, {run['rounds']} rounds in "
        f"turns, fsync {run['fsync']}, mail to {run['sink']}, {run['machine']['cores']} cores"
    )
    if not size["is_full"]:
        print("a short form: the targets are about 10,000,000 jobs and 20,000 mails")


def main() -> int:
    """Measure the rows that are named, or all, and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--short", action="store_true", help="a backlog of 100,000, 4,000 mails")
    parser.add_argument("--jobs", type=int, help="jobs of backlog (default: 10,000,000)")
    parser.add_argument("--mails", type=int, help="mails that are sent (default: 20,000)")
    parser.add_argument("--rounds", type=int, help="rounds of each contender (default: 3)")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/, too")
    options = parser.parse_args()
    names = [name for name in ROWS if name in options.row] or list(ROWS)
    if unknown := [name for name in options.row if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}")
    base = SHORT if options.short else BenchSize()
    size = BenchSize(
        options.jobs or base.jobs, options.mails or base.mails, options.rounds or base.rounds
    )
    if size.jobs < 10_000 or size.mails < 1_000:
        parser.error("at least 10,000 jobs and 1,000 mails")
    # The servers' folder is there as well: it has room for the large databases.
    TARGET.parent.mkdir(exist_ok=True)
    run = asyncio.run(measure(names, size))
    print_table(run)
    if options.docs:
        pages.write(run)
    missed = [name for name, row in run["rows"].items() if not row["met"]]
    print(f"written to {TARGET}; missed: {', '.join(missed) or 'none'}")
    return 1 if any(row["error"] for row in run["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
