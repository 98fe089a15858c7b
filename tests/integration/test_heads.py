"""The head loader between a real PostgreSQL and a real Redis, and races that must lose no job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import Row, event
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.deploy.ports import free_port
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.heads.reading import HeadReader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.keys import job_of
from outbox_server.shared.queue.queue import HEAD_SIZE, Queue
from outbox_server.shared.queue.records import Claim, Claimed, Head, LimitUse, Settlement
from outbox_server.shared.settings import Settings, load_settings
from outbox_server.shared.states import JobState, SenderState
from tests.eventually import PATIENCE, eventually
from tests.integration.queue.shard import scores
from tests.slow_loader import SlowLoader
from tests.world import World

SECOND = timedelta(seconds=1)


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return load_settings(
        database_url=database_url, redis_url=redis_url, min_gap=timedelta(0), auth="off"
    )


@pytest_asyncio.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """A complete shard without senders."""
    async with World(settings) as world:
        assert await world.loader.rebuild(world.queues[0])
        yield world


async def waiting(world: World, sender: int) -> list[int]:
    """Return the head in Redis, in its order."""
    key = world.loader.queue_of(sender).keys.ready.replace("ready", f"due:{sender}")
    return [job_of(member).job_id for member in await scores(world.redis, key)]


async def markers(world: World) -> list[int]:
    rows = await world.sql("SELECT sender_id FROM head_markers ORDER BY id")
    return [row.sender_id for row in rows]


async def ready(world: World) -> set[int]:
    found: set[int] = set()
    for queue in world.queues:
        found |= {int(sender) for sender in await scores(world.redis, queue.keys.ready)}
    return found


async def claim(queue: Queue, want: int = 100) -> Claimed:
    claimed = await queue.claim(want)
    assert not claimed.lost
    return claimed


async def mark(world: World, job: int, lease: timedelta = 60 * SECOND) -> None:
    rows = await world.sql(
        "UPDATE email_jobs SET state = 2, attempt = attempt + 1, lease_until = now() + %s"
        " WHERE id = %s AND state = 1 RETURNING id",
        lease,
        job,
    )
    assert rows


async def attempt(world: World, job: int, ago: timedelta, *, counted: bool = True) -> None:
    """Record an attempt at a job that ended `ago`; the job itself does not change."""
    await world.sql(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted) SELECT id, attempt, sender_id, now() - %s, now() - %s, 1, %s"
        " FROM email_jobs WHERE id = %s",
        ago,
        ago,
        counted,
        job,
    )


async def sent(world: World, claims: tuple[Claim, ...]) -> None:
    """Record and settle claims as a dispatcher does."""
    for each in claims:
        await mark(world, each.job.job_id)
        await attempt(world, each.job.job_id, timedelta(0))
        await world.sql(
            "UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now()"
            " WHERE id = %s",
            each.job.job_id,
        )
    queue = world.queues[0]
    assert not await queue.settle(
        [Settlement(each.sender_id, each.job, LimitUse.COUNTED) for each in claims]
    )


# Loads ---------------------------------------------------------------------------------------


async def test_a_load_after_a_commit_brings_the_jobs_and_deletes_the_marker(world: World) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 3, load=False)
    assert (await claim(world.queues[0])).claims == ()
    assert await markers(world) == [sender]

    await world.loader.load([sender], committed=True)

    assert [each.job.job_id for each in (await claim(world.queues[0])).claims] == jobs
    assert await markers(world) == []


async def test_no_job_is_due_a_fraction_of_a_millisecond_early(world: World) -> None:
    sender = await world.sender()
    (job,) = await world.schedule(sender, load=False)
    await world.sql(
        "UPDATE email_jobs SET scheduled_at = '2030-01-01 00:00:00.000001+00' WHERE id = %s", job
    )
    await world.loader.load([sender], committed=True)

    looks = await scores(world.redis, world.queues[0].keys.ready)
    assert looks == {str(sender): 1_893_456_000_001}


async def test_a_load_uses_the_current_settings(world: World, settings: Settings) -> None:
    sender = await world.sender(limit=7, gap_ms=5, max_in_flight=3)
    await world.schedule(sender)
    key = f"outbox:{{0}}:sender:{sender}"
    names = ("limit", "gap", "flight", "state")
    assert await world.redis.hmget(key, names) == ["7", "5", "3", "1"]

    floored = HeadLoader(
        world.engine, world.queues, settings.model_copy(update={"min_gap": 2 * SECOND})
    )
    await world.change(sender, load=False, hourly_limit=9, state=SenderState.PAUSED)
    await floored.load([sender], committed=True)

    assert await world.redis.hmget(key, names) == ["9", "2000", "3", "2"]
    assert await ready(world) == set()


async def test_jobs_beyond_the_horizon_are_loaded_by_refills_once_each_and_in_order(
    world: World,
) -> None:
    sender = await world.sender(max_in_flight=7)
    await world.schedule(sender, 3 * HEAD_SIZE, load=False)
    # Many jobs are due in the same ms, and the order of ids differs from that of due times.
    await world.sql(
        "UPDATE email_jobs SET scheduled_at = date_trunc('milliseconds', now())"
        " - (id * 7919 % 50) * interval '1 ms'"
    )
    rows = await world.sql("SELECT id FROM email_jobs ORDER BY scheduled_at, id")
    await world.loader.load([sender], committed=True)
    assert len(await waiting(world, sender)) == HEAD_SIZE

    found: list[int] = []
    loads = 0
    while (claimed := await claim(world.queues[0])).claims:
        found += [each.job.job_id for each in claimed.claims]
        await sent(world, claimed.claims)
        for sender_id in claimed.loads:
            loads += 1
            await world.loader.load([sender_id], committed=False)

    assert found == [row.id for row in rows]
    assert loads <= 4


async def test_a_job_due_before_the_horizon_is_loaded_at_once_in_place_of_later_jobs(
    world: World,
) -> None:
    sender = await world.sender()
    later = await world.schedule(sender, HEAD_SIZE + 10, due=3600 * SECOND)
    sooner = await world.schedule(sender, 5)
    assert await waiting(world, sender) == sooner + later[: HEAD_SIZE - 5]


async def test_a_sender_that_is_deleted_leaves_ready(world: World) -> None:
    sender = await world.sender()
    await world.schedule(sender)
    assert await ready(world) == {sender}
    await world.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)

    await world.loader.load([sender], committed=True)

    assert await ready(world) == set()
    assert (await claim(world.queues[0])).claims == ()


async def test_a_sender_that_postgresql_does_not_know_leaves_ready(world: World) -> None:
    await world.redis.zadd(world.queues[0].keys.ready, {"987654321": 0})
    assert (await claim(world.queues[0])).loads == (987654321,)

    await world.loader.load([987654321], committed=False)

    assert await ready(world) == set()
    assert await world.redis.pttl("outbox:{0}:sender:987654321") > 0, "and is forgotten"


async def test_each_sender_is_stored_in_its_shard(world: World, settings: Settings) -> None:
    queues = open_queues(world.redis, settings.model_copy(update={"shards": 3}))
    loader = HeadLoader(world.engine, queues, settings)
    senders = [await world.sender() for _ in range(7)]
    for sender in senders:
        await world.schedule(sender, load=False)
    await loader.load(senders, committed=True)

    for queue in queues:
        found = {int(sender) for sender in await scores(world.redis, queue.keys.ready)}
        assert found == {sender for sender in senders if loader.queue_of(sender) is queue}
        assert all(sender % 3 == queue.shard for sender in found)


# Races ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
async def test_two_loads_and_an_intake_in_between_lose_nothing(world: World, known: bool) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 2, load=known)
    loaders = [SlowLoader(world) for _ in range(2)]
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.load([sender], committed=False)) for each in loaders]
        for each in loaders:
            await each.reader.has_read.wait()
        jobs += await world.schedule(sender, 3)
        for each, task in zip(loaders, tasks, strict=True):
            each.reader.go.set()
            await task
            assert await waiting(world, sender) == jobs

    assert [each.reader.looks for each in loaders] == [2, 2], "both had read too early"
    assert await markers(world) == []


async def test_an_intake_repairs_a_load_that_overtook_it(world: World) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 2)
    slow = SlowLoader(world)
    jobs += await world.schedule(sender, 3, load=False)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        intake = group.create_task(slow.load([sender], committed=True))
        await slow.reader.has_read.wait()
        (claimed,) = (await claim(world.queues[0], 1)).claims
        await world.loader.load([sender], committed=False)
        slow.reader.go.set()
        await intake

    assert await waiting(world, sender) == jobs[1:], "not the one under lease"
    assert claimed.job.job_id == jobs[0]


async def test_a_marker_of_a_commit_that_a_load_has_not_seen_survives_it(world: World) -> None:
    sender = await world.sender()
    await world.schedule(sender)
    slow = SlowLoader(world)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        load = group.create_task(slow.load([sender], committed=False))
        await slow.reader.has_read.wait()
        # The scheduler dies before it loads the head.
        await world.schedule(sender, load=False)
        slow.reader.go.set()
        await load

    assert await markers(world) == [sender]


async def test_a_sender_that_changes_constantly_keeps_its_marker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moving(HeadReader):
        async def read(
            self, connection: AsyncConnection, epochs: Mapping[int, str], rows: Sequence[Row[Any]]
        ) -> tuple[list[Head], dict[int, list[int]]]:
            await world.queues[0].begin_load(list(epochs), committed=True)
            return await super().read(connection, epochs, rows)

    sender = await world.sender()
    await world.schedule(sender)
    await world.schedule(sender, load=False)

    monkeypatch.setattr(world.loader, "_reader", Moving(world.settings))
    async with asyncio.timeout(PATIENCE):
        await world.loader.load([sender], committed=True)

    assert await markers(world) == [sender]


async def test_a_job_that_is_requeued_between_the_two_reads_of_a_first_load_is_not_lost(
    world: World, settings: Settings
) -> None:
    sender = await world.sender()
    (job,) = await world.schedule(sender, load=False)
    await mark(world, job, timedelta(0))

    @event.listens_for(world.engine.sync_engine, "before_cursor_execute")
    def settle(
        _connection: Any, _cursor: Any, statement: str, *_: Any
    ) -> None:  # its dispatcher dies after this commit
        if "UNION ALL" in statement:
            with psycopg.connect(settings.database_url, autocommit=True) as other:
                other.execute("UPDATE email_jobs SET state = 1, lease_until = NULL")

    await world.loader.load([sender], committed=False)
    event.remove(world.engine.sync_engine, "before_cursor_execute", settle)

    # Either the job waits, or its lease expires and a load is requested.
    async def found() -> bool:
        claimed = await claim(world.queues[0])
        await world.loader.load(claimed.loads, committed=False)
        return await waiting(world, sender) == [job]

    await eventually(found)


# Markers -------------------------------------------------------------------------------------


async def test_only_an_old_marker_causes_a_load(
    world: World,
) -> None:
    old, new = await world.sender(), await world.sender()
    jobs = await world.schedule(old, 2, load=False)
    await world.schedule(new, 2, load=False)
    assert await world.loader.load_abandoned() == []
    await world.sql(
        "UPDATE head_markers SET created_at = now() - interval '6 s' WHERE sender_id = %s", old
    )

    assert await world.loader.load_abandoned() == [old]

    assert await waiting(world, old) == jobs
    assert await waiting(world, new) == []
    assert await markers(world) == [new]
    assert await world.loader.load_abandoned() == []


async def test_a_load_without_redis_leaves_the_marker(world: World, settings: Settings) -> None:
    sender = await world.sender()
    await world.schedule(sender, load=False)
    nowhere = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    async with connect(nowhere) as redis:
        loader = HeadLoader(world.engine, open_queues(redis, nowhere), nowhere)
        assert not await load_soon(loader, [sender])

    assert await markers(world) == [sender]
    assert await load_soon(world.loader, [sender])
    assert await markers(world) == []


# A lost Redis --------------------------------------------------------------------------------


async def test_a_rebuild_restores_heads_window_and_leases(world: World) -> None:
    sender = await world.sender(limit=3, gap_ms=1000)
    jobs = await world.schedule(sender, 6, spacing=SECOND)
    for job, ago, counted in ((jobs[0], 3540, True), (jobs[1], 30, True), (jobs[2], 20, False)):
        await mark(world, job)
        await attempt(world, job, ago * SECOND, counted=counted)
        await world.sql(
            "UPDATE email_jobs SET state = 4, lease_until = NULL, finished_at = now()"
            " WHERE id = %s",
            job,
        )
    await attempt(world, jobs[3], 3601 * SECOND)
    await mark(world, jobs[3], 40 * SECOND)
    await world.redis.flushall()
    assert (await world.queues[0].claim(1)).lost

    assert await world.loader.rebuild(world.queues[0])

    assert await waiting(world, sender) == jobs[4:]
    times = {
        row.id: row.ms
        for row in await world.sql(
            "SELECT email_job_id AS id, extract(epoch FROM ended_at) * 1000 AS ms FROM attempts"
        )
    }
    window = await scores(world.redis, f"outbox:{{0}}:window:{sender}")
    assert [job_of(member).job_id for member in window] == jobs[:2]
    for member, end in window.items():
        late = end - float(times[job_of(member).job_id])
        assert 0 <= late < 1000, "an end is never earlier than it was"
    (last_end,) = await world.redis.hmget(f"outbox:{{0}}:sender:{sender}", ["end"])
    assert last_end
    assert 0 <= int(last_end) - float(times[jobs[2]]) < 1000
    ((member, until),) = (await scores(world.redis, f"outbox:{{0}}:lease:{sender}")).items()
    assert job_of(member) == (jobs[3], 1)
    (row,) = await world.sql(
        "SELECT extract(epoch FROM lease_until) * 1000 AS ms FROM email_jobs WHERE id = %s",
        jobs[3],
    )
    assert 0 <= until - float(row.ms) < 1000, "a lease never ends earlier"
    # The lease preserves the gap.
    assert (await claim(world.queues[0])).claims == ()


async def test_the_history_of_a_sender_without_jobs_is_restored_with_its_next_job(
    world: World,
) -> None:
    sender = await world.sender(limit=1)
    await world.schedule(sender)
    await sent(world, (await claim(world.queues[0])).claims)
    await world.redis.flushall()
    assert await world.loader.rebuild(world.queues[0])
    assert await ready(world) == set()

    await world.schedule(sender)

    assert (await claim(world.queues[0])).claims == ()
    assert await ready(world) == {sender}


async def test_a_gap_longer_than_the_window_survives_a_loss(world: World) -> None:
    sender = await world.sender(gap_ms=7_200_000)
    first, second = await world.schedule(sender, 2)
    await mark(world, first)
    await attempt(world, first, 5400 * SECOND)
    await world.sql(
        "UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now() WHERE id = %s",
        first,
    )
    await world.redis.flushall()
    assert await world.loader.rebuild(world.queues[0])

    claimed = await claim(world.queues[0])
    assert claimed.claims == ()
    assert claimed.next_look is not None
    assert 1790 * SECOND < claimed.next_look <= 1801 * SECOND
    assert await waiting(world, sender) == [second]


async def test_only_one_of_two_concurrent_rebuilds_runs(world: World) -> None:
    senders = [await world.sender() for _ in range(3)]
    for sender in senders:
        await world.schedule(sender, load=False)
    await world.redis.flushall()
    slow = SlowLoader(world)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        first = group.create_task(slow.rebuild(world.queues[0]))
        await slow.reader.has_read.wait()
        assert not await world.loader.rebuild(world.queues[0])
        assert (await world.queues[0].claim(1)).lost
        slow.reader.go.set()

    assert first.result()
    assert await ready(world) == set(senders)
    assert len((await claim(world.queues[0])).claims) == 3


async def test_a_loss_during_a_rebuild_is_noticed_and_the_next_rebuild_is_complete(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.shared.heads.loader._CHUNK", 2)
    monkeypatch.setattr("outbox_server.shared.heads.rebuilding._LOADS", 1)
    senders = [await world.sender() for _ in range(6)]
    for sender in senders:
        await world.schedule(sender, load=False)
    await world.redis.flushall()
    slow = SlowLoader(world)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        first = group.create_task(slow.rebuild(world.queues[0]))
        await slow.reader.has_read.wait()
        await world.redis.flushall()
        slow.reader.go.set()

    assert not first.result()
    assert slow.reader.looks == 2, "the load must end when its first part is refused"
    assert (await world.queues[0].claim(1)).lost
    assert await world.loader.rebuild(world.queues[0])
    assert await ready(world) == set(senders)


async def test_an_intake_during_a_rebuild_is_not_lost(world: World) -> None:
    sender, other = await world.sender(), await world.sender()
    jobs = await world.schedule(sender, 2)
    await world.redis.flushall()
    slow = SlowLoader(world)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        rebuild = group.create_task(slow.rebuild(world.queues[0]))
        await slow.reader.has_read.wait()
        jobs += await world.schedule(sender, 2)
        others = await world.schedule(other, 2)
        slow.reader.go.set()

    assert rebuild.result()
    assert await waiting(world, sender) == jobs
    assert await waiting(world, other) == others


async def test_a_rebuild_of_many_senders_runs_in_chunks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.shared.heads.loader._CHUNK", 7)
    monkeypatch.setattr("outbox_server.shared.heads.rebuilding._FIRST_READ", 5)
    monkeypatch.setattr("outbox_server.shared.heads.rebuilding._LONGEST_READ", 11)
    senders = [await world.sender() for _ in range(30)]
    for sender in senders:
        await world.schedule(sender, load=False)
    await world.redis.flushall()

    assert await world.loader.rebuild(world.queues[0])

    assert await ready(world) == set(senders)
    assert await world.in_state(JobState.SCHEDULED)
    assert len((await claim(world.queues[0])).claims) == 30


class NotingLoader(HeadLoader):
    """Records the senders that are loaded, in order."""

    def __init__(self, world: World) -> None:
        super().__init__(world.engine, world.queues, world.settings)
        self.loaded: list[int] = []

    async def load(self, sender_ids: Iterable[int], *, committed: bool) -> None:
        ids = list(sender_ids)
        self.loaded += ids
        await super().load(ids, committed=committed)


async def test_a_rebuild_starts_with_the_senders_that_are_due_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.shared.heads.loader._CHUNK", 2)
    monkeypatch.setattr("outbox_server.shared.heads.rebuilding._LOADS", 1)
    dues = (30, -10, 20, -20, -10)
    senders = [await world.sender() for _ in dues]
    for sender, due in zip(senders, dues, strict=True):
        await world.schedule(sender, 2, due=due * SECOND, spacing=SECOND * 100, load=False)
    sends = await world.sender()
    (job,) = await world.schedule(sends, load=False)
    await mark(world, job)
    await world.redis.flushall()

    loader = NotingLoader(world)
    assert await loader.rebuild(world.queues[0])

    assert loader.loaded == [*(senders[n] for n in (3, 1, 4, 2, 0)), sends]


async def test_a_claim_not_yet_marked_when_redis_was_lost_does_not_hold(
    world: World,
) -> None:
    sender = await world.sender(gap_ms=60_000)
    jobs = await world.schedule(sender, 2)
    (old,) = (await claim(world.queues[0])).claims
    await world.redis.flushall()
    assert await world.loader.rebuild(world.queues[0])
    await mark(world, old.job.job_id)

    assert await world.queues[0].confirm([old]) == [False]
    assert await waiting(world, sender) == jobs, "the entry is another's now"


async def test_a_claim_marked_before_redis_was_lost_holds(world: World) -> None:
    sender = await world.sender(gap_ms=60_000)
    jobs = await world.schedule(sender, 2)
    (old,) = (await claim(world.queues[0])).claims
    await mark(world, old.job.job_id)
    await world.redis.flushall()
    assert await world.loader.rebuild(world.queues[0])

    assert await world.queues[0].confirm([old]) == [True]
    assert await waiting(world, sender) == jobs[1:]
    assert (await claim(world.queues[0])).claims == ()
