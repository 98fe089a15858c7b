"""The key by which the embedded stack encrypts SMTP passwords, stored in its folder."""

from __future__ import annotations

import os
from pathlib import Path

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
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(generate_key() + "\n")
    # Rename the complete file: passwords that are encrypted with half a key would be lost.
    fresh.rename(path)
    return path.read_text().strip()
