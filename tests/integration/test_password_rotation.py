"""The rotation of stored passwords to a new key: all of them, in chunks, resumable."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner, Result

from outbox_server.cli.main import app
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import OAuth2CredentialsRow, Sender
from outbox_server.shared.database.secret_rotation import rotate_chunk, rotate_oauth2_chunk
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.secrets import SecretBox, generate_key
from outbox_server.shared.settings import load_settings

OLD, NEW, LOST = generate_key(), generate_key(), generate_key()
BOTH = SecretBox([NEW, OLD])


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=database_url))
    yield engine
    await engine.dispose()


async def store(engine: AsyncEngine, key: str, passwords: Sequence[str | None]) -> list[int]:
    box = SecretBox([key])
    rows = [
        {
            "user_id": "ann",
            "email": "a@x.test",
            "hourly_limit": 1,
            "smtp_password": None if password is None else box.encrypt(password),
        }
        for password in passwords
    ]
    async with engine.begin() as connection:
        made = await connection.execute(insert(Sender).values(rows).returning(Sender.id))
        return sorted(made.scalars())


async def passwords(engine: AsyncEngine, key: str) -> dict[int, str]:
    """Return the passwords that can be decrypted with this key alone."""
    box, found = SecretBox([key]), {}
    async with engine.connect() as connection:
        rows = (await connection.execute(select(Sender.id, Sender.smtp_password))).all()
    for sender_id, token in rows:
        if token is not None:
            try:
                found[sender_id] = box.decrypt(token)
            except Exception:  # noqa: BLE001 - another key's
                continue
    return found


async def command(database_url: str, *keys: str) -> Result:
    variables = {name: None for name in os.environ if name.startswith("OUTBOX_")}
    environment: dict[str, str | None] = {
        **variables,
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_ENCRYPTION_KEYS": ",".join(keys),
    }
    argv = ["keys", "rotate-encryption", "-o", "json"]
    return await asyncio.to_thread(CliRunner().invoke, app, argv, env=environment)


async def test_every_password_is_encrypted_with_the_new_key_and_unchanged(
    engine: AsyncEngine, database_url: str
) -> None:
    old = await store(engine, OLD, ["p1", None, "p2"])
    (new,) = await store(engine, NEW, ["p3"])

    done = await command(database_url, NEW, OLD)
    assert done.exit_code == 0, done.output
    counts = {"rotated_count": 2, "current_count": 1, "unreadable_sender_ids": []}
    assert json.loads(done.stdout) == counts
    assert await passwords(engine, NEW) == {old[0]: "p1", old[2]: "p2", new: "p3"}
    assert await passwords(engine, OLD) == {}
    async with engine.connect() as connection:
        assert set(await connection.scalars(select(Sender.revision))) == {1}

    again = await command(database_url, NEW, OLD)
    assert json.loads(again.stdout)["rotated_count"] == 0


async def test_an_interrupted_rotation_continues(engine: AsyncEngine, database_url: str) -> None:
    ids = await store(engine, OLD, [f"p{n}" for n in range(5)])
    async with engine.begin() as connection:
        chunk = await rotate_chunk(connection, BOTH, 0, limit=2)
    assert (chunk.looked_at, chunk.rotated, chunk.last_id) == (2, 2, ids[1])
    async with engine.connect() as connection:
        await rotate_chunk(connection, BOTH, ids[1], limit=2)
        await connection.rollback()
    assert len(await passwords(engine, NEW)) == 2

    done = json.loads((await command(database_url, NEW, OLD)).stdout)
    assert (done["rotated_count"], done["current_count"]) == (3, 2)
    assert len(await passwords(engine, NEW)) == 5


async def test_a_password_of_a_lost_key_is_reported_and_stops_no_other(
    engine: AsyncEngine, database_url: str
) -> None:
    (lost,) = await store(engine, LOST, ["gone"])
    (old,) = await store(engine, OLD, ["p1"])

    done = await command(database_url, NEW, OLD)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["unreadable_sender_ids"] == [str(lost)]
    assert f"sender {lost}" in done.stderr
    assert await passwords(engine, NEW) == {old: "p1"}


async def store_oauth2(engine: AsyncEngine, sender_id: int, **tokens: bytes) -> None:
    values: dict[str, Any] = {
        "token_url": "https://x.test/t",
        "client_id": "id",
        "scope": "",
        **tokens,
    }
    if "access_token" in tokens:
        values |= {"refresh_at": func.now(), "expires_at": func.now()}
    async with engine.begin() as connection:
        await connection.execute(insert(OAuth2CredentialsRow).values(sender_id=sender_id, **values))


async def oauth2_secrets(engine: AsyncEngine, key: str) -> dict[int, list[str | None]]:
    """Return the secrets of each sender with secrets; `?`: this key cannot decrypt it."""
    box = SecretBox([key])
    found: dict[int, list[str | None]] = {}
    async with engine.connect() as connection:
        rows = await connection.execute(select(OAuth2CredentialsRow.__table__))
        for row in rows:
            shown: list[str | None] = []
            for token in (row.client_secret, row.refresh_token, row.access_token):
                try:
                    shown.append(None if token is None else box.decrypt(token))
                except FailedPrecondition:
                    shown.append("?")
            found[row.sender_id] = shown
    return found


async def test_secrets_and_tokens_of_oauth2_are_rotated_too(
    engine: AsyncEngine, database_url: str
) -> None:
    old, new = SecretBox([OLD]), SecretBox([NEW])
    first, second, third = await store(engine, OLD, [None, None, "p1"])
    await store_oauth2(
        engine,
        first,
        client_secret=old.encrypt("s1"),
        refresh_token=old.encrypt("r1"),
        access_token=old.encrypt("a1"),
    )
    # A dispatcher that already has the new key wrote the newest refresh token.
    await store_oauth2(
        engine, second, client_secret=old.encrypt("s2"), refresh_token=new.encrypt("r2")
    )
    await store_oauth2(engine, third, client_secret=new.encrypt("s3"))

    done = await command(database_url, NEW, OLD)
    assert done.exit_code == 0, done.output
    counts = {"rotated_count": 3, "current_count": 1, "unreadable_sender_ids": []}
    assert json.loads(done.stdout) == counts
    assert await oauth2_secrets(engine, NEW) == {
        first: ["s1", "r1", "a1"],
        second: ["s2", "r2", None],
        third: ["s3", None, None],
    }
    again = await command(database_url, NEW, OLD)
    assert json.loads(again.stdout)["rotated_count"] == 0


async def test_only_lost_oauth2_secrets_are_reported_not_lost_access_tokens(
    engine: AsyncEngine, database_url: str
) -> None:
    lost, old = SecretBox([LOST]), SecretBox([OLD])
    first, second = await store(engine, OLD, [None, None])
    await store_oauth2(
        engine, first, client_secret=old.encrypt("s1"), refresh_token=lost.encrypt("r1")
    )
    await store_oauth2(
        engine, second, refresh_token=old.encrypt("r2"), access_token=lost.encrypt("a2")
    )
    done = await command(database_url, NEW, OLD)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["unreadable_sender_ids"] == [str(first)]
    assert await oauth2_secrets(engine, NEW) == {
        first: ["s1", "?", None],
        second: [None, "r2", "?"],
    }


async def test_oauth2_is_rotated_in_chunks(engine: AsyncEngine) -> None:
    ids = await store(engine, OLD, [None] * 3)
    for sender in ids:
        await store_oauth2(engine, sender, refresh_token=SecretBox([OLD]).encrypt("r"))
    after, looked_at = 0, []
    while True:
        async with engine.begin() as connection:
            chunk = await rotate_oauth2_chunk(connection, BOTH, after, limit=2)
        if chunk.last_id is None:
            break
        after = chunk.last_id
        looked_at.append((chunk.looked_at, chunk.rotated))
    assert looked_at == [(2, 2), (1, 1)]


@pytest.mark.parametrize("keys", [(), (OLD,), (OLD, ""), (OLD, OLD)])
async def test_a_rotation_without_a_new_key_is_refused(
    engine: AsyncEngine, database_url: str, keys: tuple[str, ...]
) -> None:
    await store(engine, OLD, ["p1"])
    done = await command(database_url, *keys)
    assert done.exit_code == 2
    assert "NEW,OLD" in done.stderr
    assert len(await passwords(engine, OLD)) == 1


async def test_a_password_that_is_changed_meanwhile_is_not_overwritten(
    engine: AsyncEngine,
) -> None:
    (sender,) = await store(engine, OLD, ["before"])
    async with engine.begin() as rotating:
        await rotate_chunk(rotating, BOTH, 0)
        # UpdateSender does the same: it waits for the end of the rotation, and its change persists.
        changing = asyncio.create_task(_change(engine, sender, "after"))
        await asyncio.wait([changing], timeout=0.1)
        assert not changing.done()
    await changing
    assert await passwords(engine, NEW) == {sender: "after"}


async def _change(engine: AsyncEngine, sender_id: int, password: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            update(Sender)
            .where(Sender.id == sender_id)
            .values(smtp_password=BOTH.encrypt(password))
        )
