"""`outbox audit`: replays all sent times and compares what is recorded with what was promised."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from outbox_server.cli.client import read_endpoints
from outbox_server.cli.lazy import EXIT_FAILED, CommandFailed
from outbox_server.cli.output import Output, OutputFormat, note, print_json, print_rows
from outbox_server.shared.settings import Settings, load_settings

_MAX_ROWS: Final = 20
_COLUMNS: Final = ("sender", "id", "sends", "judged", "least gap", "must be", "most", "limit")

app = typer.Typer(add_completion=False)


@app.command()
def audit(
    maildir: Annotated[
        Path | None,
        typer.Option(
            "--maildir",
            metavar="DIR",
            help="Maildir of the mails that arrived. The development inbox keeps a record in it, "
            "with times.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Record of the mails that arrived."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Check all that was ever sent against the promises.

    Replays the recorded sends: the least gap of each sender, the most mails
    in any window, accepted jobs that are lost, mails sent twice (and whether
    an attempt at them was in doubt), jobs that contradict themselves, counts
    that differ from a recount. Mail that went to the development inbox is
    judged by what the inbox saw, all other mail by PostgreSQL alone. Other
    servers' mails in --maildir are taken to be all that was sent. Changes
    nothing.

    The database is OUTBOX_DATABASE_URL, or that of `outbox up` in this folder,
    whose inbox is looked at too. Exit code 1 if a promise was broken.

    $ outbox audit
    """
    settings, inbox = _place()
    if maildir is None and record is None:
        maildir = inbox
    # `--help` needs no SQLAlchemy, which takes a third of a second.
    from sqlalchemy.exc import SQLAlchemyError

    from outbox_server.deploy.embedded.record import RECORD, KeptMails
    from outbox_server.shared.audit.installation import audit_installation
    from outbox_server.shared.audit.report import AuditReport

    if record is None and maildir is not None and (maildir / RECORD).is_file():
        record = maildir / RECORD
    smtp_side = None
    if record is not None or maildir is not None:
        smtp_side = KeptMails(record, maildir)
    try:
        findings = asyncio.run(audit_installation(settings, smtp_side))
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        raise CommandFailed(f"OUTBOX_DATABASE_URL: {cause}") from None
    except FileNotFoundError as error:
        raise CommandFailed(f"{error.filename}: there is no such file or folder") from None
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    report = AuditReport(findings, settings)
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
    for one in senders[:_MAX_ROWS]:
        replay, gap = one.replay, one.replay.least_gap
        counts = (one.sender.sender_id, replay.sends, replay.judged)
        gaps = ("" if gap is None else f"{gap:.3f} s", f"{one.min_gap_s:g} s")
        most = (str(replay.most_in_window), str(one.sender.hourly_limit))
        rows.append([one.sender.email, *map(str, counts), *gaps, *most])
    if rows:
        print_rows(_COLUMNS, rows)
    if len(senders) > _MAX_ROWS:
        note(f"the {_MAX_ROWS} senders of {len(senders)} that came closest to their limits")
    sys.stdout.write("\n")
    sys.stdout.flush()
    print_rows(("what", "figure"), ([name, _text(n)] for name, n in report.figures().items()))
    side = "as the SMTP side saw them" if report.by_smtp_side else "as PostgreSQL recorded them"
    lines = [f"BROKEN: {line}" for line in report.broken] or ["Every promise was kept."]
    elsewhere = report.findings.jobs.elsewhere
    if elsewhere:
        mails, are = ("1 mail", "is") if elsewhere == 1 else (f"{elsewhere:,} mails", "are")
        lines.append(f"{mails} went to other servers and {are} judged by PostgreSQL alone.")
    sys.stdout.write(f"\n{chr(10).join(lines)}\n")
    sys.stdout.write(f"Sends {side}, compared with {report.compared_with}.\n")
    sys.stdout.flush()


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
