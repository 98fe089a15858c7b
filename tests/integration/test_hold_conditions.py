"""What dispatchers may send while the installation is held: the heads, and the marks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from outbox_server.shared.holds.storage import begin_hold, end_hold, read_hold
from outbox_server.shared.states import HoldReason
from tests.marked_jobs import OVER, mark, recover
from tests.world import World

DAY = timedelta(days=1)


async def hold(world: World) -> None:
    async with world.engine.begin() as connection:
        assert await begin_hold(connection, HoldReason.REQUESTED, "a test")


async def release(world: World, **columns: Any) -> None:
    """Replace all releases by one."""
    await world.sql("DELETE FROM hold_releases")
    await world.sql(
        f"INSERT INTO hold_releases ({', '.join(columns)})"
        f" VALUES ({', '.join('%s' for _ in columns)})",
        *columns.values(),
    )


async def marked(world: World, jobs: list[int], attempt: int = 1) -> set[int]:
    """Return which of these jobs a dispatcher may mark; none of them stays marked."""
    async with world.engine.connect() as connection:
        found = await mark(connection, jobs, attempt)
        await connection.rollback()
    return set(found)


async def in_head(world: World, sender: int) -> int:
    """Return the number of jobs in the head of a sender, loaded now."""
    await world.loader.load([sender], committed=True)
    key = world.loader.queue_of(sender).keys.ready.replace("ready", f"due:{sender}")
    return int(await world.redis.zcard(key))


async def test_only_what_a_release_matches_is_loaded_and_marked(world: World) -> None:
    ann, ben = await world.sender(user="ann"), await world.sender(user="ben")
    today = await world.schedule(ann, 2, due=-DAY)
    later = await world.schedule(ann, 3)
    other = await world.schedule(ben, 4, due=-DAY)
    everything = [*today, *later, *other]
    assert await marked(world, everything) == set(everything)
    (sending,) = today[:1]
    async with world.engine.begin() as connection:
        await mark(connection, [sending], lease=OVER)
    await hold(world)
    assert await recover(world) == [ann]
    (batch,) = {(await world.job(job)).batch_id for job in later}
    (row,) = await world.sql("SELECT now() - interval '1 hour' AS soon")

    async def sendable() -> set[int]:
        return await marked(world, everything) | await marked(world, [sending], attempt=2)

    assert await sendable() == set()
    assert [await in_head(world, sender) for sender in (ann, ben)] == [0, 0]
    for columns, jobs, heads in (
        ({"sender_id": ann}, {*today, *later}, (5, 0)),
        ({"user_id": "ben"}, {*other}, (0, 4)),
        ({"user_id": "ben", "sender_id": ann}, set(), (0, 0)),
        ({"batch_id": batch}, {*later}, (3, 0)),
        ({"due_before": row.soon}, {*today, *other}, (2, 4)),
        ({"due_from": row.soon}, {*later}, (3, 0)),
        ({"sending": True}, {sending}, (1, 0)),
        ({"sending": False, "user_id": "ann"}, {*today[1:], *later}, (4, 0)),
    ):
        await release(world, **columns)
        assert await sendable() == jobs, columns
        assert tuple([await in_head(world, sender) for sender in (ann, ben)]) == heads, columns
    async with world.engine.begin() as connection:
        await end_hold(connection)
    assert await sendable() == set(everything)


async def test_a_released_job_that_is_tried_again_later_stays_released(world: World) -> None:
    sender = await world.sender()
    first, second = await world.schedule(sender, 2, due=-DAY)
    await hold(world)
    (row,) = await world.sql("SELECT now() - interval '1 hour' AS soon")
    await release(world, due_before=row.soon)
    # Its first attempt has failed, and the next one is due after the end of the filter.
    await world.sql(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted) VALUES (%s, 1, %s, now(), now(), 2, true)",
        first,
        sender,
    )
    await world.sql("UPDATE email_jobs SET attempt = 1 WHERE id = %s", first)
    await world.sql("UPDATE email_jobs SET scheduled_at = now()")
    assert await marked(world, [first], attempt=2) == {first}
    assert await marked(world, [second]) == set()


async def test_senders_without_released_mail_are_not_loaded_again_and_again(world: World) -> None:
    for _ in range(3):
        await world.schedule(await world.sender(), 2, load=False)
    released = await world.sender()
    await world.schedule(released, 1, load=False)
    await hold(world)
    await release(world, sender_id=released)
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    known = await world.redis.keys(queue.keys.ready.replace("ready", "sender:*"))
    assert known == [queue.keys.ready.replace("ready", f"sender:{released}")]


async def test_a_second_hold_changes_nothing_and_a_new_one_forgets_old_releases(
    world: World,
) -> None:
    await hold(world)
    await release(world, user_id="ann")
    async with world.engine.begin() as connection:
        before = await read_hold(connection)
        assert not await begin_hold(connection, HoldReason.RESTORED, "again")
        assert await read_hold(connection) == before
        await end_hold(connection)
        assert await read_hold(connection) is None
    await world.sql("INSERT INTO hold_releases (user_id) VALUES ('ann')")
    await hold(world)
    assert await world.sql("SELECT * FROM hold_releases") == []
