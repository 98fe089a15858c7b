"""One shard on a real Redis with a fixed clock, and a view of its contents."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis

from outbox_server.shared.queue.circuit_keys import RELAY
from outbox_server.shared.queue.circuits import CircuitChange
from outbox_server.shared.queue.connection import connect
from outbox_server.shared.queue.following import FollowingClient
from outbox_server.shared.queue.keys import JobRef, member_of
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import (
    Claim,
    Claimed,
    Contact,
    Head,
    LimitUse,
    Settlement,
    UserHead,
)
from outbox_server.shared.queue.user_limits import UserLimit
from outbox_server.shared.settings import load_settings

WINDOW = timedelta(hours=1)
LEASE = timedelta(seconds=60)
WINDOW_MS = 3_600_000
LEASE_MS = 60_000
PATIENCE_MS = 5_000
BACKOFF = (timedelta(seconds=5), timedelta(seconds=25), timedelta(seconds=125))
AUTH_BACKOFF = (timedelta(seconds=7), timedelta(minutes=10), timedelta(hours=1))
START_MS = 1_800_000_000_000

# Replaces includes/time.lua and rounds the same way. The time is in us, so that a test can end a
# send within a millisecond.
CLOCK = """
local time = tonumber(redis.call('GET', prefix .. 'test:now'))
local NOW = math.floor(time / 1000)
local NOW_UP = math.ceil(time / 1000)
"""
# Replaces includes/run.lua.
RUN = "local RUN = redis.call('GET', prefix .. 'test:run') or 'first'\n"
# The sender of most tests; each test replaces the fields that matter to it.
SENDER = Head(
    sender_id=7,
    hourly_limit=100,
    gap=timedelta(seconds=2),
    max_in_flight=5,
    active=True,
    jobs=(),
    more=False,
)


def milliseconds(number: float) -> timedelta:
    return timedelta(milliseconds=number)


def jobs(*pairs: tuple[int, int], attempt: int = 1) -> tuple[tuple[JobRef, int], ...]:
    """Return jobs of a head from pairs of (id, ms after START)."""
    return tuple((JobRef(job_id, attempt), START_MS + due) for job_id, due in pairs)


def members(*ids: int, attempt: int = 1) -> list[str]:
    return [member_of(JobRef(job_id, attempt)) for job_id in ids]


async def scores(redis: Redis, key: str) -> dict[str, int]:
    """Return a sorted set in its order; every score of Outbox is a whole number of ms.

    The guard of `ready` (whole.lua) is left out.
    """
    found: Any = await redis.zrange(key, 0, -1, withscores=True)
    return {member: int(score) for member, score in found if member != "guard"}


@dataclass(frozen=True)
class StoredSender:
    """Everything that Redis holds about one sender."""

    due: dict[str, int]
    leases: dict[str, int]
    window: dict[str, int]
    settings: dict[str, str]
    # Whether the key exists and has a time to live.
    settings_expire: bool
    window_expires: bool


def connect_to(url: str) -> FollowingClient:
    """Return a client with the same options as that of a service."""
    return connect(load_settings(redis_url=url))


class Shard:
    """A queue, the clock that its scripts read, and a view of its keys."""

    def __init__(
        self,
        redis: FollowingClient,
        number: int = 0,
        *,
        window: timedelta = WINDOW,
        lease: timedelta = LEASE,
        backoff: Sequence[timedelta] = BACKOFF,
        auth_backoff: Sequence[timedelta] = AUTH_BACKOFF,
    ) -> None:
        self.redis = redis
        # Changes of circuits, in the order of their reports.
        self.changes: list[CircuitChange] = []
        self.queue = Queue(
            redis,
            number,
            window=window,
            lease=lease,
            backoff=backoff,
            auth_backoff=auth_backoff,
            chance=lambda: 0.0,
            includes={"time": CLOCK, "run": RUN},
            on_change=self.changes.append,
        )
        self.prefix = f"outbox:{{{number}}}:"
        self.now_us = START_MS * 1000

    @property
    def now(self) -> int:
        """The time in whole ms after START."""
        return self.now_us // 1000 - START_MS

    async def at(self, ms_after_start: float) -> None:
        """Set the clock."""
        self.now_us = START_MS * 1000 + round(ms_after_start * 1000)
        await self.redis.set(self.prefix + "test:now", self.now_us)

    async def whole(self) -> None:
        """Begin a life and mark the shard as complete, as a rebuild does."""
        token = await self.queue.begin_rebuild()
        assert token is not None
        assert await self.queue.begin_life(token, secrets.token_hex(4))
        assert await self.queue.finish_rebuild(token)

    async def load(self, *heads: Head, committed: bool = False) -> None:
        """Load heads that no other load is loading."""
        epochs = await self.queue.begin_load([h.sender_id for h in heads], committed=committed)
        assert await self.queue.load_heads(heads, epochs) == []

    async def claim(self, want: int = 100, *limits: UserLimit) -> Claimed:
        claimed = await self.queue.claim(want, limits)
        assert not claimed.lost
        return claimed

    async def claimed(self, want: int = 100, *limits: UserLimit) -> list[int]:
        """Claim; return the ids of the claimed jobs."""
        return [claim.job.job_id for claim in (await self.claim(want, *limits)).claims]

    async def settle(
        self,
        claim: Claim,
        use: LimitUse = LimitUse.COUNTED,
        *,
        age: float = 0,
        retry_at: int | None = None,
        give_back: bool = False,
        answered: bool = False,
        connection_error: str | None = None,
        contact: Contact | None = None,
        before_mail: bool = False,
        cooldown: timedelta | None = None,
    ) -> list[int]:
        """Settle one claim; its job is due again at `retry_at`, in ms after START."""
        if contact is None:
            contact = Contact.ANSWERED if answered else Contact.NONE
            contact = contact if connection_error is None else Contact.FAILED
        settlement = Settlement(
            claim.sender_id,
            claim.job,
            use,
            age=milliseconds(age),
            lease_ms=claim.lease_ms,
            contact=contact,
            connection_error=connection_error or "",
            before_mail=before_mail,
            cooldown=cooldown,
            user=claim.user,
            server=f"mail.example:{claim.sender_id}",
        )
        if retry_at is not None:
            attempt = claim.job.attempt + (not give_back)
            settlement = replace(
                settlement,
                next_job=JobRef(claim.job.job_id, attempt),
                next_due_ms=START_MS + retry_at,
            )
        return await self.queue.settle([settlement])

    async def renew(self, *claims: Claim) -> list[int | None]:
        """Renew leases; return their new ends in ms after START."""
        ends = await self.queue.renew(
            [(claim.sender_id, claim.job, claim.user) for claim in claims]
        )
        return [end and end - START_MS for end in ends]

    async def ready(self) -> dict[int, int]:
        """The time of each sender's next look, in ms after START."""
        found = await scores(self.redis, self.prefix + "ready")
        return {
            int(sender): look - START_MS
            for sender, look in found.items()
            if not sender.startswith("u:")
        }

    async def all_ready(self) -> dict[str, int]:
        """The same, with the limiters of users, as `u:` and the key of the user."""
        found = await scores(self.redis, self.prefix + "ready")
        return {one: look - START_MS for one, look in found.items()}

    async def load_user(self, head: UserHead, *, committed: bool = True) -> None:
        """Load the limits of a user, which no other load is loading."""
        epochs = await self.queue.begin_user_loads([head.user], committed=committed)
        assert await self.queue.load_users([head], epochs) == []

    async def waiters(self, endpoint: str = RELAY) -> dict[int, int]:
        """The start of each sender's wait for an endpoint's circuit, in ms after START."""
        found = await scores(self.redis, f"{self.prefix}waiters:{endpoint}")
        return {int(sender): at - START_MS for sender, at in found.items()}

    async def circuit(self, endpoint: str = RELAY) -> dict[str, str]:
        """The state of an endpoint's circuit."""
        found: Any = await self.redis.hgetall(f"{self.prefix}circuit:{endpoint}")
        return dict(found)

    async def sender(self, sender_id: int | str = SENDER.sender_id) -> StoredSender:
        (state,) = await self.senders([sender_id])
        return state

    async def senders(self, sender_ids: Iterable[int | str]) -> list[StoredSender]:
        """Return everything that Redis holds about these senders; times are in ms after START."""
        ids = list(sender_ids)
        async with self.redis.pipeline(transaction=False) as pipeline:
            for sender_id in ids:
                for kind in ("due", "lease", "window"):
                    key = f"{self.prefix}{kind}:{sender_id}"
                    pipeline.zrange(key, 0, -1, withscores=True)
                pipeline.hgetall(f"{self.prefix}sender:{sender_id}")
                pipeline.pttl(f"{self.prefix}sender:{sender_id}")
                pipeline.pttl(f"{self.prefix}window:{sender_id}")
            answers = await pipeline.execute()
        return [_state(answers[i : i + 6]) for i in range(0, len(answers), 6)]


def _state(answers: Sequence[Any]) -> StoredSender:
    due, leases, window, settings, settings_ttl, window_ttl = answers
    return StoredSender(
        _after_start(due),
        _after_start(leases),
        _after_start(window),
        settings,
        settings_ttl > 0,
        window_ttl > 0,
    )


def _after_start(pairs: Sequence[tuple[str, float]]) -> dict[str, int]:
    return {member: int(time) - START_MS for member, time in pairs}
