"""The passwords of an embedded PostgreSQL, in the file format that all its clients read."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Final
from urllib.parse import quote

from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.private_files import write_private

# Roles of PostgreSQL: the superuser, and the owner of Outbox's databases.
SUPERUSER: Final = "postgres"
OWNER: Final = "outbox"
_ROLES: Final = (SUPERUSER, OWNER)


class PasswordFile:
    """A password per role, made at the first use, in a file in the format of libpq's `passfile`."""

    def __init__(self, data: Path) -> None:
        """Take the data folder. The file is made beside it."""
        self._path = data.with_name(f"{data.name}.pgpass").resolve()

    def url(self, port: int, database: str, role: str) -> str:
        """Return the URL of a database. It names the password file, so it contains no secret."""
        file = quote(str(self._path), safe="/")
        return f"postgresql://{role}@{LOOPBACK}:{port}/{database}?passfile={file}"

    def password_of(self, role: str) -> str:
        """Return the password of the superuser or the owner."""
        return self._read()[role]

    @property
    def digest(self) -> str:
        """A text that tells these passwords from others, without disclosing them."""
        text = "".join(self._read()[role] for role in _ROLES)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self) -> dict[str, str]:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            # 192 random bits in characters that need no escape in the file, a URL or a literal.
            made = {role: secrets.token_urlsafe(24) for role in _ROLES}
            # Any port, because proxies stand before the server in a drill.
            write_private(
                self._path,
                "".join(f"{LOOPBACK}:*:*:{role}:{password}\n" for role, password in made.items()),
            )
            return made
        lines = (line.split(":") for line in text.splitlines())
        return {role: password for *_, role, password in lines}
