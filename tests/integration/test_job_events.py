"""What it costs to look for the events of one user."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from outbox_server.services.scheduler.storage import webhook_deliveries
from outbox_server.shared.events.storage import EventQuery, read_events

_EVENTS = text(
    "INSERT INTO job_events (user_id, sender_id, batch_id, state, attempt, happened_at)"
    " SELECT 'loud', 1, 1, 1, 0, now() FROM generate_series(1, 200000)"
)
_WEBHOOK = text(
    "INSERT INTO webhooks (id, user_id, url, secret, after_event)"
    " VALUES (1, 'quiet', 'https://x.example/', '', 0)"
)


async def test_one_users_events_cost_others_nothing(database_url: str) -> None:
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.execute(_EVENTS)
            await connection.execute(_WEBHOOK)
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("VACUUM ANALYZE job_events"))
        async with engine.connect() as connection:
            fetched = text(
                "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables"
                " WHERE relname = 'job_events'"
            )
            before = await connection.scalar(fetched) or 0
            found = await webhook_deliveries.find_work(connection, 0, 10**9, 10)
            events = await read_events(connection, [EventQuery("quiet", 0)], 10**9, 10)
            read = (await connection.scalar(fetched) or 0) - before
        assert [one.has_work for one in found] == [False]
        assert events == [[]]
        assert read < 100, read
    finally:
        await engine.dispose()
