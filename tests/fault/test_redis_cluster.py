"""A cluster of real nodes: mail of all shards is sent, also while slots move and nodes fail."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from redis.crc import key_slot

from outbox_server.deploy.drill.plan import Fault
from outbox_server.deploy.drill.store_faults import StoreFaults
from outbox_server.deploy.embedded.cluster import SLOTS, ValkeyCluster
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.pgbouncer import PgBouncer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue import connection
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.keys import ShardKeys
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claimed
from outbox_server.shared.queue.user_limits import UserLimit
from tests.conftest import DATABASE, Stores
from tests.dispatchers import (
    DispatcherProcess,
    options,
    process,
    readiness,
    running,
    settings_of,
)
from tests.eventually import eventually
from tests.pgbouncer import pooler
from tests.smtp_servers import Action, Conversation, ScriptedServer, Succeed, Wait
from tests.world import World, gap_of, jobs_in

SHARDS = 4
GAP_MS = 100
# Of each sender, while a node hangs: enough for some failed claims.
MAILS = 40
# Every script writes its time here.
LIFE = ShardKeys(0).ready.replace("ready", "life")
# The primary with a replica; it owns the slots of shards 1 and 2.
REPLICATED = 1


def slot_of(shard: int) -> int:
    return key_slot(ShardKeys(shard).ready.encode(), SLOTS)


@pytest.fixture(scope="module")
def cluster(stores: Stores) -> Iterator[ValkeyCluster]:
    """Three primaries, one of them with a replica."""
    folder = Path(tempfile.mkdtemp(prefix="outbox-cluster-"))
    binary = stores.redis.binary or valkey_binary()
    cluster = ValkeyCluster(folder, replicas=[REPLICATED], binary=binary)
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        try:
            runner.run(cluster.start())
            yield cluster
        finally:
            runner.run(cluster.stop())
            shutil.rmtree(folder)


@dataclass
class ClusterSending:
    """A dispatcher that sends the mail of senders of all shards."""

    world: World
    dispatcher: DispatcherProcess
    health: str
    inbox: Inbox
    senders: list[int]

    async def schedule(self, mails: int) -> None:
        """Accept as many mails of each sender."""
        for sender in self.senders:
            await self.world.schedule(sender, mails, load=False)
        await self.world.loader.load(self.senders, committed=True)

    def sent(self, shard: int) -> int:
        """Return how many mails of a shard have arrived."""
        return sum(mail.mail_from in self.addresses(shard) for mail in self.inbox.mails)

    def addresses(self, shard: int) -> set[str]:
        """Return the From addresses of the senders of a shard."""
        queue_of = self.world.loader.queue_of
        return {f"s{one}@x.test" for one in self.senders if queue_of(one).shard == shard}

    def check_arrivals(self, mails: int) -> None:
        """Check that each mail arrived once, and that the gaps of all senders were kept."""
        found = jobs_in(self.inbox.mails)
        assert len(found) == mails * len(self.senders)
        assert set(found.values()) == {1}, self.dispatcher.log()
        for sender in self.senders:
            assert gap_of(self.inbox.mails, sender) >= GAP_MS / 1000, sender


@asynccontextmanager
async def sending(
    cluster: ValkeyCluster, database_url: str, inbox: Inbox, folder: Path, senders: int = 16
) -> AsyncIterator[ClusterSending]:
    health = f"{LOOPBACK}:{free_port()}"
    values = options(
        database_url,
        cluster.url,
        inbox.url,
        shards=SHARDS,
        health_listen=health,
    )
    await cluster.flush()
    async with (
        process(values, folder / "log") as dispatcher,
        World(settings_of(values)) as world,
    ):
        found = [
            await world.sender(user=f"user{n}", gap_ms=GAP_MS, max_in_flight=1)
            for n in range(senders)
        ]
        await eventually(dispatcher.serving)
        yield ClusterSending(world, dispatcher, health, inbox, found)
        assert dispatcher.is_running()


async def test_mail_of_all_shards_is_sent_while_a_slot_is_moved(
    cluster: ValkeyCluster, database_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    slot = slot_of(0)
    before = await cluster.owner_of(slot)
    target = next(node for node in cluster.primaries if node is not before)
    async with sending(cluster, database_url, inbox, tmp_path) as run:
        await run.schedule(10)
        await eventually(lambda: run.sent(0) > 0)
        source = await cluster.begin_move(slot, target)
        moving = ("NOT_SERVING", f"redis: slot is being moved (shards 0 of {SHARDS})")

        async def reported() -> bool:
            return await readiness(run.health) == moving

        await eventually(reported)
        # The shard waits, and no script writes a part of what it should. The others do not wait.
        waiting, seen = run.sent(0), await source.command("HGET", LIFE, "seen")
        await eventually(lambda: all(run.sent(shard) == 40 for shard in (1, 2, 3)))
        assert run.sent(0) <= waiting + 4
        assert await source.command("HGET", LIFE, "seen") == seen
        # It fails if a script has written a key on the target.
        assert await cluster.finish_move(slot, source, target) > 0
        await eventually(run.world.done)
        await eventually(run.dispatcher.serving)
        run.check_arrivals(10)
        assert await cluster.owner_of(slot) is target


async def test_a_replica_takes_over_while_mail_is_sent(
    cluster: ValkeyCluster, database_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    slot = slot_of(1)
    primary = await cluster.owner_of(slot)
    async with sending(cluster, database_url, inbox, tmp_path) as run:
        await run.schedule(10)
        await eventually(lambda: run.sent(1) > 0)
        await primary.kill()
        await eventually(lambda: "store_fails" in run.dispatcher.log())
        await eventually(run.world.done)
        await eventually(run.dispatcher.serving)
        run.check_arrivals(10)
        assert await cluster.owner_of(slot) is not primary
    # It becomes a replica of the node that took over.
    await primary.start()
    await eventually(cluster.serves)


async def test_a_lost_node_without_a_replica_delays_its_own_shards_only(
    cluster: ValkeyCluster, database_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    lost = await cluster.owner_of(slot_of(3))
    owners = [await cluster.owner_of(slot_of(shard)) for shard in range(SHARDS)]
    waiting = [shard for shard, owner in enumerate(owners) if owner is lost]
    others = [shard for shard in range(SHARDS) if shard not in waiting]
    assert others
    async with sending(cluster, database_url, inbox, tmp_path) as run:
        await run.schedule(5)
        await eventually(lambda: run.sent(3) > 0)
        await lost.kill()
        names = ", ".join(map(str, waiting))

        async def reported() -> bool:
            state, reason = await readiness(run.health)
            return state == "NOT_SERVING" and reason.endswith(f"(shards {names} of {SHARDS})")

        await eventually(reported)
        before = run.sent(3)
        for sender in run.senders:
            await run.world.schedule(sender, 5, load=False)
        shard_of = {one: run.world.loader.queue_of(one).shard for one in run.senders}
        # The load of all senders fails for the first ones. The others are loaded nevertheless.
        lost_first = sorted(run.senders, key=lambda one: shard_of[one] in others)
        with pytest.raises(QUEUE_ERRORS):
            await run.world.loader.load(lost_first, committed=True)
        left = await run.world.sql("SELECT sender_id FROM head_markers")
        assert {shard_of[row.sender_id] for row in left} <= {*waiting}
        await eventually(lambda: all(run.sent(shard) == 40 for shard in others))
        assert run.sent(3) <= before + 4
        await lost.start()
        await eventually(run.world.done)
        await eventually(run.dispatcher.serving)
        run.check_arrivals(10)


@pytest.fixture
def wants_after_failures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each claim of a shard asks for whose last claim has failed."""
    found: list[int] = []
    failed: set[int] = set()
    real = Queue.claim

    async def claim(queue: Queue, want: int, limits: Sequence[UserLimit] = ()) -> Claimed:
        if queue.shard in failed:
            found.append(want)
        try:
            claimed = await real(queue, want, limits)
        except QUEUE_ERRORS:
            failed.add(queue.shard)
            raise
        failed.discard(queue.shard)
        return claimed

    monkeypatch.setattr(Queue, "claim", claim)
    return found


def slow(_: Conversation) -> Action:
    """A server that takes 30 ms for a mail, so that all slots are always in use."""
    answer = asyncio.Event()
    asyncio.get_running_loop().call_later(0.03, answer.set)
    return (Wait(answer), Succeed())


async def test_a_node_that_hangs_delays_its_own_shards_only(
    cluster: ValkeyCluster,
    database_url: str,
    wants_after_failures: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "_CALL_LIMIT_S", 0.5)
    await cluster.flush()
    hanging = await cluster.owner_of(slot_of(3))
    owners = [await cluster.owner_of(slot_of(shard)) for shard in range(SHARDS)]
    async with ScriptedServer({"body": slow}) as server:
        settings = settings_of(options(database_url, cluster.url, server.url, shards=SHARDS))
        async with running(settings) as dispatcher, World(settings) as world:
            senders = [await world.sender(user=f"user{n}") for n in range(16)]
            served = [one for one in senders if owners[world.loader.queue_of(one).shard] != hanging]
            assert 0 < len(served) < len(senders)

            async def has_begun() -> bool:
                lives = await world.sql("SELECT shard FROM shard_lives WHERE shard < %s", SHARDS)
                return len(lives) == SHARDS

            # A dispatcher reads the last heartbeat of PostgreSQL, which may be on any node, before
            # it takes jobs.
            await eventually(has_begun)
            os.kill(hanging.child.pid, signal.SIGSTOP)
            try:
                await eventually(lambda: wants_after_failures)
                for sender in senders:
                    await world.schedule(sender, MAILS, load=False)
                with pytest.raises(QUEUE_ERRORS):
                    await world.loader.load(senders, committed=True)
                await eventually(lambda: world.done(*served))
                assert not await dispatcher.serving()
                assert len(server.taken) == len(served) * MAILS
                # One slot at most: the others are for the shards of other nodes. A claim of no job
                # would say nothing about the node.
                assert set(wants_after_failures) == {1}
            finally:
                os.kill(hanging.child.pid, signal.SIGCONT)
            await eventually(world.done)
            await eventually(dispatcher.serving)
            found = jobs_in(server.taken)
            assert (len(found), set(found.values())) == (len(senders) * MAILS, {1})


@pytest.mark.usefixtures("database_url")
async def test_the_faults_of_a_drill_strike_the_cluster_and_the_pooler(
    stores: Stores, cluster: ValkeyCluster
) -> None:
    password = stores.postgres.passwords.password_of("outbox")
    async with pooler(stores.postgres.port, DATABASE, password) as bouncer:

        async def start_again(pooler: PgBouncer) -> None:
            """As the stack of a drill does."""
            await pooler.child.wait()
            await pooler.start()

        faults = StoreFaults(cluster, bouncer, SHARDS)
        replicated = {slot_of(1), slot_of(2)}
        times = (float(number) for number in itertools.count())
        fault = next(
            each
            for each in (Fault(at, "cluster_takeover") for at in times)
            if faults.slot_of(each) in replicated
        )
        slot = faults.slot_of(fault)
        # A replica takes over, and then the node that it took over from.
        owners = [await cluster.owner_of(slot)]
        for _ in range(2):
            await faults.ways["cluster_takeover"](fault)
            owners.append(await cluster.owner_of(slot))
        assert owners[0] is owners[2] is not owners[1]
        await faults.ways["cluster_move"](fault)
        assert await cluster.owner_of(slot) is not owners[2]
        await asyncio.gather(faults.ways["pooler_kill"](fault), start_again(bouncer))
        with psycopg.connect(bouncer.url(DATABASE)) as connection:
            connection.execute("SELECT 1")
