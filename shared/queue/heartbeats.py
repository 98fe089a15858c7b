"""The newest heartbeat of PostgreSQL that Redis has seen: it shows that PostgreSQL stepped back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from outbox_server.shared.database.engine import from_unix_ms, unix_ms
from outbox_server.shared.queue.connection import client_of
from outbox_server.shared.queue.following import FollowingClient


@dataclass(frozen=True, slots=True, order=True)
class KnownBeat:
    """A heartbeat that PostgreSQL has shown: its number, and its time by PostgreSQL's clock."""

    number: int
    at: datetime


class HeartbeatMemory:
    """Keeps the newest heartbeat of an installation in Redis. It may be lost at any time."""

    def __init__(self, redis: FollowingClient, installation_id: str) -> None:
        self._key = f"outbox:{{{installation_id}}}:heartbeat"
        self._redis = client_of(redis, self._key)

    async def read(self) -> KnownBeat | None:
        """Return the newest heartbeat; None if Redis knows none."""
        text = await self._redis.get(self._key)
        number, _, at = str(text or "").partition(":")
        if not (number.isdecimal() and at.isdecimal()):
            return None
        return KnownBeat(int(number), from_unix_ms(int(at)))

    async def write(self, beat: KnownBeat) -> None:
        """Remember a heartbeat."""
        await self._redis.set(self._key, f"{beat.number}:{unix_ms(beat.at)}")
