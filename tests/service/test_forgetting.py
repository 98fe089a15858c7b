"""What the scheduler removes: old and surplus requests and audit events."""

from __future__ import annotations

from outbox_server.services.scheduler.forgetting import Forgetter
from outbox_server.shared.database.engine import create_engine
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler
from tests.service.test_changes import creation, events, new_id


async def test_old_and_surplus_requests_and_events_are_removed(scheduler: Scheduler) -> None:
    names = [new_id() for _ in range(5)]
    for name in names:
        await scheduler.senders.CreateSender(creation(name))
    scheduler.execute(
        "UPDATE change_requests SET created_at = now() - interval '25 h' WHERE request_id = %s",
        names[0],
    )
    scheduler.execute(
        "UPDATE audit_events SET happened_at = now() - interval '366 d'"
        " WHERE id = (SELECT min(id) FROM audit_events)"
    )
    engine = create_engine(scheduler.settings)
    retention = scheduler.settings.audit_retention
    forgetter = Forgetter(engine, retention, most_requests=3, most_events=3)

    async def forgotten() -> bool:
        # The scheduler may hold the rows in its own first turn.
        await forgetter.forget()
        left = scheduler.rows("SELECT request_id FROM change_requests ORDER BY created_at")
        return [name for (name,) in left] == names[2:] and len(await events(scheduler)) == 3

    await eventually(forgotten)
    await engine.dispose()


async def test_a_user_cannot_push_the_events_of_operators_out_of_the_audit_log(
    scheduler: Scheduler,
) -> None:
    for actor, action, count in (
        ("key:operator", "UpdateUser", 2),
        ("key:ann", "UpdateSender", 9),
        # What is frequent pushes out nothing that is rare.
        ("key:ann", "ScheduleBatch", 3),
        ("key:ann", "SendTestEmail", 3),
        ("key:service", "UploadBatch", 1),
    ):
        scheduler.execute(
            "INSERT INTO audit_events (actor, action, user_id, happened_at) SELECT %s, %s, 'ann',"
            " now() + n * interval '1 s' FROM generate_series(1, %s) AS n",
            *(actor, action, count),
        )
    engine = create_engine(scheduler.settings)
    await Forgetter(engine, None, most_events=3).forget()
    await engine.dispose()
    left = scheduler.rows(
        "SELECT actor, action, count(*) FROM audit_events GROUP BY 1, 2 ORDER BY 1, 2"
    )
    assert left == [
        ("key:ann", "ScheduleBatch", 1),
        ("key:ann", "SendTestEmail", 2),
        ("key:ann", "UpdateSender", 3),
        ("key:operator", "UpdateUser", 2),
        ("key:service", "UploadBatch", 1),
    ]
