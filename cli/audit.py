"""`outbox audit`: replays all sent times and compares what is recorded with what was promised."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cli.client import read_endpoints
from cli.lazy import EXIT_FAILED, CommandFailed
from cli.output import Output, OutputFormat, note, print_json, print_rows
from shared.settings import Settings, load_settings

_SHOWN: Final = 20
_COLUMNS: Final = ("sender", "id", "sends", "judged", "least gap", "must be", "most", "limit")
_RECORD: Final = "record.jsonl"

app = typer.Typer(add_completion=False)


@app.command()
def audit(
    maildir: Annotated[
        Path | None,
        typer.Option(
            "--maildir",
            metavar="DIR",
            help="What arrived: a Maildir. The development inbox keeps a record in it, with times.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="What arrived: that record alone."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Check all that was ever sent against the promises.

    Replays the recorded sends: the least gap of each sender, the most mails
    in any window, accepted jobs that are lost, mails sent twice (and whether
    an attempt at them was in doubt), jobs that contradict themselves, counts
    that differ from a recount. Where the SMTP side kept what it saw, its word
    counts. Reads PostgreSQL alone and changes nothing.

    The database is OUTBOX_DATABASE_URL, or that of `outbox up` in this folder,
    whose inbox is looked at too. Exit code 1 if a promise was broken.

    $ outbox audit
    """
    settings, inbox = _place()
    if maildir is None and record is None:
        maildir = inbox
    # `--help` needs no SQLAlchemy, which takes a third of a second.
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    from cli.audit_report import Report  # noqa: PLC0415
    from cli.audit_run import SmtpSide  # noqa: PLC0415
    from cli.audit_run import audit as carry_out  # noqa: PLC0415

    if record is None and maildir is not None and (maildir / _RECORD).is_file():
        record = maildir / _RECORD
    try:
        findings = asyncio.run(carry_out(settings, SmtpSide(record=record, maildir=maildir)))
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        raise CommandFailed(f"OUTBOX_DATABASE_URL: {cause}") from None
    except FileNotFoundError as error:
        raise CommandFailed(f"{error.filename}: there is no such file or folder") from None
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    report = Report(findings, settings)
    if output is OutputFormat.JSON:
        print_json(report.document())
    else:
        _print(report)
    if report.broken:
        raise typer.Exit(EXIT_FAILED)


def _place() -> tuple[Settings, Path | None]:
    """Return whose installation is audited, and its inbox, if that is `outbox up`'s."""
    settings = load_settings()
    stack = None if "database_url" in settings.model_fields_set else read_endpoints()
    if stack is None:
        return settings, None
    # What `up` runs with; what is set here goes before.
    given = {
        name: value
        for name, value in {**stack["settings"], "database_url": stack["database_url"]}.items()
        if name not in settings.model_fields_set
    }
    inbox = stack["inbox"]
    return load_settings(**given), None if inbox is None else Path(inbox)


def _print(report: Any) -> None:
    senders = report.senders
    rows = []
    for one in senders[:_SHOWN]:
        replay, gap = one.replay, one.replay.least_gap
        counts = (one.sender.sender_id, replay.sends, replay.judged)
        gaps = ("" if gap is None else f"{gap:.3f} s", f"{one.min_gap_s:g} s")
        most = (str(replay.most_in_window), str(one.sender.hourly_limit))
        rows.append([one.sender.email, *map(str, counts), *gaps, *most])
    if rows:
        print_rows(_COLUMNS, rows)
    if len(senders) > _SHOWN:
        note(f"the {_SHOWN} senders of {len(senders)} that came closest to their limits")
    sys.stdout.write("\n")
    sys.stdout.flush()
    print_rows(("what", "figure"), ([name, _text(n)] for name, n in report.figures().items()))
    side = "as the SMTP side saw them" if report.by_smtp_side else "as PostgreSQL recorded them"
    lines = [f"BROKEN: {line}" for line in report.broken] or ["Every promise was kept."]
    sys.stdout.write(f"\n{chr(10).join(lines)}\n")
    sys.stdout.write(f"Sends {side}, compared with {report.compared_with}.\n")
    sys.stdout.flush()


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
