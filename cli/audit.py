"""`outbox audit`: checks that every limit was kept and no mail was lost or duplicated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from outbox_server.cli.addresses import read_endpoints
from outbox_server.cli.lazy import EXIT_FAILED, CommandFailed
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows
from outbox_server.cli.terminal import note, say
from outbox_server.shared.settings import Settings, load_settings

_MAX_SENDERS_SHOWN: Final = 20
_COLUMNS: Final = ("sender", "id", "sends", "checked", "shortest gap", "required", "most", "limit")

app = typer.Typer(add_completion=False)


@app.command()
def audit(
    maildir: Annotated[
        Path | None,
        typer.Option(
            "--maildir",
            metavar="DIR",
            help="Maildir of the mails that arrived. If it contains the development inbox's "
            "record, that is used.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Record file of the development inbox."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Check that every limit was kept and no mail was lost. Changes nothing.

    Finds the shortest gap of each sender, the most mails in any window, lost
    jobs, mails sent twice (and whether an attempt was in doubt), inconsistent
    jobs, and counts that differ from a recount. Mail to the development inbox
    is checked by the inbox's record, all other mail by PostgreSQL alone.
    Mails in the --maildir of another server are assumed to be all mails that
    were sent.

    The database is OUTBOX_DATABASE_URL, or that of `outbox up` in this folder,
    with its inbox. Exit code 1 if a promise was broken.

    $ outbox audit
    """
    settings, inbox = _installation()
    if maildir is None and record is None:
        maildir = inbox
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from sqlalchemy.exc import SQLAlchemyError

    from outbox_server.deploy.record import RECORD, KeptMails
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
        raise CommandFailed(f"{error.filename}: no such file or folder") from None
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    report = AuditReport(findings, findings.settings)
    if output is OutputFormat.JSON:
        print_json(report.document())
    else:
        _print(report)
    if report.broken:
        raise typer.Exit(EXIT_FAILED)


def _installation() -> tuple[Settings, Path | None]:
    """Return the settings of the installation to audit and, for `outbox up`, its inbox."""
    settings = load_settings()
    stack = None if "database_url" in settings.model_fields_set else read_endpoints()
    if stack is None:
        return settings, None
    # The settings of `up`. Variables that are set here take precedence.
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
    for one in senders[:_MAX_SENDERS_SHOWN]:
        replay, gap = one.replay, one.replay.least_gap
        counts = (one.sender.sender_id, replay.sends, replay.checked)
        gaps = ("" if gap is None else f"{gap:.3f} s", f"{one.min_gap_s:g} s")
        most = (str(replay.most_in_window), str(one.sender.hourly_limit))
        rows.append([one.sender.email, *map(str, counts), *gaps, *most])
    if rows:
        print_rows(_COLUMNS, rows)
    if len(senders) > _MAX_SENDERS_SHOWN:
        note(f"shown: the {_MAX_SENDERS_SHOWN} of {len(senders)} senders closest to their limits")
    say()
    print_rows(("figure", "value"), ([name, _text(n)] for name, n in report.figures().items()))
    side = "as recorded by the inbox" if report.by_smtp_side else "as recorded by PostgreSQL"
    lines = [f"BROKEN: {line}" for line in report.broken] or ["Every promise was kept."]
    elsewhere = report.findings.jobs.elsewhere
    if elsewhere:
        mails, are = ("1 mail", "is") if elsewhere == 1 else (f"{elsewhere:,} mails", "are")
        lines.append(
            f"{mails} went to other servers and {are} checked by PostgreSQL's record alone."
        )
    purged = report.findings.totals.purged
    if purged:
        lines.append(
            f"{purged:,} finished jobs were removed after OUTBOX_RETENTION: their counts are "
            "checked, their mails are not."
        )
    say(f"\n{chr(10).join(lines)}\nSends {side}, compared with {report.compared_with}.")


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
