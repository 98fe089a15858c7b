"""The queue: one method per Lua script, with the result as a frozen dataclass."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from redis.commands.core import AsyncScript
from redis.exceptions import OutOfMemoryError

from outbox_server.shared.queue.arguments import (
    due_arg,
    head_arg,
    load_cost,
    ms,
    pack,
    settlement_arg,
    user_arg,
)
from outbox_server.shared.queue.circuits import Circuit, CircuitChange, log_change
from outbox_server.shared.queue.clock_difference import ClockDifference
from outbox_server.shared.queue.following import FollowingClient
from outbox_server.shared.queue.keys import JobRef, ShardKeys, job_of, member_of
from outbox_server.shared.queue.limiter_state import LimiterState, limiter_state_of
from outbox_server.shared.queue.parts import parts_by_cost
from outbox_server.shared.queue.records import (
    Claim,
    Claimed,
    Head,
    ReadyJobs,
    RebuildEnd,
    Settlement,
    UpcomingJobs,
    UserHead,
)
from outbox_server.shared.queue.scripts import SCRIPTS, read_script
from outbox_server.shared.queue.user_limits import NO_USER_LIMITS, UserLimit, UserSendLimits

# The maximum number of jobs in a sender's head. Redis stores a sorted set of up to 128 members as a
# compact listpack, here with 33 bytes per job: the heads of 1,000 senders take less than 4 MB.
HEAD_SIZE = 112
# A head with fewer jobs is loaded again while the rest of it is being sent.
LOW_WATER = 32
_LOAD_PATIENCE = timedelta(seconds=5)
# The waits before the probes of an open circuit if the operator's backoff is empty.
DEFAULT_BACKOFF = (timedelta(seconds=5), timedelta(seconds=25), timedelta(seconds=125))
# The largest share of a wait that is added to it at random.
_JITTER = 0.1
# The number of senders whose jobs `count_ready_jobs` counts, in about 10 us each.
_MOST_EXAMINED = 200
# How long one script of a load may block Redis, in us. A longer history is loaded by itself.
_LONGEST_LOAD = 2_000
# The lock of a rebuild lasts this long. One part must take less. After a crash, no rebuild starts
# before its end.
_REBUILD_LOCK = timedelta(seconds=10)


class QueueFullError(OutOfMemoryError):
    """Redis is out of memory: known senders continue, and new ones must wait."""


def is_provisional(life: str) -> bool:
    """Whether a life was begun by Redis alone, and PostgreSQL has no name for it (life.lua)."""
    return ":" in life


class Queue:
    """One shard of the queue.

    Raises redis-py's errors when Redis is unreachable. Nothing is retried here, because a retried
    claim could take jobs twice.
    """

    def __init__(
        self,
        redis: FollowingClient,
        shard: int,
        *,
        window: timedelta,
        lease: timedelta,
        backoff: Sequence[timedelta] = DEFAULT_BACKOFF,
        auth_backoff: Sequence[timedelta] = (),
        user_limits: UserSendLimits = NO_USER_LIMITS,
        key_space: str = "",
        chance: Callable[[], float] = random.random,
        includes: Mapping[str, str] | None = None,
        on_change: Callable[[CircuitChange], None] = log_change,
    ) -> None:
        """Set up one shard.

        `backoff` has the waits before the probes of an open circuit, `auth_backoff` the waits after
        failed authentications. `user_limits` are those of users without limits of their own.
        `key_space` is that of `ShardKeys`. `on_change` is called for each circuit that a call of
        this object opens or closes.
        """
        self.keys = ShardKeys(shard, key_space)
        self.key_space = key_space
        self.shard = shard
        self.redis = redis
        self._window = ms(window)
        self._lease = ms(lease)
        self._backoff = tuple(backoff) or DEFAULT_BACKOFF
        self._auth_backoff = tuple(auth_backoff) or self._backoff
        self._user_limits = f"{user_limits.hourly_limit} {ms(user_limits.gap)}"
        self._chance = chance
        self._on_change = on_change
        # The life that the last claim, load or `read_life` found. Empty before the first.
        self.life = ""
        # By how much Redis' clock is ahead of PostgreSQL's.
        self._ahead = ClockDifference()
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(read_script(name, includes)) for name in SCRIPTS
        }

    async def _run(
        self, name: str, keys: Sequence[str], args: Sequence[Any], *, urgent: bool = False
    ) -> Any:
        return await self.redis.scripts.run(self._scripts[name], keys, args, urgent=urgent)

    async def claim(self, want: int, limits: Sequence[UserLimit] = ()) -> Claimed:
        """Claim up to `want` jobs that may be sent now, each leased for one lease time."""
        by_user = {limit.user: (limit.first, limit.most) for limit in limits}
        answer = await self._run(
            "claim",
            (self.keys.ready, self.keys.generation),
            (
                want,
                self._lease,
                self._window,
                LOW_WATER,
                ms(_LOAD_PATIENCE),
                pack(by_user) if by_user else "",
                self._user_limits,
                self._ahead.ms(),
            ),
        )
        state, look, claims, loads, parked, life = answer
        self._found(life)
        return Claimed(
            lost=state == "LOST",
            claims=tuple(
                Claim(
                    int(claims[i]),
                    job_of(claims[i + 1]),
                    timedelta(milliseconds=claims[i + 2]),
                    claims[i + 3],
                    claims[i + 4],
                    claims[i + 5] == 1,
                    claims[i + 6],
                    claims[i + 7],
                    self.life,
                )
                for i in range(0, len(claims), 8)
            ),
            loads=tuple(int(sender) for sender in loads),
            parked=parked == 1,
            next_look=None if look < 0 else timedelta(milliseconds=look),
            provisional=is_provisional(self.life),
        )

    async def confirm(self, claims: Sequence[Claim]) -> list[bool]:
        """Return for each claim whether its lease still exists (confirm.lua describes the race).

        Mails wait for the reply, so it does not wait for the claims and settlements of this moment.
        """
        args: list[Any] = [self._window]
        for claim in claims:
            args += (claim.sender_id, member_of(claim.job), claim.lease_ms)
        held = await self._run("confirm", (self.keys.ready,), args, urgent=True)
        return [holds == 1 for holds in held]

    async def renew(self, claims: Sequence[tuple[int, JobRef, str]]) -> list[int | None]:
        """Renew the leases of these (sender, job, key of the user): each ends a lease from now.

        Returns the new end of each, in Unix ms of Redis' clock. None means that the lease does not
        exist any more, or that Redis does not know the sender.
        """
        args: list[Any] = [self._window, self._lease]
        for sender_id, job, user in claims:
            args += (sender_id, member_of(job), user)
        return [end or None for end in await self._run("renew", (self.keys.ready,), args)]

    async def settle(self, settlements: Sequence[Settlement]) -> list[int]:
        """End claims. Returns the senders that Redis does not know: load their heads."""
        stretch = 1 + _JITTER * self._chance()
        args: list[Any] = [self._window]
        args += (
            ",".join(str(ms(wait * stretch)) for wait in backoff)
            for backoff in (self._backoff, self._auth_backoff)
        )
        args += map(settlement_arg, settlements)
        unknown, changes = await self._run("settle", (self.keys.ready,), args)
        for *change, place in changes:
            self._report(change, settlements[place].server, settlements[place].smtp_code)
        return [int(sender) for sender in unknown]

    def _report(
        self, change: Sequence[Any], server: str = "", smtp_code: int | None = None
    ) -> None:
        what, sender, since, reason = change
        self._on_change(
            CircuitChange(
                what == "opened",
                int(sender) if sender else None,
                int(since),
                reason,
                server,
                smtp_code,
            )
        )

    async def circuits_of_sender(self, sender_id: int) -> tuple[Circuit, ...]:
        """Return the open circuits that delay this sender: its own and its endpoint's."""
        (found,) = await self._circuits([("sender", str(sender_id))])
        return found

    async def circuits_of_endpoints(self, endpoints: Sequence[str]) -> dict[str, Circuit]:
        """Return the open circuits of these endpoints.

        If all failures of an endpoint belong to one sender, it is that sender's circuit.
        """
        found = await self._circuits([("endpoint", endpoint) for endpoint in endpoints])
        return {
            endpoint: circuits[0]
            for endpoint, circuits in zip(endpoints, found, strict=True)
            if circuits
        }

    async def _circuits(self, queries: Sequence[tuple[str, str]]) -> list[tuple[Circuit, ...]]:
        answers = await self._run(
            "circuits", (self.keys.ready,), [word for query in queries for word in query]
        )
        return [
            tuple(
                Circuit(int(sender) if sender else None, int(since), int(next_probe), reason)
                for sender, since, next_probe, reason in answer
            )
            for answer in answers
        ]

    async def begin_load(self, sender_ids: Sequence[int], *, committed: bool) -> dict[int, str]:
        """Return the epoch of each sender (see `brings_history`).

        `committed` means that the caller has just committed something that the load must see, so a
        load in progress, which may have read too early, is refused. A sender for which Redis has no
        memory is missing from the result.
        """
        args = (int(committed), *sender_ids)
        life, *epochs = await self._run("begin_load", (self.keys.ready,), args)
        self._found(life)
        return {each: epoch for each, epoch in zip(sender_ids, epochs, strict=True) if epoch}

    async def load_heads(self, heads: Sequence[Head], epochs: Mapping[int, str]) -> list[int]:
        """Apply heads that were read after `begin_load`. Returns the senders to read again."""
        again: list[int] = []
        async with self.redis.pipeline(transaction=False) as pipeline:
            for part in parts_by_cost(heads, load_cost, most=_LONGEST_LOAD):
                args: list[Any] = [self._window]
                for head in part:
                    args += (epochs[head.sender_id], head_arg(head))
                await self._scripts["load_head"](keys=[self.keys.ready], args=args, client=pipeline)
                # Other tasks run between two parts, each of which takes some ms.
                await asyncio.sleep(0)
            answers = await pipeline.execute() if heads else []
        for refused, changes in answers:
            again += map(int, refused)
            for change in changes:
                self._report(change)
        return again

    async def add_jobs(
        self, new: Mapping[int, Iterable[tuple[JobRef, int]]], *, most: int = HEAD_SIZE
    ) -> list[int]:
        """Add committed jobs, each with its due time in Unix ms, to the heads of senders.

        A head keeps its first `most` jobs. Returns the senders whose heads must be loaded instead,
        such as those that Redis does not know (see add_jobs.lua).
        """
        args: list[Any] = [self._window, most]
        for sender_id, jobs in new.items():
            args += (sender_id, due_arg(jobs))
        life, *unknown = await self._run("add_jobs", (self.keys.ready,), args)
        self._found(life)
        return list(map(int, unknown))

    async def begin_user_loads(self, users: Sequence[str], *, committed: bool) -> dict[str, str]:
        """Return the epoch of the limiter of each user; `begin_load` describes the rest.

        A sender of a user whose limiter Redis does not know may not send before `load_users`.
        """
        ids = [f"u:{user}" for user in users]
        args = (int(committed), *ids)
        life, *epochs = await self._run("begin_load", (self.keys.ready,), args)
        self._found(life)
        return {user: epoch for user, epoch in zip(users, epochs, strict=True) if epoch}

    async def load_users(self, heads: Sequence[UserHead], epochs: Mapping[str, str]) -> list[str]:
        """Apply limits that were read after `begin_user_loads`. Returns the users to read again."""
        again = []
        for head in heads:
            args = (self._window, epochs[head.user], user_arg(head))
            if not await self._run("load_user", (self.keys.ready,), args):
                again.append(head.user)
        return again

    async def forget_senders(self, sender_ids: Sequence[int]) -> int:
        """Remove senders that belong to another shard. Returns how many of them were known."""
        return int(await self._run("forget", (self.keys.ready,), sender_ids))

    async def forget_user(self, user: str) -> None:
        """Remove the limiter of a user: the next load restores it with its history."""
        await self._run("forget", (self.keys.ready,), (f"u:{user}",))

    async def read_limiter(self, sender_id: int, job: JobRef | None = None) -> LimiterState | None:
        """Return the state of a sender's limiter; None if Redis does not know the sender.

        `job` is one of its jobs: the attempt that comes next.
        """
        args = (self._window, sender_id, "" if job is None else member_of(job))
        found = await self._run("limiter", (self.keys.ready,), args)
        if found is None:
            return None
        return limiter_state_of(found, self._lease)

    async def count_ready_jobs(self) -> ReadyJobs:
        """Count the jobs that may be sent now, in one call for the shard."""
        keys = (self.keys.ready, self.keys.generation)
        state, count, age = await self._run("backlog", keys, (self._window, _MOST_EXAMINED))
        return ReadyJobs(state != "LOST", count, timedelta(milliseconds=age))

    async def find_upcoming(
        self, within: timedelta, most: int, last: UpcomingJobs | None = None
    ) -> UpcomingJobs:
        """Return jobs that may be sent `within` this time, of at most `most` senders.

        It goes on where `last` ended.
        """
        after, skip = (0, 0) if last is None else (last.after, last.skip)
        args = (after, skip, ms(within), most)
        after, skip, more, members = await self._run("upcoming", (self.keys.ready,), args)
        return UpcomingJobs(
            tuple(job_of(member).job_id for member in members), more == 1, after, skip
        )

    async def find_lost(self, sender_ids: Sequence[int], *, whole: bool = False) -> list[int]:
        """Return which of these senders, all with waiting jobs, must be loaded.

        With `whole`, it returns none while the shard is incomplete, because a rebuild loads them.
        """
        args = (self._window, int(whole), *sender_ids)
        keys = (self.keys.ready, self.keys.generation)
        return [int(lost) for lost in await self._run("find_lost", keys, args)]

    async def find_outdated(self, firsts: Sequence[tuple[int, JobRef, int]]) -> list[int]:
        """Return the known senders that must be loaded, because Redis lacks their first job.

        `firsts` has senders, each with its first waiting job in PostgreSQL (the next attempt) and
        when that is due (Unix ms).
        """
        args = [word for one, job, due_ms in firsts for word in (one, member_of(job), due_ms)]
        found = await self._run("find_outdated", (self.keys.ready,), args)
        return [int(sender) for sender in found]

    async def check_serving(self) -> None:
        """Check that the server executes all that the scripts need, and leave nothing there.

        Raises:
            redis.exceptions.RedisError, OSError: it does not.
        """
        await self._run("serves", (self.keys.ready, self.keys.health), ())

    async def read_life(self) -> int:
        """Read the life of the shard into `life`. Returns Redis' time, in Unix ms."""
        life, now_ms = await self._run("read_life", (self.keys.ready,), ())
        self._found(life)
        return int(now_ms)

    async def begin_life(self, token: str, life: str) -> bool:
        """Begin a new life, within a rebuild; False if Redis or the lock was lost."""
        args = (token, life, ms(_REBUILD_LOCK))
        begun = await self._run("begin_life", (self.keys.ready, self.keys.rebuild), args)
        if begun:
            self.life = life
        return bool(begun)

    def _found(self, life: str) -> None:
        if life != self.life:
            self.life = life
            # The life may have begun because the clock stepped back.
            self._ahead = ClockDifference()

    def learn_clocks(self, redis_ms: int, postgres_ms: int) -> None:
        """Note a time of Redis' clock, and then one of PostgreSQL's. Claims use the difference."""
        self._ahead.learn(redis_ms - postgres_ms)

    async def leave_server(self) -> None:
        """Let the next calls use new connections, which may lead to another server."""
        await self.redis.leave_server()

    async def begin_rebuild(self) -> str | None:
        """Take the lock of a rebuild and return its token. None: another rebuild is running."""
        token = secrets.token_hex(8)
        keys = (self.keys.ready, self.keys.generation, self.keys.rebuild)
        taken = await self._run("begin_rebuild", keys, (token, ms(_REBUILD_LOCK)))
        return token if taken else None

    async def keep_rebuild(self, token: str) -> bool:
        """Extend the lock for the next part; False if Redis or the lock was lost."""
        args = (token, ms(_REBUILD_LOCK))
        return bool(await self._run("keep_rebuild", (self.keys.ready, self.keys.rebuild), args))

    async def give_up_rebuild(self, token: str) -> None:
        """Release the lock of a rebuild that failed, if it still has the lock."""
        await self._run("keep_rebuild", (self.keys.ready, self.keys.rebuild), (token, 0))

    async def finish_rebuild(self, token: str) -> RebuildEnd:
        """Mark the shard as completely loaded, unless Redis was lost again meanwhile."""
        keys = (self.keys.ready, self.keys.generation, self.keys.rebuild)
        return RebuildEnd(await self._run("finish_rebuild", keys, (token,)))

    async def begin_patrol(self, pause: timedelta) -> int | None:
        """Return the last sender before the next part of a patrol, which the caller does.

        None means that a process began a part less than `pause` ago.
        """
        last = await self._run("begin_patrol", (self.keys.ready,), (ms(pause),))
        return None if last is None else int(last)

    async def end_patrol(self, last_sender: int) -> None:
        """Store the last sender of a part, or 0 after the last part."""
        await self._run("end_patrol", (self.keys.ready,), (last_sender,))
