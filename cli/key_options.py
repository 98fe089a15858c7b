"""The options of a new API key, for `outbox keys` and `outbox api-keys`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from outbox_server.cli.options import time_option
from outbox_server.cli.terminal import note, say

if TYPE_CHECKING:
    from outbox_server.shared.auth.keys import ApiKeyKind

KeyOfUser = Annotated[
    str, typer.Option("--user", metavar="ID", help="Key of this user; acts for this user only.")
]
KeyOfService = Annotated[
    bool, typer.Option("--service", help="Key of a backend service; acts for any user.")
]
KeyOfOperator = Annotated[
    bool,
    typer.Option(
        "--operator", help="Key of an operator; any user, and the commands for operators."
    ),
]
KeyName = Annotated[str, typer.Option("--name", help="Purpose of the key, in your words.")]
ReadOnly = Annotated[
    bool, typer.Option("--read-only", help="The key may read, and change nothing.")
]
ExpireTime = Annotated[
    datetime | None,
    time_option("--expire-time", "When the key expires, such as 'in 720h' (default: never)."),
]
OnlyOfUser = Annotated[str, typer.Option("--user", metavar="ID", help="Only keys of this user.")]


def key_kind(user: str, name: str, *, service: bool, operator: bool) -> ApiKeyKind:
    """Return the kind of key that the options ask for.

    Raises:
        typer.BadParameter: not exactly one kind is given, or a text is too long.
    """
    from outbox_server.shared import bounds
    from outbox_server.shared.auth.keys import ApiKeyKind

    if [bool(user), service, operator].count(True) != 1:
        raise typer.BadParameter("give exactly one of --user ID, --service and --operator")
    bounds.DISPLAY_NAME.check("--name", name)
    if user:
        bounds.USER_ID.check("--user", user)
        return ApiKeyKind.USER
    return ApiKeyKind.SERVICE if service else ApiKeyKind.OPERATOR


def key_id_of(text: str) -> str:
    """Return the id of a key. A pasted complete key works too, and must not leave this machine."""
    parts = text.split("_")
    return parts[1] if len(parts) > 1 else text


def show_new_key(key_id: str, key: str) -> None:
    """Print a new key to stdout, and a note to stderr."""
    note(f"key {key_id}; it is shown only now, because only its hash is stored")
    say(key)
