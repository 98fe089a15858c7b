"""The statements of the settings that must agree."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.agreed.values import KEYED, AgreedSettings, AgreedValues, texts_of
from outbox_server.shared.database.audit_events import RecordedChange, record_change
from outbox_server.shared.database.models import AgreedSettingsRow as Stored

ACTION: Final = "settings.set"
_MILLISECOND: Final = timedelta(milliseconds=1)
# The maximum number of earlier key spaces that are remembered. Older ones have no keys any more.
_MOST_OLD: Final = 50
_IDLE_LIMIT: Final = "10s"
_COLUMNS: Final = (
    Stored.shards,
    Stored.rate_window_ms,
    Stored.min_gap_ms,
    Stored.user_hourly_limit,
    Stored.user_gap_ms,
    Stored.uncertain_policy,
    Stored.key_space,
    Stored.old_key_spaces,
)


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """The stored settings before and after a change."""

    before: AgreedSettings
    after: AgreedSettings


def _agreed(row: Any) -> AgreedSettings:
    values = AgreedValues(
        shards=row.shards,
        rate_window=row.rate_window_ms * _MILLISECOND,
        min_gap=row.min_gap_ms * _MILLISECOND,
        user_hourly_limit=row.user_hourly_limit,
        user_gap=row.user_gap_ms * _MILLISECOND,
        uncertain_policy=row.uncertain_policy,
    )
    return AgreedSettings(values, row.key_space, tuple(row.old_key_spaces))


def _columns(values: AgreedValues) -> dict[str, Any]:
    return {
        "shards": values.shards,
        "rate_window_ms": values.rate_window // _MILLISECOND,
        "min_gap_ms": values.min_gap // _MILLISECOND,
        "user_hourly_limit": values.user_hourly_limit,
        "user_gap_ms": values.user_gap // _MILLISECOND,
        "uncertain_policy": values.uncertain_policy,
    }


async def read_agreed(connection: AsyncConnection) -> AgreedSettings | None:
    """Return the stored settings; None before the first process has started."""
    row = (await connection.execute(select(*_COLUMNS))).one_or_none()
    return None if row is None else _agreed(row)


async def read_or_store(engine: AsyncEngine, values: AgreedValues) -> AgreedSettings:
    """Return the stored settings. On an empty installation, store these first."""
    async with engine.connect() as connection:
        found = await read_agreed(connection)
    if found is not None:
        return found
    async with engine.begin() as connection:
        # If several processes start at once, one of them stores its values.
        await connection.execute(insert(Stored).values(**_columns(values)).on_conflict_do_nothing())
        return _agreed((await connection.execute(select(*_COLUMNS))).one())


async def change_agreed(
    connection: AsyncConnection, wanted: Mapping[str, Any], defaults: AgreedValues, actor: str
) -> SettingsChange:
    """Change stored settings within the caller's transaction, and record who did it.

    `wanted` has values by name. `defaults` are stored first on an empty installation.
    The lock on the row waits for all marks in progress. Later marks wait for the commit:
    `services.dispatcher.storage.marking`.
    """
    # All marks wait for this transaction, so it must not stay open if the network fails.
    limit = func.set_config("idle_in_transaction_session_timeout", _IDLE_LIMIT, True)
    await connection.execute(select(limit))
    await connection.execute(insert(Stored).values(**_columns(defaults)).on_conflict_do_nothing())
    locked = select(*_COLUMNS).with_for_update()
    before = _agreed((await connection.execute(locked)).one())
    after = replace(before, values=replace(before.values, **wanted))
    changed = after.values.changed_from(before.values)
    if not changed:
        return SettingsChange(before, before)
    columns = _columns(after.values)
    if set(changed) & set(KEYED):
        old = (*before.old_key_spaces, before.key_space)[-_MOST_OLD:]
        # The name is random, so that a restored database never names the keys of other values.
        after = replace(after, key_space=secrets.token_hex(4), old_key_spaces=old)
        columns |= {"key_space": after.key_space, "old_key_spaces": list(old)}
    if set(changed) & set(KEYED) - {"shards"}:
        columns["limits_changed_at"] = func.clock_timestamp()
    await connection.execute(update(Stored).values(**columns))
    await record_change(
        connection,
        RecordedChange(
            actor,
            ACTION,
            before=texts_of({name: getattr(before.values, name) for name in changed}),
            after=texts_of({name: getattr(after.values, name) for name in changed}),
        ),
    )
    return SettingsChange(before, after)


async def read_limits_change(connection: AsyncConnection) -> datetime | None:
    """Return when a window or a gap of the installation last changed. None means never."""
    found: datetime | None = await connection.scalar(select(Stored.limits_changed_at))
    return found
