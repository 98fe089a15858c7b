"""Finds the last event that readers may read, so that they skip none that is committed late.

Ids are drawn in one order and committed in another. A reader that remembered only the last id that
it has seen would miss an event with a smaller id that is committed later. So readers stop at the
horizon: every event up to it is committed, or never will be.

A transaction takes a shared advisory lock before it draws its first id, and releases it after its
rows are visible. The horizon is the last id that was drawn before the holders of the lock were
read, as soon as none of those holders is left. Other long transactions, such as backups, hold no
such lock, so they do not delay readers. An upload takes it at its end only.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.events.storage import EventPosition, read_drawn, read_writers


@dataclass(slots=True)
class _Pending:
    position: EventPosition
    # The transactions that may still commit an event up to `position`.
    writers: frozenset[str]


class Horizon:
    """The position up to which one process may read."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        # None means that it is not known yet.
        self.position: EventPosition | None = None

    def reset(self) -> None:
        """Forget the position, because it is old, or of another server."""
        self._pending = None
        self.position = None

    @property
    def is_pending(self) -> bool:
        """Whether a look a moment later may find a later position."""
        return self._pending is not None

    async def advance(self, connection: AsyncConnection) -> bool:
        """Move the position as far as possible. `connection` must be READ COMMITTED.

        Statements after this one see all events up to it. Return whether ids were drawn again since
        the last call: after a restore, or when a replica took over.
        """
        drawn = await read_drawn(connection)
        writers = await read_writers(connection)
        stepped_back = self.position is not None and drawn.event_id < self.position.event_id
        if stepped_back:
            self.reset()
        if not writers:
            self._pending = None
            self.position = drawn
            return stepped_back
        if self._pending is not None:
            self._pending.writers &= writers
            if not self._pending.writers:
                self.position = self._pending.position
                self._pending = None
        if self._pending is None:
            self._pending = _Pending(drawn, writers)
        return stepped_back
