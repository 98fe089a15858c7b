"""Files and folders that only their owner may use: they have mails, keys or passwords."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Final

from outbox_server.shared.errors import OutboxError

_FOLDER: Final = 0o700
_FILE: Final = 0o600


class ForeignFolderError(OutboxError):
    """A folder belongs to another user, who could read its files."""

    default_reason = "FOLDER_OF_ANOTHER_USER"


def private_folder(folder: Path) -> None:
    """Create a folder, or close an existing one to all other users.

    Raises:
        ForeignFolderError: it belongs to another user, who could open it again.
    """
    folder.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise ForeignFolderError(
            f"{folder} belongs to {_user(found.st_uid)}, not to {_user(os.geteuid())}: use "
            "another folder, or change its owner with chown -R"
        )
    if found.st_mode & 0o7777 != _FOLDER:
        folder.chmod(_FOLDER)


def open_private(path: Path, flags: int) -> int:
    """Return the descriptor of a file; a new one may be used by its owner only."""
    return os.open(path, flags, _FILE)


def write_private(path: Path, text: str) -> None:
    """Write a complete file, so that nobody reads a part of it, and no other user reads it."""
    fresh = path.with_name(f"{path.name}.new")
    # Never use a file that exists already, because it may have another mode.
    fresh.unlink(missing_ok=True)
    with os.fdopen(open_private(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
        file.write(text)
    fresh.rename(path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
