"""`outbox demo`: sends a CSV on a private stack, and checks the mails that arrive."""

from __future__ import annotations

import shutil
import tempfile
import time
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final

import typer
from outbox.v1.sender_pb2 import Sender
from outbox_client import AsyncClient, CallError

from outbox_server.cli.addresses import Address
from outbox_server.cli.call_errors import failure_of
from outbox_server.cli.demo_report import SenderReport, report_on, to_document
from outbox_server.cli.demo_run import Demo, ScheduledBatch
from outbox_server.cli.foreground import run
from outbox_server.cli.lazy import EXIT_FAILED, CommandFailed
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows
from outbox_server.cli.terminal import note, say
from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.supervisor import LocalSystem
from outbox_server.deploy.record import read_record
from outbox_server.shared.durations import format_duration
from outbox_server.shared.settings import Settings, load_settings

_WINDOW: Final = timedelta(seconds=20)
_LIMIT: Final = 8
# With a longer window, so small a limit would make the demo take hours.
_LONGEST_WINDOW: Final = timedelta(minutes=2)
_UNSUBSCRIBED: Final = "unsubscribed@example.org"

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    csv: Annotated[
        Path | None,
        typer.Argument(metavar="CSV", help="CSV file of recipients (default: a bundled list)."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the complete system in about a minute: send a CSV as paced mail.

    Starts all servers in a private folder, schedules the CSV for two senders
    with the default gap of 2 s, shows progress, checks the mails that arrive
    against the limits, and stops everything. One sender has a small limit,
    so that you see it wait: the window of the limit is 20 s here, instead of
    an hour. The mails are kept.

    No mail leaves this machine. Exit code 1 if a promise was broken.
    """
    content, bundled = _read(csv)
    settings = load_settings()
    if "rate_window" not in settings.model_fields_set:
        settings = settings.model_copy(update={"rate_window": _WINDOW})
    folder = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
    began = time.monotonic()
    reports = None
    explained = False
    try:
        reports = run(
            lambda: _run_demo(folder, settings, content, bundled=bundled),
            lambda: note("stopping ..."),
        )
    except LocalServerError:
        explained = True  # Its text names the logs.
        raise
    finally:
        broken = reports is None or any(report.broken for report in reports)
        _clear(folder, keep_logs=explained or (broken and reports is not None))
    if reports is None:
        raise CommandFailed("interrupted")
    seconds = time.monotonic() - began
    window_s = settings.rate_window.total_seconds()
    if output is OutputFormat.JSON:
        inbox = str(folder / "inbox")
        print_json(to_document(reports, window_s=window_s, seconds=seconds, inbox=inbox))
    else:
        _print_summary(reports, settings, seconds, folder)
    if broken:
        raise typer.Exit(EXIT_FAILED)


async def _run_demo(
    folder: Path, settings: Settings, csv: bytes, *, bundled: bool
) -> list[SenderReport]:
    note("starting PostgreSQL, Valkey, an inbox and the services, with two dispatchers ...")
    # Callers need keys, because other users of this machine can reach the ports.
    system = LocalSystem(folder, settings, dispatchers=2, default_ports=False, keys=True, say=note)
    async with system:
        key = None if system.operator_key is None else system.operator_key.read_text().strip()
        async with AsyncClient(system.scheduler, stats=system.stats, api_key=key) as client:
            try:
                return await _send_and_check(Demo(client), system, settings, csv, bundled=bundled)
            except CallError as error:
                address = Address(system.scheduler, "the demo's own stack", "scheduler")
                raise failure_of(error, address) from None


async def _send_and_check(
    demo: Demo, system: LocalSystem, settings: Settings, csv: bytes, *, bundled: bool
) -> list[SenderReport]:
    window_s = settings.rate_window.total_seconds()
    small = settings.rate_window <= _LONGEST_WINDOW
    if bundled:
        await demo.suppress(_UNSUBSCRIBED)
    scheduled = [
        await demo.schedule(Sender(email="news@outbox.example", display_name="Outbox News"), csv),
        await demo.schedule(
            Sender(
                email="bills@outbox.example",
                display_name="Outbox Bills",
                hourly_limit=_LIMIT if small else None,
            ),
            csv,
        ),
    ]
    _print_limits(scheduled, settings)
    await demo.follow(scheduled, window_s)
    mails = read_record(system.servers.record)
    return [report_on(await demo.expected(one), mails, window_s) for one in scheduled]


def _print_limits(scheduled: list[ScheduledBatch], settings: Settings) -> None:
    window = format_duration(settings.rate_window)
    for one in scheduled:
        batch, sender = one.batch, one.sender
        gap = format_duration(sender.effective_min_gap.ToTimedelta())
        note(
            f"{sender.email}: {batch.accepted_count} accepted, {batch.rejected_count} rejected, "
            f"{batch.duplicate_count} duplicate, {batch.suppressed_count} suppressed; at most "
            f"{sender.hourly_limit} in any {window}, at least {gap} apart"
        )
    if settings.rate_window != timedelta(hours=1):
        note(f"the window is {window} here instead of 1h, so that you see the limit at work")
    for rejection in scheduled[0].answer.rejections[:5]:
        note(f"  row {rejection.row_number}: {rejection.message} ({rejection.reason})")


def _read(csv: Path | None) -> tuple[bytes, bool]:
    if csv is None:
        return files("outbox_server.cli").joinpath("demo.csv").read_bytes(), True
    try:
        return csv.read_bytes(), False
    except OSError as error:
        raise CommandFailed(f"{csv} cannot be read: {error.strerror}") from None


def _clear(folder: Path, *, keep_logs: bool) -> None:
    """Remove all files of the stack except the mails and, if `keep_logs`, the logs."""
    kept = {"inbox", "logs"} if keep_logs else {"inbox"}
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not keep_logs and not any((folder / "inbox" / "new").glob("*")):
        shutil.rmtree(folder)


def _print_summary(
    reports: list[SenderReport], settings: Settings, seconds: float, folder: Path
) -> None:
    window = format_duration(settings.rate_window)
    names = ("sender", "accepted", "rejected", "sent", "failed", "lost", "sent twice")
    limits = ("shortest gap", "required", f"most in {window}", "limit")
    rows = []
    for report in reports:
        expected, gap = report.expected, report.least_gap_s
        counts = (
            expected.accepted,
            expected.rejected,
            expected.sent,
            expected.failed,
            report.lost,
            report.duplicates,
        )
        seen = ("" if gap is None else f"{gap:.3f} s", f"{expected.min_gap_s:g} s")
        window_seen = (str(report.most_in_window), str(expected.hourly_limit))
        rows.append([expected.email, *map(str, counts), *seen, *window_seen])
    say()
    print_rows((*names, *limits), rows)
    lines = [line for report in reports for line in report.broken]
    result = "\n".join(f"BROKEN: {line}" for line in lines) or (
        "Every accepted mail arrived exactly once, within all limits, as recorded by the inbox."
    )
    where = f"The mails are in {folder / 'inbox'} (a Maildir)"
    logs = f"; logs in {folder / 'logs'}" if lines else ""
    say(f"\n{result}\n{where}{logs}. It took {seconds:.0f} s.")
