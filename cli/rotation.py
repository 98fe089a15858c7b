"""`outbox keys rotate-encryption`: what it does, with its progress on stderr."""

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
)
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import load_settings

_PASSWORDS: Final = "SMTP passwords"
_OAUTH2: Final = "OAuth 2.0 credentials"


@dataclass(slots=True)
class Rotation:
    """How far it came."""

    rotated: int = 0
    # Under the newest key before.
    current: int = 0
    unreadable: list[int] = field(default_factory=list)


def rotate_all() -> Rotation:
    """Rotate every stored password, and every secret and token of OAuth 2.0.

    Raises:
        ConfigurationError: there is no new key beside the old ones.
        CommandFailed: the database cannot be reached.
    """
    secrets = SecretBox.from_settings(load_settings())
    # A new key put in place of the old one, and not before it, would lose every password.
    if secrets.key_count < 2:  # noqa: PLR2004 - a new one and an old one
        raise ConfigurationError(
            "OUTBOX_ENCRYPTION_KEYS: there is no new key to rotate to; put one, made with "
            "`outbox keys generate-encryption-key`, before those that are there: NEW,OLD"
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
        return done

    return with_engine(rotate)


async def _rotate(
    engine: AsyncEngine,
    secrets: SecretBox,
    rotate_some: Callable[[AsyncConnection, SecretBox, int], Awaitable[RotatedChunk]],
    done: Rotation,
    report: Callable[[int], None],
) -> None:
    """Rotate all secrets of one kind, chunk by chunk, and add the results to `done`."""
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
