"""The operator's key that `outbox up` keeps in its folder."""

from __future__ import annotations

import asyncio
from pathlib import Path

from outbox_server.deploy.embedded.operator_key import operator_key_in
from outbox_server.shared.auth.keys import ApiKeyKind
from outbox_server.shared.auth.store import list_keys, revoke_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings


async def revoke(database_url: str, key_id: str) -> None:
    engine = create_engine(load_settings(database_url=database_url))
    async with engine.begin() as connection:
        (stored,) = await list_keys(connection, None)
        assert (stored.kind, stored.key_id) == (ApiKeyKind.OPERATOR, key_id)
        await revoke_key(connection, key_id)
    await engine.dispose()


def test_the_next_start_uses_the_same_key_unless_it_was_revoked(
    database_url: str, tmp_path: Path
) -> None:
    file = operator_key_in(tmp_path, database_url)
    first = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert operator_key_in(tmp_path, database_url).read_text() == first
    asyncio.run(revoke(database_url, first.split("_")[1]))
    assert operator_key_in(tmp_path, database_url).read_text() != first


def test_an_unreadable_key_is_replaced(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "operator_key").write_text("obx_cut\n")
    assert operator_key_in(tmp_path, database_url).read_text().startswith("obx_")
    assert operator_key_in(tmp_path, database_url).read_text() != "obx_cut\n"
