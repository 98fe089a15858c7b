"""Decides whether PostgreSQL was restored, so that mail might be sent a second time. Pure.

docs/operating.md says what is detected and what is not.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, Protocol

from outbox_server.shared.states import HoldReason

# The minimum time between two heartbeats.
BEAT: Final = timedelta(seconds=2)


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def at(self) -> datetime: ...


class _Stored(_Numbered, Protocol):
    @property
    def original(self) -> bool: ...
    @property
    def system_identifier(self) -> int | None: ...
    @property
    def timeline(self) -> int: ...


class _Server(Protocol):
    @property
    def now(self) -> datetime: ...
    @property
    def system_identifier(self) -> int | None: ...
    @property
    def timeline(self) -> int: ...


def find_restore(
    stored: _Stored | None, server: _Server, known: _Numbered | None, hold_after: timedelta
) -> tuple[HoldReason, str] | None:
    """Return why the installation must be held, and what was found; None if it must not.

    `stored` is the heartbeat in PostgreSQL, `known` the newest one that Redis or this process has
    seen. None means that there is none.
    """
    if stored is None:
        if known is None:
            return None  # A new installation, or the first start of this release.
        return HoldReason.RESTORED, (
            f"PostgreSQL has no heartbeat, but Redis knows one of {_at(known.at)}: the database "
            "was restored from a dump of an older release"
        )
    moved = _find_move(stored, server)
    if moved is not None:
        return HoldReason.RESTORED, moved
    lost = _find_loss(stored, server, known, hold_after)
    return None if lost is None else (HoldReason.STEPPED_BACK, lost)


def _find_move(stored: _Stored, server: _Server) -> str | None:
    """Return what shows that the data came from a dump or another cluster; None if nothing does."""
    if not stored.original:
        return (
            f"the last heartbeat, of {_at(stored.at)}, was copied: the database was restored from "
            "a dump, or moved by logical replication"
        )
    if _differ(stored.system_identifier, server.system_identifier):
        return (
            f"mail was last sent at {_at(stored.at)} with the PostgreSQL cluster "
            f"{stored.system_identifier}; this is {server.system_identifier}"
        )
    return None


def _find_loss(
    stored: _Stored, server: _Server, known: _Numbered | None, hold_after: timedelta
) -> str | None:
    """Return what shows that more was lost than a failover may lose; None if nothing does."""
    if known is not None and known.number > stored.number:
        if known.at - stored.at <= hold_after:
            return None
        return (
            f"PostgreSQL is as it was at {_at(stored.at)}, but mail was sent until {_at(known.at)}"
        )
    # Either Redis or this process knows of no much later heartbeat, or there was no time for one.
    confirmed = known is not None and stored.at - known.at <= hold_after
    if confirmed or server.now - stored.at <= hold_after:
        return None
    if not _differ(stored.timeline or None, server.timeline or None):
        return None
    return (
        f"mail was last sent at {_at(stored.at)} on timeline {stored.timeline} of PostgreSQL; this "
        f"is timeline {server.timeline}, and Redis knows nothing of the time between: the database "
        "was recovered to a point in time, or a replica was promoted"
    )


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other


def _at(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
