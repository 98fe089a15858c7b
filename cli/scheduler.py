"""`outbox scheduler`: runs the scheduler."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False)


@app.command()
def scheduler() -> None:
    """Run the scheduler, which accepts batches and manages senders and jobs.

    Its settings are the OUTBOX_* variables. It listens on
    OUTBOX_SCHEDULER_LISTEN (127.0.0.1:50051) and waits for an up-to-date
    schema (`outbox migrate`). SIGTERM and Ctrl-C stop it gracefully.
    """
    from outbox_server.cli.service import run

    run("scheduler")
