"""The promises of the fixtures: real servers, and no data of other tests."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from redis.asyncio import Redis

SENDER = "INSERT INTO senders (user_id, email, hourly_limit) VALUES ('u', 'a@x.test', 1)"


@pytest.mark.parametrize("visit", [1, 2])
def test_the_test_database_has_the_schema_and_no_rows(database_url: str, visit: int) -> None:
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM senders").fetchone() == (0,)
        connection.execute(SENDER)
    assert visit


@pytest.mark.parametrize("visit", [1, 2])
async def test_the_test_redis_is_empty(redis: Redis, redis_url: str, visit: int) -> None:
    assert await redis.dbsize() == 0
    await redis.set("left", visit)
    async with Redis.from_url(redis_url) as another:
        assert await another.dbsize() == 1


@pytest.mark.parametrize("visit", [1, 2])
def test_a_new_database_belongs_to_one_test(
    database_url: str, new_database: Callable[[], str], visit: int
) -> None:
    first, second = new_database(), new_database()

    with psycopg.connect(first) as connection:
        connection.execute(SENDER)
    for url in (second, database_url):
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM senders").fetchone() == (0,)
    assert visit


def test_the_schema_belongs_to_a_role_without_privileges(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        found = connection.execute(
            "SELECT DISTINCT tableowner::text, usesuper FROM pg_tables"
            " JOIN pg_user ON usename = tableowner WHERE schemaname = 'public'"
        ).fetchall()

    assert found == [("outbox", False)]
