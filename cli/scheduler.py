"""`outbox scheduler`: one process."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False)


@app.command()
def scheduler() -> None:
    """Run the scheduler: it takes batches in, keeps senders, answers about jobs.

    It reads OUTBOX_*, listens on OUTBOX_SCHEDULER_LISTEN (127.0.0.1:50051),
    and wants the schema that `outbox migrate` makes. SIGTERM and Ctrl-C
    drain it.
    """
    from outbox_server.cli.service import run

    run("scheduler")
