"""The Lua scripts decide as the model does, and what they decide keeps the promises.

Random senders, limits, gaps, times; dispatchers that are stopped or die anywhere; loads that are
overtaken; losses of Redis, of some of its keys, and starts with an old snapshot. After every step
Redis holds what the model holds, and every send that begins is held against what was really sent
before. At the end everything that waits gets sent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum, auto
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

import shared.queue.queue
from shared.queue.keys import JobRef, member_of
from shared.queue.queue import Claim, Head, Settlement, SlotUse, brings_history
from shared.states import JobState
from tests.integration.queue.shard import PATIENCE_MS, START_MS, Shard, milliseconds
from tests.integration.queue.world import Send, SenderRow, World
from tests.integration.queue_model import INFINITY, CircuitModel, HeadModel, QueueModel

WINDOW = 10_000
LEASE = 3_000
LOW = 2
# load_head.lua
SOON = 100
# The keys of a sender, and its entry in `ready`.
PARTS = ("due", "lease", "window", "sender", "ready")
SHARD_KEYS = ("ready", "generation", "asleep", "rebuild", "life", "circuit:relay", "held:relay")
# The second wait of a probe is longer than the lease, the last one longer than a patrol.
LADDER = (500, 4_000, 40_000)
ENDPOINTS = ("relay", "other")
# As texts they sort the other way round.
SENDERS = (9, 10, 11)

senders = st.sampled_from(SENDERS)
# Which of several: taken modulo their number.
picks = st.integers(0, 7)
chances = st.booleans()
rows = st.builds(
    SenderRow,
    limit=st.sampled_from([1, 2, 3, 9]),
    gap=st.sampled_from([0, 0, 70, 900]),
    flight=st.integers(1, 6),
    active=st.sampled_from([True, True, True, False]),
    endpoint=st.sampled_from(ENDPOINTS[:1] * 4 + ENDPOINTS[1:]),
)


class Contact(Enum):
    """What a send says of its endpoint."""

    ANSWERED = auto()
    FAILED = auto()
    SILENT = auto()


class Step(Enum):
    """How far a dispatcher has come with a claim."""

    CLAIMED = auto()
    MARKED = auto()
    CONFIRMED = auto()
    BEGUN = auto()
    RECORDED = auto()


contacts = st.sampled_from([Contact.FAILED] * 5 + [Contact.ANSWERED, Contact.SILENT])


@dataclass
class Load:
    """A load under way: PostgreSQL was read, Redis is not yet told."""

    sender_id: int
    epoch: str
    head: Head
    model: HeadModel
    markers: list[int]


@dataclass
class Holding:
    """A claim in the hands of a dispatcher."""

    claim: Claim
    claimed: int
    deadline: int
    gap: int
    # PostgreSQL's, once it is marked there.
    lease_until: int = 0
    # Redis said that it still has the lease.
    confirmed: bool = False
    send: Send | None = None
    # What Redis is to be told, once it is over; and when it ended.
    settlement: Settlement | None = None
    ended: int = 0
    # PostgreSQL alone knows where the job waits now.
    stale: bool = False

    @property
    def step(self) -> Step:
        """The last step that was taken."""
        if self.settlement:
            return Step.RECORDED
        if self.send:
            return Step.BEGUN
        if self.confirmed:
            return Step.CONFIRMED
        return Step.MARKED if self.lease_until else Step.CLAIMED


@dataclass
class Limits:
    """When which limit came into force, of one sender."""

    changes: list[tuple[int, int]] = field(default_factory=list)

    def highest_since(self, time: int) -> int:
        before = [limit for at, limit in self.changes if at < time][-1:]
        return max(before + [limit for at, limit in self.changes if at >= time])


@dataclass
class Snapshot:
    """All keys as they were, with their ms to live; and the model's `ready`."""

    keys: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)


class QueueMachine(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, redis: Redis, raw: Redis) -> None:
        super().__init__()
        self.raw = raw
        self.runner = runner
        window, lease = milliseconds(WINDOW), milliseconds(LEASE)
        ladder = [milliseconds(wait) for wait in LADDER]
        self.shard = Shard(redis, window=window, lease=lease, ladder=ladder)
        self.queue = self.shard.queue
        self.model = QueueModel(
            window=WINDOW,
            lease=LEASE,
            low=LOW,
            patience=PATIENCE_MS,
            soon=SOON,
            ladder=LADDER,
        )
        self.world = World(window=WINDOW, lease=LEASE * 1000)
        self.loads: list[Load] = []
        self.holdings: list[Holding] = []
        self.limits = {sender_id: Limits() for sender_id in SENDERS}
        self.broken = False
        self.snapshot = Snapshot()
        self.runs = 0
        # Something was lost that a sweep has to find.
        self.lossy = False

    def do(self, step: Coroutine[Any, Any, None]) -> None:
        self.broken = True
        self.runner.run(step)
        self.broken = False

    @property
    def now(self) -> int:
        return self.shard.now_us

    @property
    def now_ms(self) -> int:
        return self.now // 1000

    @property
    def now_up(self) -> int:
        return -(-self.now // 1000)

    # Steps -----------------------------------------------------------------------------------

    @initialize(these=st.tuples(*(rows for _ in SENDERS)))
    def start(self, these: tuple[SenderRow, ...]) -> None:
        self.world.senders = dict(zip(SENDERS, these, strict=True))
        self.do(self._start())

    async def _start(self) -> None:
        await self.shard.redis.flushall()
        await self.shard.at(0)
        await self._rebuild()

    @rule(
        sender_id=senders,
        dues=st.lists(st.sampled_from([-700, 0, 1, 400, 2000, 15_000]), min_size=1, max_size=6),
        dies=chances,
        waits=chances,
    )
    def intake(self, sender_id: int, dues: list[int], dies: bool, waits: bool) -> None:
        self.world.add_jobs(sender_id, [self.now_ms + due for due in dues])
        self.world.mark_stale(sender_id)
        if not dies:
            self.do(self._load(sender_id, committed=True, waits=waits))

    @rule(want=st.integers(1, 5), waits=chances, rebuilds=chances)
    def claim(self, want: int, waits: bool, rebuilds: bool) -> None:
        self.do(self._claim(want, waits=waits, rebuilds=rebuilds))

    @precondition(lambda self: self._at(Step.CLAIMED))
    @rule(
        pick=picks,
        fails=st.sampled_from([False, False, False, True]),
        waits=chances,
        further=st.integers(0, 2),
    )
    def mark(self, pick: int, fails: bool, waits: bool, further: int) -> None:
        """And perhaps confirm, and begin to send."""
        holding = self._pick(Step.CLAIMED, pick)
        self.do(self._mark(holding, fails=fails, waits=waits))
        for step in (Step.MARKED, Step.CONFIRMED)[:further]:
            if holding.step is step:
                self.do(self._go_on(holding))

    @precondition(lambda self: self._at(Step.MARKED))
    @rule(pick=picks, waits=chances)
    def confirm(self, pick: int, waits: bool) -> None:
        self.do(self._confirm(self._pick(Step.MARKED, pick), waits=waits))

    @precondition(lambda self: self._at(Step.CONFIRMED))
    @rule(pick=picks, waits=chances)
    def begin(self, pick: int, waits: bool) -> None:
        self.do(self._begin(self._pick(Step.CONFIRMED, pick), waits=waits))

    @precondition(lambda self: self._at(Step.BEGUN))
    @rule(
        pick=picks,
        use=st.sampled_from(SlotUse),
        retry=st.sampled_from([None, None, 0, 300, 20_000]),
        age=st.integers(0, 5_000_000),
        contact=contacts,
        waits=chances,
    )
    def end(self, *, pick: int, waits: bool, **how: Any) -> None:
        self.do(self._end(self._pick(Step.BEGUN, pick), waits=waits, **how))

    @rule(
        who=st.sampled_from([SENDERS[:1], SENDERS[:2], SENDERS]),
        spared=st.sampled_from([None, None, SENDERS[1]]),
        waits=chances,
        rounds=st.integers(2, 7),
    )
    def outage(self, who: tuple[int, ...], spared: int | None, waits: bool, rounds: int) -> None:
        for sender_id in who:
            self.world.add_jobs(sender_id, [self.now_ms, self.now_ms])
            self.do(self._load(sender_id, committed=True))
        self.do(self._outage(spared, waits=waits, rounds=rounds))

    @precondition(lambda self: self._at(Step.RECORDED))
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self.do(self._release(self._pick(Step.RECORDED, pick)))

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        holding = self.holdings.pop(pick % len(self.holdings))
        if holding.send and holding.send.ended is None:
            # It may have been sent, at the last instant.
            holding.send.ended = holding.deadline

    @precondition(lambda self: self.loads)
    @rule(pick=picks, dies=st.sampled_from([False, False, False, True]))
    def finish_load(self, pick: int, dies: bool) -> None:
        load = self.loads.pop(pick % len(self.loads))
        if not dies:
            self.do(self._apply(load))

    @rule(us=st.integers(0, 6_000_000) | st.sampled_from([0, 1, 999, 70_000, 900_000]))
    def advance(self, us: int) -> None:
        self.do(self._advance(self.now + us))

    @precondition(lambda self: self.model.first_look)
    @rule(early=st.integers(-1, 1))
    def advance_to_the_next_look(self, early: int) -> None:
        self.do(self._advance((self.model.first_look or 0) * 1000 - early))

    @precondition(
        lambda self: any(j.lease_until < self.now for j in self.world.in_state(JobState.SENDING))
    )
    @rule(waits=chances)
    def recover(self, waits: bool) -> None:
        for sender_id in sorted(self.world.recover(self.now)):
            self.do(self._load(sender_id, committed=True, waits=waits))

    @rule(sender_id=senders, row=rows, waits=chances)
    def change(self, sender_id: int, row: SenderRow, waits: bool) -> None:
        revision = self.world.senders[sender_id].revision + 1
        self.world.senders[sender_id] = replace(row, revision=revision)
        self.world.mark_stale(sender_id)
        self.do(self._load(sender_id, committed=True, waits=waits))

    @precondition(lambda self: any(self.world.in_state(JobState.SCHEDULED)))
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        waiting = list(self.world.in_state(JobState.SCHEDULED))
        job = waiting[pick % len(waiting)]
        job.state = JobState.CANCELLED
        self.do(self._load(job.sender_id, committed=True))

    @precondition(lambda self: self.world.markers)
    @rule(pick=picks)
    def load_abandoned(self, pick: int) -> None:
        choice = sorted({*self.world.markers.values()})
        self.do(self._load(choice[pick % len(choice)], committed=True))

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(old=chances)
    def restart(self, old: bool) -> None:
        """Start with an old snapshot, or empty."""
        self.do(self._restart(self.snapshot if old else Snapshot()))

    @rule()
    def save(self) -> None:
        self.do(self._save())

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(sender_id=senders, kinds=st.sampled_from([*PARTS, PARTS]))
    def lose(self, sender_id: int, kinds: str | tuple[str, ...]) -> None:
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            self.do(self._lose(sender_id, kind))

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(key=st.sampled_from(SHARD_KEYS))
    def lose_key_of_shard(self, key: str) -> None:
        self.do(self._lose_key_of_shard(key))

    @rule(waits=chances)
    def sweep(self, waits: bool) -> None:
        self.do(self._sweep(waits=waits))

    # How they are done -----------------------------------------------------------------------

    async def _outage(self, spared: int | None, *, waits: bool, rounds: int) -> None:
        """Fail for a while, but for one sender; `waits`: look again before the next probe."""
        for _ in range(rounds):
            await self._claim(3)
            for holding in tuple(self.holdings):
                while holding.step in (Step.CLAIMED, Step.MARKED):
                    await self._go_on(holding)
                if holding not in self.holdings:
                    continue
                if holding.claim.sender_id == spared:
                    await self._go_on(holding)
                else:
                    await self._go_on(holding, use=SlotUse.BEGUN, contact=Contact.FAILED, retry=300)
            look = self.model.first_look or 0
            if not waits or look < self.now_ms + LADDER[0]:
                await self._advance(look * 1000)

    def _at(self, step: Step) -> list[Holding]:
        return [holding for holding in self.holdings if holding.step is step]

    def _pick(self, step: Step, pick: int) -> Holding:
        choice = self._at(step)
        return choice[pick % len(choice)]

    async def _advance(self, time: int) -> None:
        await self.shard.at(max(0, time, self.now) / 1000 - START_MS)

    async def _load(self, sender_id: int, *, committed: bool, waits: bool = False) -> None:
        epochs = await self.queue.begin_load([sender_id], committed=committed)
        epoch = self.model.begin_load(self.now_ms, sender_id, committed=committed)
        assert epochs == {sender_id: epoch}
        head, model = self.world.read_head(sender_id, self.now, fresh=brings_history(epoch))
        markers = [number for number, of in self.world.markers.items() if of == sender_id]
        load = Load(sender_id, epoch, head, model, markers)
        if waits:
            self.loads.append(load)
        else:
            await self._apply(load)

    async def _apply(self, load: Load) -> None:
        again = await self.queue.load_heads([load.head], {load.sender_id: load.epoch})
        applied = self.model.load_head(
            self.now_ms, self.now_up, load.sender_id, load.epoch, load.model
        )
        assert again == ([] if applied else [load.sender_id])
        if not applied:
            await self._load(load.sender_id, committed=False)
            return
        for number in load.markers:
            self.world.markers.pop(number, None)
        self.limits[load.sender_id].changes.append((self.now, load.model.limit))

    async def _claim(self, want: int, *, waits: bool = False, rebuilds: bool = True) -> None:
        claimed = await self.queue.claim(want)
        allowed = {sender_id: self._probes_allowed(sender_id) for sender_id in self.model.senders}
        claims, loads = self.model.claim(self.now_ms, want)
        assert claimed.lost is not self.model.whole
        found = [
            (claim.sender_id, member_of(claim.job), claim.waited // timedelta(milliseconds=1))
            for claim in claimed.claims
        ]
        assert (found, list(claimed.loads)) == (claims, loads)
        for endpoint in ENDPOINTS:
            at_once = [
                allowed[s] for s, _, _ in found if self.model.senders[s].endpoint == endpoint
            ]
            assert len(at_once) <= min(at_once, default=0), "more than one probe at a time"
        look = self.model.first_look
        assert claimed.next_look == (
            None if look is None else milliseconds(max(0, look - self.now_ms))
        )
        for claim in claimed.claims:
            gap = self.model.senders[claim.sender_id].gap
            deadline = claim.lease_ms * 1000
            assert claim.lease_ms == self.now_ms + LEASE
            self.holdings.append(Holding(claim, self.now, deadline, gap))
        for sender_id in loads:
            await self._load(sender_id, committed=False, waits=waits)
        if claimed.lost and rebuilds:
            await self._rebuild()

    def _probes_allowed(self, sender_id: int) -> float:
        """Return how many jobs may be claimed of the senders of this one's endpoint."""
        s = self.model.senders[sender_id]
        c = self.model.circuit(s)
        if not c.open:
            return INFINITY
        return 1 if c.turn <= self.now_ms else 0

    async def _mark(self, holding: Holding, *, fails: bool = False, waits: bool = False) -> None:
        claim = holding.claim
        unused = Settlement(claim.sender_id, claim.job, SlotUse.UNUSED, lease_ms=claim.lease_ms)
        if fails:
            holding.settlement = replace(unused, next_job=claim.job, next_due_ms=claim.due_ms)
        elif not self.world.mark(claim.job, self.now):
            holding.settlement = unused
        else:
            holding.lease_until = self.now + self.world.lease
        if holding.settlement and not waits:
            await self._release(holding)

    async def _confirm(self, holding: Holding, *, waits: bool = False) -> None:
        claim = holding.claim
        (held,) = await self.queue.confirm([claim])
        assert held is self.model.confirm(
            self.now_ms, claim.sender_id, member_of(claim.job), claim.lease_ms
        )
        if held:
            holding.confirmed = True
        else:
            await self._give_back(holding, held=False, waits=waits)

    async def _begin(self, holding: Holding, *, waits: bool = False) -> None:
        claim = holding.claim
        if self.now >= holding.deadline:
            await self._give_back(holding, waits=waits)
            return
        limit = self.limits[claim.sender_id].highest_since(holding.claimed)
        holding.send = Send(claim.job.job_id, holding.claimed, holding.deadline, holding.gap)
        self.world.begin_send(claim.sender_id, holding.send, self.now, limit)

    async def _give_back(self, holding: Holding, *, held: bool = True, waits: bool = False) -> None:
        claim = holding.claim
        ours = self.world.give_back(claim.job, holding.lease_until) and held
        holding.settlement = Settlement(
            claim.sender_id,
            claim.job,
            SlotUse.UNUSED,
            next_job=claim.job if ours else None,
            next_due_ms=self.world.jobs[claim.job.job_id].due,
            lease_ms=claim.lease_ms,
        )
        await self._recorded(holding, stale=not ours, waits=waits)

    async def _recorded(self, holding: Holding, *, stale: bool, waits: bool) -> None:
        if stale:
            holding.stale = True
            self.world.mark_stale(holding.claim.sender_id)
        if not waits:
            await self._release(holding)

    async def _end(
        self,
        holding: Holding,
        *,
        use: SlotUse = SlotUse.COUNTED,
        retry: int | None = None,
        age: int = 0,
        contact: Contact = Contact.ANSWERED,
        waits: bool = False,
    ) -> None:
        send, claim = holding.send, holding.claim
        assert send is not None
        if use is SlotUse.UNUSED:
            self.world.sends[claim.sender_id].remove(send)
            await self._give_back(holding, waits=waits)
            return
        # When it began to send is not kept: at its claim at the earliest.
        ended = max(holding.claimed, min(self.now - age, holding.deadline))
        send.ended, send.counted = ended, use is SlotUse.COUNTED
        retry_at = None if retry is None else -(-ended // 1000) + retry
        ours = self.world.settle(claim.job, ended, counted=send.counted, retry_at=retry_at)
        again = JobRef(claim.job.job_id, claim.job.attempt + 1)
        holding.ended = ended
        holding.settlement = Settlement(
            claim.sender_id,
            claim.job,
            use,
            next_job=again if ours and retry_at is not None else None,
            next_due_ms=retry_at or 0,
            answered=contact is Contact.ANSWERED,
            connection_error="refused" if contact is Contact.FAILED else None,
        )
        await self._recorded(holding, stale=retry_at is not None and not ours, waits=waits)

    async def _release(self, holding: Holding) -> None:
        self.holdings.remove(holding)
        settlement = holding.settlement
        assert settlement is not None
        used = settlement.use is not SlotUse.UNUSED
        age = (self.now - holding.ended) // 1000 if used else 0
        told = replace(settlement, age=milliseconds(age))
        unknown = await self.queue.settle([told])
        retry = told.next_job and (member_of(told.next_job), told.next_due_ms)
        known = self.model.settle(
            self.now_ms,
            self.now_up - age,
            told.sender_id,
            member_of(told.job),
            told.use.value,
            retry=retry,
            lease=told.lease_ms,
            answered=told.answered,
            failed=told.connection_error is not None,
        )
        assert unknown == ([] if known else [told.sender_id])
        if not known or holding.stale:
            await self._load(told.sender_id, committed=True)

    async def _save(self) -> None:
        self.snapshot = Snapshot({}, dict(self.model.ready))
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
        # It takes longer to come back than the clock needs to tell two lives apart.
        await self._advance(self.now + 1000)
        self.model.lose_all(snapshot.ready)
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
            self.model.ready.clear()
        elif key == "circuit:relay":
            self.model.circuits.pop("relay", None)
        elif key == "held:relay" and "relay" in self.model.circuits:
            self.model.circuits["relay"].held.clear()
        elif key == "generation":
            self.model.whole = False
        elif key == "life":
            self.model.lose_all(self.model.ready)
            await self._advance(self.now + 1000)

    async def _rebuild(self) -> None:
        token = await self.queue.begin_rebuild()
        assert token is not None
        await self._sweep()
        assert await self.queue.finish_rebuild(token)
        self.model.whole = True

    async def _sweep(self, *, waits: bool = False) -> None:
        """Load those of the senders for which something waits that are lost."""
        concerned = {
            job.sender_id
            for state in (JobState.SCHEDULED, JobState.SENDING)
            for job in self.world.in_state(state)
        }
        lost = await self.queue.find_lost(sorted(concerned))
        assert lost == self.model.find_lost(self.now_ms, sorted(concerned))
        for sender_id in lost:
            await self._load(sender_id, committed=False, waits=waits)

    # What must hold after each step ----------------------------------------------------------

    @invariant()
    def redis_holds_what_the_model_holds(self) -> None:
        if self.world.senders:
            self.do(self._compare())

    async def _compare(self) -> None:
        ready = await self.shard.ready()
        assert {s: look + START_MS for s, look in ready.items()} == self.model.ready
        known = [s for s in SENDERS if s in self.model.senders]
        for sender_id, found in zip(known, await self.shard.senders(known), strict=True):
            expected = self.model.senders[sender_id]
            assert after_start(expected.due) == found.due
            assert after_start(expected.leases) == found.leases
            oldest = self.shard.now - WINDOW
            assert after_start(expected.slots, oldest) == after_start(found.window, oldest, start=0)
            assert found.settings["epoch"] == str(expected.epoch)
            assert found.settings["end"] == str(expected.last_end)
            assert float(found.settings["horizon"]) == expected.horizon
            assert found.settings_expire is expected.idle
            if found.window:
                assert found.window_expires is expected.idle
            assert int(found.settings.get("troubles", 0)) == expected.troubles
            assert ("open" in found.settings) is expected.open
            assert int(found.settings.get("probe", 0)) == expected.probe
        await self._compare_circuits()

    async def _compare_circuits(self) -> None:
        async with self.shard.redis.pipeline(transaction=False) as pipeline:
            pipeline.get(self.shard.prefix + "test:run")
            pipeline.hgetall(self.shard.prefix + "life")
            for endpoint in ENDPOINTS:
                pipeline.hgetall(f"{self.shard.prefix}circuit:{endpoint}")
            run, life, *circuits = await pipeline.execute()
        for endpoint, found in zip(ENDPOINTS, circuits, strict=True):
            c = self.model.circuits.get(endpoint, CircuitModel())
            this_life = (run or "first", found.get("life")) == (life.get("run"), life.get("id"))
            known = found if this_life else {}
            assert int(known.get("failures", 0)) == c.failures
            assert ("open" in known) is c.open
            assert int(known.get("next", 0)) == c.next
            assert int(known.get("until", 0)) == c.busy_until
            if c.open:
                assert await self.shard.held(endpoint) == after_start(c.held)
        told = [(change.opened, change.sender_id) for change in self.shard.changes]
        assert told == self.model.changes

    @invariant()
    def nothing_waits_twice(self) -> None:
        for s in self.model.senders.values():
            assert not s.due.keys() & s.leases.keys()

    # The end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not self.broken and self.world.senders:
            self.do(self._drain())

    async def _drain(self) -> None:
        """Go on as a good dispatcher would: everything that waits gets sent."""
        while self.loads:
            await self._apply(self.loads.pop())
        for sender_id, row in self.world.senders.items():
            if not row.active:
                row.active = True
                await self._load(sender_id, committed=True)
        if self.lossy:
            await self._sweep()
        for _ in range(100 + 10 * len(self.world.jobs)):
            for sender_id in sorted({*self.world.markers.values(), *self.world.recover(self.now)}):
                await self._load(sender_id, committed=True)
            await self._claim(5)
            while self.holdings:
                await self._go_on(self.holdings[0])
            leases = [job.lease_until // 1000 for job in self.world.in_state(JobState.SENDING)]
            if not leases and not any(self.world.in_state(JobState.SCHEDULED)):
                return
            looks = [*leases, *self.model.ready.values()]
            assert looks, "jobs wait, and nobody will ever look"
            await self._advance((min(looks) + bool(leases)) * 1000)
        raise AssertionError("jobs wait, and looking does not help")

    async def _go_on(self, holding: Holding, **how: Any) -> None:
        """Take the next step; `how` a send ends."""
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


def after_start(
    times: dict[Any, int], after: float = -INFINITY, *, start: int = START_MS
) -> dict[Any, int]:
    return {member: time - start for member, time in times.items() if time - start > after}


@pytest.fixture
def low_water(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of four asks for a load when one is left."""
    monkeypatch.setattr(shared.queue.queue, "LOW_WATER", LOW)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.mark.usefixtures("low_water")
def test_the_scripts_decide_as_the_model_and_keep_the_promises(
    redis_url: str, runner: asyncio.Runner
) -> None:
    redis, raw = Redis.from_url(redis_url, decode_responses=True), Redis.from_url(redis_url)

    class Machine(QueueMachine):
        def __init__(self) -> None:
            super().__init__(runner, redis, raw)

    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40,
                phases=[Phase.generate],
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        runner.run(redis.aclose())
        runner.run(raw.aclose())
