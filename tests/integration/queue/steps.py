"""The steps that the model and a real Redis take together; each result is compared."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis

from outbox_server.shared.queue.following import FollowingClient
from outbox_server.shared.queue.keys import JobRef, member_of
from outbox_server.shared.queue.records import Contact, LimitUse, Settlement, brings_history
from outbox_server.shared.queue.user_limits import UserLimit
from outbox_server.shared.states import JobState
from tests.integration.queue.shard import PATIENCE_MS, START_MS, Shard, milliseconds, scores
from tests.integration.queue.under_way import (
    ClaimUnderWay,
    LimitHistory,
    LoadUnderWay,
    Snapshot,
    Step,
)
from tests.integration.queue.user_steps import USERS, WINDOW, UserSteps, after_start
from tests.integration.queue.world import HEAD_SIZE, ModelledInstallation, Send
from tests.integration.queue_model import QueueModel
from tests.integration.queue_state import INFINITY, CircuitModel

LEASE = 3_000
LOW = 2
# The same value as in load_head.lua.
SOON = 100
# The keys of a sender, and its entry in `ready`.
SENDER_KEYS = ("due", "lease", "window", "sender", "ready")
SHARD_KEYS: tuple[str, ...] = ("ready", "generation", "asleep", "rebuild", "life", "parked")
# The second wait of a probe is longer than the lease, the last one longer than a recheck.
BACKOFF = (500, 4_000, 40_000)
AUTH_BACKOFF = (700, 9_000)
BACKOFFS = {Contact.FAILED: BACKOFF, Contact.AUTH_FAILED: AUTH_BACKOFF}
# The circuits that there may be.
CIRCUITS = ("relay", "relay:a", "relay:b", "own", "other")
SHARD_KEYS += tuple(f"{kind}:{key}" for kind in ("circuit", "waiters") for key in CIRCUITS)
SHARD_KEYS += ("parked:a", "parked:b", "turns:a", "turns:b")
# The keys of a user's limiter, and its entry in `ready`.
USER_KEYS = ("lease", "window", "sender", "ready")
# Sorted as texts, their order is reversed.
SENDERS = (9, 10, 11)


class QueueSteps(UserSteps):
    """Senders, dispatchers, PostgreSQL and Redis; the caller chooses the next step."""

    def __init__(self, runner: asyncio.Runner, redis: FollowingClient, raw: Redis) -> None:
        super().__init__()
        self.raw = raw
        self.runner = runner
        window, lease = milliseconds(WINDOW), milliseconds(LEASE)
        backoff = [milliseconds(wait) for wait in BACKOFF]
        auth_backoff = [milliseconds(wait) for wait in AUTH_BACKOFF]
        self.shard = Shard(
            redis, window=window, lease=lease, backoff=backoff, auth_backoff=auth_backoff
        )
        self.queue = self.shard.queue
        self.model = QueueModel(
            window=WINDOW,
            lease=LEASE,
            low=LOW,
            patience=PATIENCE_MS,
            soon=SOON,
        )
        self.world = ModelledInstallation(window=WINDOW, lease=LEASE * 1000)
        self.loads: list[LoadUnderWay] = []
        # Jobs that were committed and are not added yet: the sender, the jobs and their marker.
        self.additions: list[tuple[int, list[tuple[JobRef, int]], int]] = []
        self.holdings: list[ClaimUnderWay] = []
        self.limits = {sender_id: LimitHistory() for sender_id in SENDERS}
        self.broken = False
        self.snapshot = Snapshot()
        self.runs = 0
        # Data was lost, and a recovery has to find it.
        self.lossy = False
        # The lives that dispatchers have begun in this Redis.
        self.names: set[str] = set()

    def do(self, step: Coroutine[Any, Any, None]) -> None:
        self.broken = True
        self.runner.run(step)
        self.broken = False

    async def _outage(
        self, spared: int | None, *, waits: bool, rounds: int, before_mail: bool
    ) -> None:
        """Fail for a while, except for one sender. `waits`: claim before the next probe."""
        for _ in range(rounds):
            await self._claim(3)
            for holding in tuple(self.holdings):
                while holding.step in (Step.CLAIMED, Step.MARKED):
                    await self._advance_claim(holding)
                if holding not in self.holdings:
                    continue
                if holding.claim.sender_id == spared:
                    await self._advance_claim(holding)
                else:
                    await self._advance_claim(
                        holding,
                        use=LimitUse.BEGUN,
                        contact=Contact.FAILED,
                        retry=300,
                        before_mail=before_mail,
                    )
            look = self.model.first_look or 0
            if not waits or look < self.now_ms + BACKOFF[0]:
                await self._advance(look * 1000)

    def _at(self, step: Step) -> list[ClaimUnderWay]:
        return [holding for holding in self.holdings if holding.step is step]

    def _pick(self, step: Step, pick: int) -> ClaimUnderWay:
        choice = self._at(step)
        return choice[pick % len(choice)]

    async def _load(self, sender_id: int, *, committed: bool, waits: bool = False) -> None:
        epochs = await self.queue.begin_load([sender_id], committed=committed)
        epoch = self.model.begin_load(self.now_ms, sender_id, committed=committed)
        assert epochs == {sender_id: epoch}
        head, model = self.world.read_head(sender_id, self.now, fresh=brings_history(epoch))
        markers = [number for number, of in self.world.markers.items() if of == sender_id]
        load = LoadUnderWay(sender_id, epoch, head, model, markers)
        if waits:
            self.loads.append(load)
        else:
            await self._apply(load)

    async def _add(self, sender_id: int, jobs: list[tuple[JobRef, int]], marker: int) -> None:
        """Add committed jobs to the head, or load it if they cannot be added."""
        unknown = await self.queue.add_jobs({sender_id: jobs}, most=HEAD_SIZE)
        members = [(member_of(job), due) for job, due in jobs]
        if self.model.add_jobs(self.now_ms, sender_id, members, HEAD_SIZE):
            assert unknown == []
            self.world.markers.pop(marker, None)
        else:
            assert unknown == [sender_id]
            await self._load(sender_id, committed=True)

    async def _apply(self, load: LoadUnderWay) -> None:
        if load.head.user_limited or any(self.everyone):
            await self._load_user(load.head.user, committed=False)
        again = await self.queue.load_heads([load.head], {load.sender_id: load.epoch})
        applied = self.model.load_head(
            self.now_ms, self.now_up, load.sender_id, load.epoch, load.model
        )
        assert again == ([] if applied else [load.sender_id])
        self._note_user_limits()
        if not applied:
            await self._load(load.sender_id, committed=False)
            return
        for number in load.markers:
            self.world.markers.pop(number, None)
        self.limits[load.sender_id].changes.append((self.now, load.model.limit))

    async def _claim(
        self,
        want: int,
        *,
        waits: bool = False,
        rebuilds: bool = True,
        limits: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        if self._waits_again():
            # A lease is known by the ms of its end. Between two claims of a job that Redis has
            # lost, a load asks PostgreSQL and Redis in turn, so they are not in the same ms.
            await self._advance(self.now + 1000)
        given = [UserLimit(user, first, most) for user, (first, most) in (limits or {}).items()]
        self.queue._user_limits = "{} {}".format(*self.everyone)
        claimed = await self.queue.claim(want, given)
        allowed = {
            key: self._probes_allowed(self.model.circuits.get(key, CircuitModel()))
            for key in CIRCUITS
        }
        claims, loads = self.model.claim(self.now_ms, want, limits, self.everyone)
        self._note_user_limits()
        for user, (_, most) in (limits or {}).items():
            assert sum(USERS[sender_id] == user for sender_id, *_ in claims) <= most
        assert claimed.lost is not self.model.whole
        found = [
            (
                claim.sender_id,
                member_of(claim.job),
                claim.waited // timedelta(milliseconds=1),
                claim.probe,
            )
            for claim in claimed.claims
        ]
        assert (found, list(claimed.loads)) == (claims, loads)
        for key in CIRCUITS:
            through = [s for s, *_ in found if key in self._circuits_of(s)]
            assert len(through) <= allowed[key], "more than one probe at a time"
        look = self.model.first_look
        assert claimed.next_look == (
            None if look is None else milliseconds(max(0, look - self.now_ms))
        )
        for claim in claimed.claims:
            gap = self.model.senders[claim.sender_id].gap
            deadline = claim.lease_ms * 1000
            assert claim.lease_ms == self.now_ms + LEASE
            owner = self.model.owner_of(claim.user)
            user_gap = 0 if owner is None else owner.gap
            self.holdings.append(ClaimUnderWay(claim, self.now, deadline, gap, user_gap))
        for sender_id in loads:
            await self._load(sender_id, committed=False, waits=waits)
        assert claimed.provisional is (self.queue.life not in self.names)
        if rebuilds and (claimed.lost or self.queue.life != self.world.life):
            await self._rebuild()

    def _waits_again(self) -> bool:
        """Whether a job that was claimed in this ms, and is still held, was loaded once more."""
        return any(
            holding.claim.lease_ms == self.now_ms + LEASE
            and member_of(holding.claim.job) in self.model.senders[holding.claim.sender_id].due
            for holding in self.holdings
            if holding.claim.sender_id in self.model.senders
        )

    def _circuits_of(self, sender_id: int) -> tuple[str, ...]:
        endpoint = self.model.senders[sender_id].endpoint
        return (endpoint, "relay") if endpoint.startswith("relay:") else (endpoint,)

    def _probes_allowed(self, c: CircuitModel) -> float:
        """Return how many jobs may be claimed through a circuit."""
        if not c.open:
            return INFINITY
        return 1 if c.turn <= self.now_ms else 0

    async def _mark(
        self, holding: ClaimUnderWay, *, fails: bool = False, waits: bool = False
    ) -> None:
        claim = holding.claim
        unused = Settlement(claim.sender_id, claim.job, LimitUse.UNUSED, lease_ms=claim.lease_ms)
        if fails or claim.life != self.world.life:
            holding.settlement = replace(unused, next_job=claim.job, next_due_ms=claim.due_ms)
        elif not self.world.mark(claim.job, self.now):
            holding.settlement = unused
        else:
            holding.lease_until = self.now + self.world.lease
        if holding.settlement and not waits:
            await self._release(holding)

    async def _confirm(self, holding: ClaimUnderWay, *, waits: bool = False) -> None:
        claim = holding.claim
        (leased,) = await self.queue.confirm([claim])
        assert leased is self.model.confirm(
            self.now_ms, claim.sender_id, member_of(claim.job), claim.lease_ms
        )
        if leased:
            holding.confirmed = True
        else:
            await self._give_back(holding, leased=False, waits=waits)

    async def _begin(self, holding: ClaimUnderWay, *, waits: bool = False) -> None:
        claim = holding.claim
        if self.now >= holding.deadline:
            await self._give_back(holding, waits=waits)
            return
        limit = self.limits[claim.sender_id].highest_since(holding.claimed)
        user_limit = self.user_limits[claim.user].highest_since(holding.claimed)
        holding.send = Send(
            claim.job.job_id, holding.claimed, holding.deadline, holding.gap, holding.user_gap
        )
        self.world.begin_send(claim.sender_id, holding.send, self.now, limit, user_limit)

    async def _give_back(
        self, holding: ClaimUnderWay, *, leased: bool = True, waits: bool = False
    ) -> None:
        claim = holding.claim
        ours = self.world.give_back(claim.job, holding.lease_until) and leased
        holding.settlement = Settlement(
            claim.sender_id,
            claim.job,
            LimitUse.UNUSED,
            next_job=claim.job if ours else None,
            next_due_ms=self.world.jobs[claim.job.job_id].due,
            lease_ms=claim.lease_ms,
        )
        await self._recorded(holding, stale=not ours, waits=waits)

    async def _recorded(self, holding: ClaimUnderWay, *, stale: bool, waits: bool) -> None:
        if stale:
            holding.stale = True
            self.world.mark_stale(holding.claim.sender_id)
        if not waits:
            await self._release(holding)

    async def _end(
        self,
        holding: ClaimUnderWay,
        *,
        use: LimitUse = LimitUse.COUNTED,
        retry: int | None = None,
        age: int = 0,
        contact: Contact = Contact.ACCEPTED,
        before_mail: bool = False,
        cools: int | None = None,
        waits: bool = False,
    ) -> None:
        """With `cools`, its account was refused; the cooldown lasts that many ms."""
        send, claim = holding.send, holding.claim
        assert send is not None
        if use is LimitUse.UNUSED and not holding.known:
            # As in OutcomeRules.given_back: recorded as an attempt, which its number alone fences.
            use, retry, contact, cools = LimitUse.BEGUN, 0, Contact.NONE, None
        if use is LimitUse.UNUSED:
            self.world.sends[claim.sender_id].remove(send)
            await self._give_back(holding, waits=waits)
            return
        # The start of the send is not stored, so its end is no earlier than its claim.
        ended = max(holding.claimed, min(self.now - age, holding.deadline))
        send.ended, send.counted = ended, use is LimitUse.COUNTED
        retry_at = None if retry is None else -(-ended // 1000) + retry
        ours = self.world.settle(claim.job, ended, counted=send.counted, retry_at=retry_at)
        again = JobRef(claim.job.job_id, claim.job.attempt + 1)
        cooldown = self._cool_down(holding, retry, contact, cools) if ours else None
        holding.ended = ended
        holding.settlement = Settlement(
            claim.sender_id,
            claim.job,
            use,
            next_job=again if ours and retry_at is not None else None,
            next_due_ms=retry_at or 0,
            contact=contact,
            connection_error="refused",
            before_mail=before_mail,
            cooldown=cooldown,
        )
        stale = (retry_at is not None and not ours) or cooldown is not None
        await self._recorded(holding, stale=stale, waits=waits)

    def _cool_down(
        self, holding: ClaimUnderWay, retry: int | None, contact: Contact, cools: int | None
    ) -> timedelta | None:
        """Store the begin or end of a cooldown; return the wait until the next probe."""
        sender_id = holding.claim.sender_id
        if cools is not None:
            self.world.cooldowns[sender_id] = self.now + cools * 1000
            return milliseconds(cools)
        if holding.claim.probe and contact is Contact.ACCEPTED and retry is None:
            self.world.cooldowns.pop(sender_id, None)
            return milliseconds(0)
        return None

    async def _release(self, holding: ClaimUnderWay) -> None:
        self.holdings.remove(holding)
        settlement = holding.settlement
        assert settlement is not None
        used = settlement.use is not LimitUse.UNUSED
        age = (self.now - holding.ended) // 1000 if used else 0
        user = holding.claim.user
        reported = replace(settlement, age=milliseconds(age), user=user)
        unknown = await self.queue.settle([reported])
        retry = reported.next_job and (member_of(reported.next_job), reported.next_due_ms)
        cooldown: int | None = None
        if reported.cooldown is not None:
            left = reported.cooldown // timedelta(milliseconds=1)
            cooldown = self.now_up + left if left else 0
        known = self.model.settle(
            self.now_ms,
            self.now_up - age,
            reported.sender_id,
            member_of(reported.job),
            reported.use.value,
            retry=retry,
            user=user,
            lease=reported.lease_ms,
            answered=reported.contact in (Contact.ANSWERED, Contact.ACCEPTED, Contact.TOO_FAST),
            failed=BACKOFFS.get(reported.contact, ()),
            before_mail=reported.before_mail,
            pace=reported.contact.value,
            cooldown=cooldown,
        )
        assert unknown == ([] if known else [reported.sender_id])
        if not known or holding.stale:
            await self._load(reported.sender_id, committed=True)

    async def _save(self) -> None:
        self.snapshot = Snapshot(
            {},
            dict(self.model.ready),
            {user: dict(looks) for user, looks in self.model.parked.items()},
            set(self.model.parked_users),
            {user: dict(turns) for user, turns in self.model.turns.items()},
            self.model.everyone,
        )
        for key in await self.raw.keys(self.shard.prefix + "*"):
            name = os.fsdecode(key)
            value = await self.raw.dump(name)
            if "test:" not in name and value is not None:
                self.snapshot.keys[name] = value, await self.raw.pttl(name)

    async def _restart(self, snapshot: Snapshot) -> None:
        await self.shard.redis.flushall()
        for key, (value, ttl) in snapshot.keys.items():
            await self.raw.restore(key, max(0, ttl), value)
        self.runs += 1
        await self.shard.redis.set(self.shard.prefix + "test:run", f"run{self.runs}")
        # A restart takes longer than the clock resolution that distinguishes two lives.
        await self._advance(self.now + 1000)
        self.model.lose_all(
            snapshot.ready,
            snapshot.parked,
            snapshot.parked_users,
            snapshot.turns,
            snapshot.everyone,
        )
        self._note_user_limits()
        self.lossy = True

    async def _lose(self, sender_id: int, kind: str) -> None:
        self.lossy = True
        if kind == "ready":
            await self.shard.redis.zrem(self.shard.prefix + "ready", sender_id)
            self.model.ready.pop(sender_id, None)
        elif await self.shard.redis.delete(f"{self.shard.prefix}{kind}:{sender_id}"):
            self.model.lose(sender_id)
            await self._advance(self.now + 1000)

    async def _lose_key_of_shard(self, key: str) -> None:
        self.lossy = True
        await self.shard.redis.delete(self.shard.prefix + key)
        if key == "ready":
            # And its guard, so that the next claim notices it.
            self.model.ready.clear()
            self.model.whole = False
        elif key == "parked":
            self.model.parked_users.clear()
        elif key.startswith("parked:"):
            self.model.parked.pop(key.removeprefix("parked:"), None)
        elif key.startswith("turns:"):
            self.model.turns.pop(key.removeprefix("turns:"), None)
        elif key.startswith("circuit:"):
            self.model.circuits.pop(key.removeprefix("circuit:"), None)
        elif (c := self.model.circuits.get(key.removeprefix("waiters:"))) is not None:
            c.waiters.clear()
        elif key == "generation":
            self.model.whole = False
        elif key == "life":
            self.model.lose_all(
                self.model.ready,
                self.model.parked,
                self.model.parked_users,
                self.model.turns,
                (0, 0),
            )
            await self._advance(self.now + 1000)

    async def _rebuild(self) -> None:
        token = await self.queue.begin_rebuild()
        assert token is not None
        await self.queue.read_life()
        if self.queue.life != self.world.life:
            await self._begin_life(token)
        await self._restore_lost()
        assert await self.queue.finish_rebuild(token)
        self.model.whole = True

    async def _begin_life(self, token: str) -> None:
        """Begin the next valid life: everything is loaded again."""
        life = self.world.begin_life()
        self.names.add(life)
        assert await self.queue.begin_life(token, life)
        model = self.model
        model.lose_all(model.ready, model.parked, model.parked_users, model.turns, model.everyone)
        self._note_user_limits()

    async def _restore_lost(self, *, waits: bool = False) -> None:
        """Load the lost senders that have waiting jobs."""
        concerned = {
            job.sender_id
            for state in (JobState.SCHEDULED, JobState.SENDING)
            for job in self.world.in_state(state)
        }
        lost = await self.queue.find_lost(sorted(concerned))
        assert lost == self.model.find_lost(self.now_ms, sorted(concerned))
        firsts = [
            (*min((job.due, job.job_id, job.attempt) for job in waiting), sender_id)
            for sender_id in sorted(concerned)
            if (waiting := list(self.world.in_state(JobState.SCHEDULED, sender_id)))
        ]
        outdated = await self.queue.find_outdated(
            [(s, JobRef(job_id, attempt + 1), due) for due, job_id, attempt, s in firsts]
        )
        assert outdated == self.model.find_outdated(
            (s, member_of(JobRef(job_id, attempt + 1)), due) for due, job_id, attempt, s in firsts
        )
        for sender_id in [*lost, *(s for s in outdated if s not in lost)]:
            await self._load(sender_id, committed=False, waits=waits)

    async def _compare(self) -> None:
        ready = await self.shard.all_ready()
        expected_ready = {str(one): look - START_MS for one, look in self.model.ready.items()}
        assert ready == expected_ready
        known = [s for s in SENDERS if s in self.model.senders]
        for sender_id, found in zip(known, await self.shard.senders(known), strict=True):
            expected = self.model.senders[sender_id]
            assert after_start(expected.due) == found.due
            assert after_start(expected.leases) == found.leases
            oldest = self.shard.now - WINDOW
            assert after_start(expected.entries, oldest) == after_start(
                found.window, oldest, start=0
            )
            assert found.settings["epoch"] == str(expected.epoch)
            assert found.settings["end"] == str(expected.last_end)
            assert float(found.settings["horizon"]) == expected.horizon
            assert found.settings_expire is expected.idle
            if found.window:
                assert found.window_expires is expected.idle
            assert int(found.settings.get("troubles", 0)) == expected.troubles
            assert ("open" in found.settings) is expected.open
            assert int(found.settings.get("probe", 0)) == expected.probe
            assert int(found.settings.get("cool", 0)) == expected.cool
            assert int(found.settings.get("pace", 0)) == expected.pace
            assert found.settings["user"] == expected.user
            assert found.settings["limited"] == str(int(expected.user_limited))
        await self._compare_users()
        for user in set(USERS.values()):
            parked = await scores(self.shard.redis, f"{self.shard.prefix}parked:{user}")
            expected_looks = self.model.parked.get(user, {})
            assert parked == {str(one): look for one, look in expected_looks.items()}
        await self._compare_circuits()

    async def _compare_circuits(self) -> None:
        async with self.shard.redis.pipeline(transaction=False) as pipeline:
            pipeline.get(self.shard.prefix + "test:run")
            pipeline.hgetall(self.shard.prefix + "life")
            for endpoint in CIRCUITS:
                pipeline.hgetall(f"{self.shard.prefix}circuit:{endpoint}")
            run, life, *circuits = await pipeline.execute()
        for endpoint, found in zip(CIRCUITS, circuits, strict=True):
            c = self.model.circuits.get(endpoint, CircuitModel())
            present = (life.get("replication"), life.get("id"))
            this_life = (run or "first", found.get("life")) == present
            known = found if this_life else {}
            assert int(known.get("failures", 0)) == c.failures
            assert ("open" in known) is c.open
            assert int(known.get("next", 0)) == c.next
            assert int(known.get("until", 0)) == c.busy_until
            if c.open:
                assert await self.shard.waiters(endpoint) == after_start(c.waiters)
        reported = [(change.opened, change.sender_id) for change in self.shard.changes]
        assert reported == self.model.changes

    async def _drain(self) -> None:
        """Continue like a working dispatcher until all waiting mail is sent."""
        while self.loads:
            await self._apply(self.loads.pop())
        while self.user_loads:
            await self._apply_user(self.user_loads.pop())
        for sender_id, row in self.world.senders.items():
            if not row.active:
                row.active = True
                await self._load(sender_id, committed=True)
        if self.lossy:
            await self._restore_lost()
        for _ in range(100 + 10 * len(self.world.jobs)):
            for sender_id in sorted({*self.world.markers.values(), *self.world.recover(self.now)}):
                await self._load(sender_id, committed=True)
            await self._claim(5)
            while self.holdings:
                await self._advance_claim(self.holdings[0])
            leases = [job.lease_until // 1000 for job in self.world.in_state(JobState.SENDING)]
            if not leases and not any(self.world.in_state(JobState.SCHEDULED)):
                return
            looks = [*leases, *self.model.ready.values()]
            assert looks, "jobs wait, and nobody will ever look"
            await self._advance((min(looks) + bool(leases)) * 1000)
        raise AssertionError("jobs wait, and looking does not help")

    async def _advance_claim(self, holding: ClaimUnderWay, **how: Any) -> None:
        """Take the next step; `how` is the end of a send."""
        if holding.step is Step.BEGUN:
            await self._end(holding, **how)
            return
        steps = {
            Step.CLAIMED: self._mark,
            Step.MARKED: self._confirm,
            Step.CONFIRMED: self._begin,
            Step.RECORDED: self._release,
        }
        await steps[holding.step](holding)
