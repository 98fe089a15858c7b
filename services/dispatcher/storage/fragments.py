"""SQL fragments that several modules share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    FromClause,
    bindparam,
    cast,
    func,
    insert,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL

from outbox_server.shared.database.count_deltas import counting_moves
from outbox_server.shared.database.models import Attempt
from outbox_server.shared.states import FINAL_STATES, JobState


def array(name: str, type_: Any) -> Any:
    """Return a parameter with one value for each job of a statement."""
    return bindparam(name, type_=ARRAY(type_))


def milliseconds(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return `value` milliseconds as an interval."""
    return value * cast("1 millisecond", INTERVAL)


def log_attempts(source: FromClause, **values: ColumnElement[Any]) -> CTE:
    """Return the part of a statement that records attempts. `values` are by column name."""
    ended = select(*values.values()).select_from(source)
    return insert(Attempt).from_select(list(values), ended).cte("logged")


def counting_ends(*moved: CTE) -> CTE:
    """Return the part of a statement that counts the jobs it moved to a final state.

    Each of `moved` has sender_id, batch_id, state and finished_at.
    """
    finals = [
        select(each.c.sender_id, each.c.batch_id, each.c.state, each.c.finished_at).where(
            each.c.state.in_(FINAL_STATES)
        )
        for each in moved
    ]
    final = (union_all(*finals) if len(finals) > 1 else finals[0]).subquery("final")
    hour = func.date_trunc("hour", final.c.finished_at)
    groups = (
        select(
            final.c.sender_id,
            final.c.batch_id,
            hour.label("hour"),
            final.c.state,
            func.count().label("n"),
        )
        .group_by(final.c.sender_id, final.c.batch_id, hour, final.c.state)
        .cte("groups")
    )
    return counting_moves(groups, was=JobState.SCHEDULED)
