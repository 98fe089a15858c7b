"""`outbox keys`: API keys, and the keys that SMTP passwords are encrypted with."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import Output, OutputFormat, note, print_json, print_rows, printable

if TYPE_CHECKING:
    from outbox_server.shared.auth.keys import ApiKey

_COLUMNS: Final = (
    "key_id",
    "kind",
    "user_id",
    "name",
    "create_time",
    "last_use_time",
    "revoke_time",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make, list and revoke API keys; make encryption keys.",
)


@app.command()
def create(
    *,
    user: Annotated[
        str, typer.Option("--user", metavar="ID", help="A key that acts for this user only.")
    ] = "",
    service: Annotated[
        bool,
        typer.Option("--service", help="A key of another backend: it acts for any user."),
    ] = False,
    operator: Annotated[
        bool,
        typer.Option(
            "--operator", help="An operator's key: any user, and the dispatchers' own methods."
        ),
    ] = False,
    name: Annotated[str, typer.Option("--name", help="What it is for, in your words.")] = "",
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make an API key in the database of OUTBOX_DATABASE_URL, and print it: once, here.

    $ export OUTBOX_API_KEY=$(outbox keys create --user acme --name web)
    """
    # `--help` needs no SQLAlchemy, which takes a third of a second.
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared import bounds
    from outbox_server.shared.auth.keys import ApiKeyKind, make_key
    from outbox_server.shared.auth.store import insert_key

    if [bool(user), service, operator].count(True) != 1:
        raise typer.BadParameter("say whose key: one of --user ID, --service, --operator")
    bounds.DISPLAY_NAME.check("--name", name)
    kind = ApiKeyKind.SERVICE if service else ApiKeyKind.OPERATOR
    if user:
        bounds.USER_ID.check("--user", user)
        kind = ApiKeyKind.USER
    key = make_key()
    made = in_one_transaction(
        lambda connection: insert_key(connection, key, kind, user or None, name)
    )
    if output is OutputFormat.JSON:
        print_json({"key": key.text, **_document(made)})
    else:
        note(f"key {made.key_id}; it is shown this once: only its hash is stored")
        typer.echo(key.text)


@app.command(name="list")
def list_(
    *,
    user: Annotated[str, typer.Option("--user", metavar="ID", help="Only this user's.")] = "",
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the API keys, the oldest first, revoked ones too; never the keys themselves.

    The last use is written at most once a minute.
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.store import list_keys

    found = in_one_transaction(lambda connection: list_keys(connection, user or None))
    documents = [_document(key) for key in found]
    if output is OutputFormat.JSON:
        print_json({"keys": documents})
    elif documents:
        print_rows(
            _COLUMNS, ([printable(one[name] or "") for name in _COLUMNS] for one in documents)
        )
    else:
        note("no API keys")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As `outbox keys list` has it.")],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Revoke an API key: within 5 s no server takes it any more. Cannot be undone.

    $ outbox keys revoke k7m2p4x9qa
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.store import revoke_key

    # Whoever pastes the whole key means the same, and should not see it in the answer.
    parts = key_id.split("_")
    wanted = parts[1] if len(parts) > 1 else key_id
    revoked = in_one_transaction(lambda connection: revoke_key(connection, wanted))
    if revoked is None:
        raise CommandFailed(f"there is no API key {wanted}; `outbox keys list` shows all")
    if output is OutputFormat.JSON:
        print_json(_document(revoked))
    else:
        note(f"key {revoked.key_id} is revoked; within 5 s no server takes it any more")


@app.command(name="generate-encryption-key")
def generate_encryption_key(output: Output = OutputFormat.TABLE) -> None:
    """Print a new key for OUTBOX_ENCRYPTION_KEYS, which SMTP passwords are stored under.

    $ export OUTBOX_ENCRYPTION_KEYS=$(outbox keys generate-encryption-key)
    """
    from outbox_server.shared.secrets import generate_key

    key = generate_key()
    if output is OutputFormat.JSON:
        print_json({"encryption_key": key})
    else:
        typer.echo(key)


@app.command(name="rotate-encryption")
def rotate_encryption(output: Output = OutputFormat.TABLE) -> None:
    """Encrypt all stored secrets of endpoints again, under the first key of OUTBOX_ENCRYPTION_KEYS.

    Those are SMTP passwords, and the secrets and tokens of OAuth 2.0.

    First put the new key before the old ones, in every service, and restart them; when this
    is done, the old keys can go. Cut off, it is simply run again.

    $ OUTBOX_ENCRYPTION_KEYS=NEW,OLD outbox keys rotate-encryption
    """
    from outbox_server.cli.rotation import rotate_all

    done = rotate_all()
    if output is OutputFormat.JSON:
        print_json(
            {
                "rotated_count": done.rotated,
                "current_count": done.current,
                "unreadable_sender_ids": [str(sender_id) for sender_id in done.unreadable],
            }
        )
    else:
        note(
            f"{done.rotated} encrypted again, {done.current} were under the newest key already, "
            f"{len(done.unreadable)} under a key that is not here"
        )
    if done.unreadable:
        raise CommandFailed(
            "no key of OUTBOX_ENCRYPTION_KEYS decrypts the secrets of sender "
            f"{', '.join(map(str, done.unreadable[:20]))}: add its key and run this again, or "
            "store its endpoint again"
        )


def _document(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "kind": key.kind.name,
        "user_id": key.user_id or "",
        "name": key.name,
        "create_time": _time(key.created_at),
        "last_use_time": _time(key.last_used_at),
        "revoke_time": _time(key.revoked_at),
    }


def _time(time: datetime | None) -> str | None:
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
