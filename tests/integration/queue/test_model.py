"""The Lua scripts decide like the model, and their decisions keep the promises.

The steps are random: senders, limits, gaps, times; dispatchers that stop or die anywhere; loads
that are overtaken; losses of Redis or of some of its keys, and starts with an old snapshot. After
every step Redis holds the same as the model, and every send that begins is checked against the
sends before it. At the end all waiting mail is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

import outbox_server.shared.queue.queue
from outbox_server.shared.queue.records import Contact, LimitUse
from outbox_server.shared.states import JobState
from tests.integration.queue.limit_steps import Answers, LimitSteps
from tests.integration.queue.shard import connect_to
from tests.integration.queue.steps import (
    LOW,
    SENDER_KEYS,
    SENDERS,
    SHARD_KEYS,
    USER_KEYS,
)
from tests.integration.queue.under_way import ClaimUnderWay, Snapshot, Step
from tests.integration.queue.user_steps import USERS
from tests.integration.queue.world import SenderRow

senders = st.sampled_from(SENDERS)
# Picks one of several: an index, taken modulo their number.
picks = st.integers(0, 7)
chances = st.booleans()
rows = st.builds(
    SenderRow,
    limit=st.sampled_from([1, 2, 3, 9]),
    gap=st.sampled_from([0, 0, 70, 900]),
    flight=st.integers(1, 6),
    active=st.sampled_from([True, True, True, False]),
    own=st.sampled_from([False] * 4 + [True]),
)


# How many jobs of a user are claimed in turn, and at most.
limits = st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda both: (both[0], sum(both)))
contacts = st.sampled_from([Contact.FAILED] * 5 + list(Contact))
answers = st.sampled_from([Answers.BOTH] * 3 + list(Answers))


class QueueMachine(LimitSteps):
    @initialize(these=st.tuples(*(rows for _ in SENDERS)))
    def start(self, these: tuple[SenderRow, ...]) -> None:
        for sender_id, row in zip(SENDERS, these, strict=True):
            self.world.senders[sender_id] = replace(row, user=USERS[sender_id])
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
        adds=chances,
    )
    def intake(self, sender_id: int, dues: list[int], dies: bool, waits: bool, adds: bool) -> None:
        jobs = self.world.add_jobs(sender_id, [self.now_ms + due for due in dues])
        marker = self.world.mark_stale(sender_id)
        if dies:
            return
        if not adds:
            self.do(self._load(sender_id, committed=True, waits=waits))
        elif waits:
            self.additions.append((sender_id, jobs, marker))
        else:
            self.do(self._add(sender_id, jobs, marker))

    @rule(
        want=st.integers(1, 5),
        waits=chances,
        rebuilds=chances,
        limits=st.dictionaries(st.sampled_from("ab"), limits, max_size=2),
    )
    def claim(
        self, want: int, waits: bool, rebuilds: bool, limits: dict[str, tuple[int, int]]
    ) -> None:
        self.do(self._claim(want, waits=waits, rebuilds=rebuilds, limits=limits))

    @precondition(lambda self: self._at(Step.CLAIMED))
    @rule(
        pick=picks,
        fails=st.sampled_from([False, False, False, True]),
        waits=chances,
        further=st.integers(0, 2),
    )
    def mark(self, pick: int, fails: bool, waits: bool, further: int) -> None:
        """Mark, and possibly confirm and begin to send."""
        holding = self._pick(Step.CLAIMED, pick)
        self.do(self._mark(holding, fails=fails, waits=waits))
        for step in (Step.MARKED, Step.CONFIRMED)[:further]:
            if holding.step is step:
                self.do(self._advance_claim(holding))

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
        use=st.sampled_from(LimitUse),
        retry=st.sampled_from([None, None, 0, 300, 20_000]),
        age=st.integers(0, 5_000_000),
        contact=contacts,
        before_mail=chances,
        cools=st.sampled_from([None] * 6 + [1, 400, 8_000]),
        waits=chances,
    )
    def end(self, *, pick: int, waits: bool, **how: Any) -> None:
        self.do(self._end(self._pick(Step.BEGUN, pick), waits=waits, **how))

    @rule(
        who=st.sampled_from([SENDERS[:1], SENDERS[:2], SENDERS]),
        spared=st.sampled_from([None, None, SENDERS[1]]),
        waits=chances,
        rounds=st.integers(2, 7),
        before_mail=chances,
    )
    def outage(
        self,
        *,
        who: tuple[int, ...],
        spared: int | None,
        waits: bool,
        rounds: int,
        before_mail: bool,
    ) -> None:
        for sender_id in who:
            self.world.add_jobs(sender_id, [self.now_ms, self.now_ms])
            self.do(self._load(sender_id, committed=True))
        self.do(self._outage(spared, waits=waits, rounds=rounds, before_mail=before_mail))

    @precondition(lambda self: self._renewable())
    @rule(pick=picks, answers=answers)
    def renew(self, pick: int, answers: Answers) -> None:
        choice = self._renewable()
        self.do(self._renew(choice[pick % len(choice)], answers))

    def _renewable(self) -> list[ClaimUnderWay]:
        return [holding for holding in self._at(Step.BEGUN) if self.now < holding.deadline]

    @rule(
        sender_id=senders,
        pauses=st.lists(st.tuples(st.integers(1, 2_900_000), answers), min_size=1, max_size=4),
    )
    def linger(self, sender_id: int, pauses: list[tuple[int, Answers]]) -> None:
        """Let a server answer slowly."""
        self.world.add_jobs(sender_id, [self.now_ms, self.now_ms])
        self.do(self._load(sender_id, committed=True))
        self.do(self._linger(sender_id, pauses))

    @rule(sender_id=senders, rounds=st.integers(1, 11))
    def throttle(self, sender_id: int, rounds: int) -> None:
        """Let a server reply that mail comes too fast."""
        self.world.add_jobs(sender_id, [self.now_ms, self.now_ms])
        self.do(self._load(sender_id, committed=True))
        self.do(self._throttle(sender_id, rounds))

    @rule(sender_id=senders, rounds=st.integers(1, 3), cools=st.sampled_from([1, 700, 20_000]))
    def refuse(self, sender_id: int, rounds: int, cools: int) -> None:
        """Let a server refuse an account and its probes."""
        self.world.add_jobs(sender_id, [self.now_ms, self.now_ms])
        self.do(self._load(sender_id, committed=True))
        self.do(self._refuse(sender_id, rounds, cools))

    @precondition(lambda self: self.world.cooldowns)
    @rule(pick=picks, waits=chances)
    def resume(self, pick: int, waits: bool) -> None:
        """End a cooldown, as ResumeSender does."""
        choice = sorted(self.world.cooldowns)
        sender_id = choice[pick % len(choice)]
        del self.world.cooldowns[sender_id]
        self.world.mark_stale(sender_id)
        self.do(self._load(sender_id, committed=True, waits=waits))

    @precondition(lambda self: self._at(Step.RECORDED))
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self.do(self._release(self._pick(Step.RECORDED, pick)))

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        holding = self.holdings.pop(pick % len(self.holdings))
        if holding.send and holding.send.ended is None:
            # It may have been sent at the last instant.
            holding.send.ended = holding.deadline

    @precondition(lambda self: self.loads)
    @rule(pick=picks, dies=st.sampled_from([False, False, False, True]))
    def finish_load(self, pick: int, dies: bool) -> None:
        load = self.loads.pop(pick % len(self.loads))
        if not dies:
            self.do(self._apply(load))

    @precondition(lambda self: self.additions)
    @rule(pick=picks)
    def finish_addition(self, pick: int) -> None:
        self.do(self._add(*self.additions.pop(pick % len(self.additions))))

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
        user = USERS[sender_id]
        self.world.senders[sender_id] = replace(row, revision=revision, user=user)
        self.world.mark_stale(sender_id)
        self.do(self._load(sender_id, committed=True, waits=waits))

    @rule(
        user=st.sampled_from("ab"),
        limit=st.sampled_from([None, 0, 1, 2, 4]),
        gap=st.sampled_from([None, 0, 0, 300, 2_500]),
        waits=chances,
    )
    def limit_user(self, user: str, limit: int | None, gap: int | None, waits: bool) -> None:
        self.do(self._set_user(user, (limit, gap), waits=waits))

    @rule(limit=st.sampled_from([0, 0, 2]), gap=st.sampled_from([0, 0, 400]))
    def configure(self, limit: int, gap: int) -> None:
        """Start dispatchers with other limits of all users."""
        self.everyone = (limit, gap)

    @rule(user=st.sampled_from("ab"), limit=st.integers(1, 3), rounds=st.integers(2, 6))
    def crowd(self, user: str, limit: int, rounds: int) -> None:
        """Let the senders of a user compete for its limits."""
        self.do(self._set_user(user, (limit, None), waits=False))
        for sender_id in self.world.senders_of(user):
            self.world.add_jobs(sender_id, [self.now_ms] * 3)
            self.do(self._load(sender_id, committed=True))
        self.do(self._send_all(rounds))

    async def _send_all(self, rounds: int) -> None:
        for _ in range(rounds):
            await self._claim(5)
            for holding in tuple(self.holdings):
                if holding in self.holdings:
                    await self._advance_claim(holding)
            await self._compare()
            await self._advance((self.model.first_look or 0) * 1000)

    @precondition(lambda self: self.user_loads)
    @rule(pick=picks, dies=st.sampled_from([False, False, False, True]))
    def finish_user_load(self, pick: int, dies: bool) -> None:
        load = self.user_loads.pop(pick % len(self.user_loads))
        if not dies:
            self.do(self._apply_user(load))

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(user=st.sampled_from("ab"), kind=st.sampled_from(USER_KEYS))
    def lose_user(self, user: str, kind: str) -> None:
        self.do(self._lose_user(user, kind))

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
    @rule(sender_id=senders, kinds=st.sampled_from([*SENDER_KEYS, SENDER_KEYS]))
    def lose(self, sender_id: int, kinds: str | tuple[str, ...]) -> None:
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            self.do(self._lose(sender_id, kind))

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(key=st.sampled_from(SHARD_KEYS))
    def lose_key_of_shard(self, key: str) -> None:
        self.do(self._lose_key_of_shard(key))

    @precondition(lambda self: len(self.world.jobs) > 3)
    @rule(sends=st.lists(senders, max_size=4), pause=st.integers(0, 900_000))
    def supersede(self, sends: list[int], pause: int) -> None:
        """Let another Redis become the valid one, and its dispatchers send."""
        self.world.begin_life()
        for sender_id in sends:
            self.world.send_elsewhere(sender_id, self.now, self.everyone)
            self.do(self._advance(self.now + pause))

    @rule(waits=chances)
    def restore_lost(self, waits: bool) -> None:
        self.do(self._restore_lost(waits=waits))

    # Invariants that hold after each step ----------------------------------------------------

    @invariant()
    def redis_holds_what_the_model_holds(self) -> None:
        if self.world.senders:
            self.do(self._compare())

    @invariant()
    def nothing_waits_twice(self) -> None:
        for s in self.model.senders.values():
            assert not s.due.keys() & s.leases.keys()

    # The end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not self.broken and self.world.senders:
            self.do(self._drain())


@pytest.fixture
def low_water(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head has four jobs, and requests a load when one is left."""
    monkeypatch.setattr(outbox_server.shared.queue.queue, "LOW_WATER", LOW)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


# Eight examples in each part, so that the workers share them: 24 in all, and 240 with
# `make test-search`.
@pytest.mark.parametrize("_part", range(max(1, settings().max_examples * 3 // 50)))
@pytest.mark.hypothesis
@pytest.mark.usefixtures("low_water")
def test_the_scripts_agree_with_the_model_and_keep_the_promises(
    redis_url: str, runner: asyncio.Runner, _part: int
) -> None:
    redis, raw = connect_to(redis_url), Redis.from_url(redis_url)

    class Machine(QueueMachine):
        def __init__(self) -> None:
            super().__init__(runner, redis, raw)

    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=8,
                phases=[Phase.generate],
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        runner.run(redis.aclose())
        runner.run(raw.aclose())


@pytest.mark.usefixtures("low_water")
def test_failures_of_a_sender_whose_limiter_is_not_loaded_become_those_of_the_endpoint(
    redis_url: str, runner: asyncio.Runner
) -> None:
    """Found by the steps at random: Redis kept them for the sender's own circuit as well."""
    redis, raw = connect_to(redis_url), Redis.from_url(redis_url)
    machine = QueueMachine(runner, redis, raw)
    row = SenderRow(limit=9, gap=0, flight=6, active=True, own=False)
    others = replace(row, gap=900, flight=5, active=False), replace(row, limit=3, flight=4)
    try:
        machine.start(these=(row, *others))
        machine.supersede(sends=[9], pause=77_441)
        machine.outage(who=SENDERS, spared=10, waits=False, rounds=2, before_mail=False)
        machine.limit_user(user="a", limit=4, gap=2_500, waits=False)
        # The limits of the sender are known before those of its user.
        machine.limit_user(user="a", limit=0, gap=0, waits=True)
        machine.outage(who=(9,), spared=10, waits=False, rounds=3, before_mail=True)
        machine.redis_holds_what_the_model_holds()
        machine.teardown()
    finally:
        runner.run(redis.aclose())
        runner.run(raw.aclose())
