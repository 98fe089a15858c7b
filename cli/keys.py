"""`outbox keys`: API keys, and the keys that encrypt stored secrets."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from outbox_server.cli.key_options import (
    ExpireTime,
    KeyName,
    KeyOfOperator,
    KeyOfService,
    KeyOfUser,
    OnlyOfUser,
    ReadOnly,
    key_id_of,
    key_kind,
    show_new_key,
)
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import Output, OutputFormat, print_json, print_rows, utc_text
from outbox_server.cli.terminal import note, printable, say

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
    "expire_time",
    "read_only",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Create, list and revoke API keys; manage encryption keys.",
)


@app.command()
def create(
    *,
    user: KeyOfUser = "",
    service: KeyOfService = False,
    operator: KeyOfOperator = False,
    name: KeyName = "",
    read_only: ReadOnly = False,
    expire_time: ExpireTime = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Create an API key in the database of OUTBOX_DATABASE_URL. It is printed only once.

    Without that variable, it is the database of `outbox up` in this folder.
    Operators of a running system can use `outbox api-keys create`.

    $ export OUTBOX_API_KEY=$(outbox keys create --user acme --name web)

    $ outbox keys create --service --name reports --read-only \
      --expire-time 'in 720h'
    """
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.keys import make_key
    from outbox_server.shared.auth.store import insert_key

    kind = key_kind(user, name, service=service, operator=operator)
    key = make_key()
    made = in_one_transaction(
        lambda connection: insert_key(
            connection,
            key,
            kind,
            user or None,
            name,
            read_only=read_only,
            expires_at=expire_time,
        )
    )
    if output is OutputFormat.JSON:
        print_json({"key": key.text, **_document(made)})
    else:
        show_new_key(made.key_id, key.text)


@app.command()
def register(
    *,
    user: KeyOfUser = "",
    service: KeyOfService = False,
    operator: KeyOfOperator = False,
    name: KeyName = "",
    output: Output = OutputFormat.TABLE,
) -> None:
    """Store the API key in OUTBOX_API_KEY or --api-key-file, which was made elsewhere.

    For the first key of an installation whose secrets exist before its database. Safe to repeat.

    $ OUTBOX_API_KEY_FILE=first.key outbox keys register --operator --name first
    """
    from outbox_server.cli.credentials import api_key_of
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.keys import read_key
    from outbox_server.shared.auth.store import register_key
    from outbox_server.shared.settings import load_settings

    kind = key_kind(user, name, service=service, operator=operator)
    key = read_key(api_key_of(load_settings()))
    if key is None:
        raise CommandFailed(
            "OUTBOX_API_KEY, OUTBOX_API_KEY_FILE and --api-key-file: none has an API key; make one "
            "with `outbox keys generate-api-key`"
        )
    found = in_one_transaction(
        lambda connection: register_key(connection, key, kind, user or None, name)
    )
    stored = found.key
    if not key.proves(found.secret_hash):
        raise CommandFailed(f"key {key.key_id} is stored with another secret: make another key")
    if (stored.kind, stored.user_id or "") != (kind, user):
        raise CommandFailed(
            f"key {key.key_id} is stored as a key of another kind or user "
            f"({stored.kind.name} {stored.user_id or ''}".rstrip()
            + "): make another key"
        )
    if stored.revoked_at is not None:
        raise CommandFailed(f"key {key.key_id} was revoked, which is final: make another key")
    if output is OutputFormat.JSON:
        print_json({"created": found.created, **_document(stored)})
    else:
        note(f"key {key.key_id} " + ("is stored now" if found.created else "was stored before"))


@app.command(name="generate-api-key")
def generate_api_key(output: Output = OutputFormat.TABLE) -> None:
    """Print a new API key, which no server accepts before `outbox keys register`.

    $ outbox keys generate-api-key
    """
    from outbox_server.shared.auth.keys import make_key

    key = make_key()
    if output is OutputFormat.JSON:
        print_json({"key": key.text, "key_id": key.key_id})
    else:
        say(key.text)


@app.command(name="list")
def list_(
    *,
    user: OnlyOfUser = "",
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the API keys, oldest first, with revoked ones but without the secrets.

    The time of the last use is updated at most once a minute.
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.store import list_keys

    found = in_one_transaction(lambda connection: list_keys(connection, user or None))
    documents = [_document(key) for key in found]
    if output is OutputFormat.JSON:
        print_json({"keys": documents})
    elif documents:
        print_rows(_COLUMNS, ([_cell(one[name]) for name in _COLUMNS] for one in documents))
    else:
        note("no API keys")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id from `outbox keys list`.")],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Revoke an API key for good. Within 5 s, no server accepts it any more.

    $ outbox keys revoke KEY_ID
    """
    from outbox_server.cli.database import in_one_transaction
    from outbox_server.shared.auth.store import revoke_key

    wanted = key_id_of(key_id)
    revoked = in_one_transaction(lambda connection: revoke_key(connection, wanted))
    if revoked is None:
        raise CommandFailed(f"there is no API key {wanted}; `outbox keys list` shows all keys")
    if output is OutputFormat.JSON:
        print_json(_document(revoked))
    else:
        note(f"key {revoked.key_id} is revoked; within 5 s, no server accepts it any more")


@app.command(name="generate-encryption-key")
def generate_encryption_key(output: Output = OutputFormat.TABLE) -> None:
    """Print a new key for OUTBOX_ENCRYPTION_KEYS, which encrypts stored secrets.

    $ export OUTBOX_ENCRYPTION_KEYS=$(outbox keys generate-encryption-key)
    """
    from outbox_server.shared.secrets import generate_key

    key = generate_key()
    if output is OutputFormat.JSON:
        print_json({"encryption_key": key})
    else:
        say(key)


@app.command(name="rotate-encryption")
def rotate_encryption(output: Output = OutputFormat.TABLE) -> None:
    """Re-encrypt all stored secrets with the first key of OUTBOX_ENCRYPTION_KEYS.

    Secrets are SMTP passwords, the secrets and tokens of OAuth 2.0, and the secrets of webhooks.

    First put the new key before the old ones in every service, and restart the services.
    Afterwards, remove the old keys. If it is interrupted, run it again.

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
            f"{done.rotated} re-encrypted, {done.current} already under the first key, "
            f"{len(done.unreadable)} under a key that OUTBOX_ENCRYPTION_KEYS lacks"
        )
    if done.unreadable:
        raise CommandFailed(
            "no key of OUTBOX_ENCRYPTION_KEYS decrypts the secrets of sender "
            f"{', '.join(map(str, done.unreadable[:20]))}: add the key and run this again, or "
            "set the sender's endpoint again"
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
        "expire_time": _time(key.expires_at),
        "read_only": key.read_only,
    }


def _cell(value: str | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value or "")


def _time(time: datetime | None) -> str | None:
    return None if time is None else utc_text(time)
