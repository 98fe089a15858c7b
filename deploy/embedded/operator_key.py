"""The operator's API key of an embedded stack whose callers need keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from outbox_server.deploy.private_files import write_private
from outbox_server.shared.auth.keys import ApiKeyKind, PresentedKey, make_key, read_key
from outbox_server.shared.auth.store import register_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings

_NAME: Final = "outbox up"


def operator_key_in(folder: Path, database_url: str) -> Path:
    """Return the file with the key, which is stored in the database; a new one if there is none.

    A key that was revoked is replaced. The caller must hold the folder's lock, and run no event
    loop in this thread.
    """
    file = folder / "operator_key"
    stored = read_key(file.read_text().strip()) if file.exists() else None
    if stored is None or not asyncio.run(_is_valid(stored, database_url)):
        made = make_key()
        asyncio.run(_is_valid(made, database_url))
        write_private(file, f"{made.text}\n")
    return file


async def _is_valid(key: PresentedKey, database_url: str) -> bool:
    """Return whether the database has the key, or has it now."""
    engine = create_engine(load_settings(database_url=database_url))
    try:
        async with engine.begin() as connection:
            found = await register_key(connection, key, ApiKeyKind.OPERATOR, None, _NAME)
    finally:
        await engine.dispose()
    return key.proves(found.secret_hash) and found.key.revoked_at is None
