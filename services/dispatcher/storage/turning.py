"""Records what ended and marks what was claimed, in one statement.

Half of the cost of a statement does not depend on its number of jobs, so one is cheaper than two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import CompoundSelect, null, select, union_all

from outbox_server.services.dispatcher.storage.fragments import counting_ends
from outbox_server.services.dispatcher.storage.marking import (
    MarkedJob,
    Marking,
    marked_columns,
    marked_job,
    marking,
)
from outbox_server.services.dispatcher.storage.settling import (
    AttemptRecord,
    ending,
    outcome_values,
)
from outbox_server.shared.database.engine import unix_ms
from outbox_server.shared.database.frequent import FrequentStatement

# The columns of an answer: of a marked job, or its id, nulls, and when an ended job is due.
_DUE: Final = 7


def _turn_statement() -> Any:
    # The settlement must not wait for locks: the marks in the same statement belong to all users,
    # and see only what was committed when the statement began.
    ended, logged = ending(waits=False)
    marked = marking(first=ended)
    jobs = marked_columns(marked)
    nulls: list[Any] = [null()] * len(jobs.selected_columns)
    nulls[0], nulls[_DUE] = ended.c.id, ended.c.scheduled_at
    answer: CompoundSelect[Any] = union_all(jobs, select(*nulls))
    return answer.add_cte(logged, counting_ends(ended, marked))


TURN: Final = FrequentStatement(_turn_statement())


async def settle_and_mark(
    connection: psycopg.AsyncConnection[Any],
    records: Sequence[AttemptRecord],
    now: float,
    claimed: Marking,
    dispatcher: int | None = None,
) -> tuple[dict[int, int], list[MarkedJob]]:
    """Do what `settle` and `mark_sending` do, and return what they return: both or nothing.

    Jobs that somebody else has locked are not settled, and are missing from the result too.
    """
    rows = await TURN.run(connection, outcome_values(records, now, dispatcher) | claimed.values())
    dues: dict[int, int] = {}
    jobs: list[MarkedJob] = []
    for row in rows:
        if row[1] is None:
            dues[row[0]] = unix_ms(row[_DUE])
        else:
            jobs.append(marked_job(row))
    return dues, jobs
