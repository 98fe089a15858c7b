"""Holds an installation before its dispatchers start."""

from __future__ import annotations

from typing import Final

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.holds.storage import begin_hold
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import HoldReason

_ASKED: Final = "an operator asked for it, by --hold"


async def request_hold(settings: Settings) -> bool:
    """Hold the installation. Return False if it is held already.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database cannot be reached, or has no schema.
    """
    engine = create_engine(settings)
    try:
        async with engine.begin() as connection:
            return await begin_hold(connection, HoldReason.REQUESTED, _ASKED)
    finally:
        await engine.dispose()
