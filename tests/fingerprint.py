"""The contents of all tables, to check that a call changed nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from outbox_server.shared.database.models import Base
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler

# Counts may be folded at any time, and a marker is deleted when its head is loaded. Events are
# counted now and then.
MOVING: Final = (
    "job_event_counting",
    "job_event_counts",
    "count_deltas",
    "batch_counts",
    "sender_counts",
    "sender_hour_counts",
    "head_markers",
)


class Fingerprint:
    """Return the contents of all tables."""

    def __init__(self, scheduler: Scheduler, but: Collection[str] = ()) -> None:
        """`but` names tables whose contents do not count."""
        # Its kept connection knows the tables after the first time.
        self._scheduler = scheduler
        left_out = {*MOVING, *but}
        # One statement: a plan for each table takes longer than reading its contents.
        self._statement = " UNION ALL ".join(
            f"SELECT '{table.name}', count(*), md5(string_agg(t::text, '|' ORDER BY t::text))"
            f" FROM {table.name} t"
            for table in Base.metadata.sorted_tables
            if table.name not in left_out
        )

    async def take(self) -> dict[str, Any]:
        """Return each table's number of rows and hash, by the table's name.

        The rows of many jobs are written after the call's answer: wait until they are.
        """
        await eventually(self._no_rows_are_left)
        return {name: found for name, *found in self._scheduler.rows(self._statement)}

    def _no_rows_are_left(self) -> bool:
        return bool(
            self._scheduler.value(
                "SELECT NOT EXISTS (SELECT FROM batch_cancellations)"
                " AND NOT EXISTS (SELECT FROM job_changes)"
                " AND NOT EXISTS (SELECT FROM batch_respreads)"
            )
        )
