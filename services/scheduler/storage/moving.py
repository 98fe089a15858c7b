"""What belongs to each statement that moves jobs between states: the counts, and the markers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, SmallInteger, insert, literal, select, union_all

from shared.models import CountDelta, HeadMarker
from shared.states import JobState


def count_moves(groups: CTE, hour: Any, was: JobState, state: JobState) -> CTE:
    """Append what changes in the counts; `groups` has sender_id, batch_id and how many (n)."""
    return (
        insert(CountDelta)
        .from_select(
            ("sender_id", "batch_id", "hour", "state", "n"),
            union_all(
                *(
                    select(
                        groups.c.sender_id,
                        groups.c.batch_id,
                        hour,
                        literal(int(of), SmallInteger),
                        sign * groups.c.n,
                    )
                    for of, sign in ((was, -1), (state, 1))
                )
            ),
        )
        .cte("deltas")
    )


def mark_heads(groups: CTE) -> CTE:
    """Ask for a load of the heads that are not what they were, should the caller die."""
    senders = select(groups.c.sender_id).distinct()
    return insert(HeadMarker).from_select(("sender_id",), senders).cte("markers")
