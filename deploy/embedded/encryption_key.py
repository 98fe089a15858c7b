"""The key by which the embedded stack encrypts SMTP passwords, stored in its folder."""

from __future__ import annotations

from pathlib import Path

from outbox_server.deploy.private_files import write_private
from outbox_server.shared.secrets import generate_key


def key_in(folder: Path) -> str:
    """Return the key of a stack's folder, created if missing. Only its owner may read it.

    The caller must hold the folder's lock.
    """
    path = folder / "encryption_key"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        pass
    # Written completely or not at all: passwords encrypted with half a key would be lost.
    write_private(path, generate_key() + "\n")
    return path.read_text().strip()
