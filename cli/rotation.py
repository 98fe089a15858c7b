"""`outbox keys rotate-encryption`: re-encrypts all secrets, with progress on stderr."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.cli.database import with_engine
from outbox_server.cli.progress import JobProgress
from outbox_server.shared.database.secret_rotation import (
    RotatedChunk,
    count_oauth2,
    count_passwords,
    rotate_chunk,
    rotate_oauth2_chunk,
    rotate_webhook_chunk,
)
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import load_settings

_PASSWORDS: Final = "SMTP passwords"
_OAUTH2: Final = "OAuth 2.0 credentials"


@dataclass(slots=True)
class Rotation:
    """The results of a rotation, by number of secrets."""

    rotated: int = 0
    # Already encrypted with the first key.
    current: int = 0
    unreadable: list[int] = field(default_factory=list)


def rotate_all() -> Rotation:
    """Re-encrypt every stored password, secret of a webhook, and secret and token of OAuth 2.0.

    Raises:
        ConfigurationError: OUTBOX_ENCRYPTION_KEYS has only one key.
        CommandFailed: the database cannot be reached.
    """
    secrets = SecretBox.from_settings(load_settings())
    # If a new key replaced the old one, instead of preceding it, every password would be lost.
    if secrets.key_count <= 1:
        raise ConfigurationError(
            "OUTBOX_ENCRYPTION_KEYS: has no new key; put one from "
            "`outbox keys generate-encryption-key` before the existing ones: NEW,OLD"
        )

    async def rotate(engine: AsyncEngine) -> Rotation:
        done = Rotation()
        async with engine.connect() as connection:
            totals = {
                _PASSWORDS: await count_passwords(connection),
                _OAUTH2: await count_oauth2(connection),
            }
        with JobProgress(totals) as progress:
            await _rotate(engine, secrets, rotate_chunk, done, partial(progress.update, _PASSWORDS))
            await _rotate(
                engine, secrets, rotate_oauth2_chunk, done, partial(progress.update, _OAUTH2)
            )
            # They are few: their progress is not shown.
            await _rotate(engine, secrets, rotate_webhook_chunk, done, lambda _: None)
        return done

    return with_engine(rotate)


async def _rotate(
    engine: AsyncEngine,
    secrets: SecretBox,
    rotate_some: Callable[[AsyncConnection, SecretBox, int], Awaitable[RotatedChunk]],
    done: Rotation,
    report: Callable[[int], None],
) -> None:
    """Re-encrypt all secrets of one kind in chunks, and add the results to `done`."""
    looked_at, after = 0, 0
    while True:
        async with engine.begin() as connection:
            chunk = await rotate_some(connection, secrets, after)
        if chunk.last_id is None:
            return
        after = chunk.last_id
        looked_at += chunk.looked_at
        done.rotated += chunk.rotated
        done.unreadable += chunk.unreadable
        done.current += chunk.looked_at - chunk.rotated - len(chunk.unreadable)
        report(looked_at)
