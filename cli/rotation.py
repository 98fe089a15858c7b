"""`outbox keys rotate-encryption`: what it does, with its progress on stderr."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from cli.database import with_engine
from cli.progress import JobProgress
from shared.errors import ConfigurationError
from shared.password_rotation import count_passwords, rotate_chunk
from shared.secrets import SecretBox
from shared.settings import load_settings

_TITLE: Final = "SMTP passwords"


@dataclass(slots=True)
class Rotation:
    """How far it came."""

    rotated: int = 0
    # Under the newest key before.
    current: int = 0
    unreadable: list[int] = field(default_factory=list)


def rotate_all() -> Rotation:
    """Rotate every stored password.

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
            total = await count_passwords(connection)
        looked_at, after = 0, 0
        with JobProgress({_TITLE: total}) as progress:
            while True:
                async with engine.begin() as connection:
                    chunk = await rotate_chunk(connection, secrets, after)
                if chunk.last_id is None:
                    return done
                after = chunk.last_id
                looked_at += chunk.looked_at
                done.rotated += chunk.rotated
                done.unreadable += chunk.unreadable
                done.current += chunk.looked_at - chunk.rotated - len(chunk.unreadable)
                progress.update(_TITLE, looked_at)

    return with_engine(rotate)
