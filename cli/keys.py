"""`outbox keys`."""

from __future__ import annotations

import typer

from cli.output import Output, OutputFormat, print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make keys.")


@app.callback()
def keys() -> None:
    """Make keys."""


@app.command(name="generate-encryption-key")
def generate_encryption_key(output: Output = OutputFormat.TABLE) -> None:
    """Print a new key for OUTBOX_ENCRYPTION_KEYS, which SMTP passwords are stored under.

    $ export OUTBOX_ENCRYPTION_KEYS=$(outbox keys generate-encryption-key)
    """
    from shared.secrets import generate_key  # noqa: PLC0415 - `--help` needs no cryptography

    key = generate_key()
    if output is OutputFormat.JSON:
        print_json({"encryption_key": key})
    else:
        typer.echo(key)
