"""Finds the jobs that match a filter, with a bounded number of rows read per call.

A walk goes through the batches of a user in the order of their ids, and through the jobs of each
in the same order, by indexes on columns that never change. The filter is applied row by row. So
any filter may be used, and none can make a call read more than ROWS_READ rows: a walk that has
read this many ends, and says where the next one continues. A page may then be short, or empty.

The counts of a batch tell whether it has jobs in a wanted state; other batches are left out. Jobs
in FAILED and UNCERTAIN have an index of their own, and so do the jobs of `short_walks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    any_,
    case,
    func,
    lateral,
    literal,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import condition, job_leaves
from outbox_server.services.scheduler.storage.counted_states import may_have
from outbox_server.services.scheduler.storage.job_filters import (
    ALL_STATES,
    LAST_ID,
    FoundJobs,
    JobFilter,
    JobPosition,
    batch_condition,
    is_batch_level,
)
from outbox_server.services.scheduler.storage.short_walks import (
    walk_address,
    walk_due,
    walk_external_id,
    walk_in_flight,
)
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.filters.fields import (
    earliest,
    latest,
    required,
    required_value,
)
from outbox_server.shared.id_source import FIRST_ISSUED_ID, ids_of_time
from outbox_server.shared.states import JobState

# The number of rows that one walk reads, in about 10 ms.
ROWS_READ: Final = 5_000
# The number of batches that one walk looks at, and whose jobs it reads at once.
_BATCHES_SEEN: Final = 2_000
_BATCHES_AT_ONCE: Final = 200
_BATCHES_AT_FIRST: Final = 25
# The first group of batches has at least this many rows.
_FIRST_ROWS: Final = 200
# Each further group has this many times as many rows.
_GROWTH: Final = 5
# Jobs in these states have an index of their own, which is almost empty.
TROUBLE: Final = frozenset({JobState.FAILED, JobState.UNCERTAIN})


def in_trouble() -> ColumnElement[bool]:
    """Return the condition of the index of jobs in FAILED and UNCERTAIN."""
    states = [literal(int(state), Integer, literal_execute=True) for state in sorted(TROUBLE)]
    return EmailJob.state.in_(states)


async def walk_jobs(
    connection: AsyncConnection,
    which: JobFilter,
    after: JobPosition,
    limit: int,
    *,
    rows: int | None = None,
) -> FoundJobs:
    """Return the first `limit` matching jobs after a position, reading about `rows` rows.

    None means ROWS_READ.
    """
    rows = rows or ROWS_READ
    if which.by_due_time:
        return await walk_due(connection, which, after, limit, rows)
    if which.states == {JobState.SENDING}:
        return await walk_in_flight(connection, which, after, limit)
    if which.user_id is not None and required_value(which.tree, "external_id")[0]:
        return await walk_external_id(connection, which, after, limit, rows)
    if required_value(which.tree, "recipient")[0]:
        few = await walk_address(connection, which, after, limit)
        if few is not None:
            return few
    return await _JobWalk(connection, which, limit, rows).run(after)


async def walk_batches(
    connection: AsyncConnection,
    which: JobFilter,
    matches: ColumnElement[bool],
    after: JobPosition,
    limit: int,
) -> FoundJobs:
    """Return jobs as `walk_jobs` does, but always by the batches, reading about `limit` rows.

    `matches` is a further condition on the jobs.
    """
    return await _JobWalk(connection, which, limit, limit, matches).run(after)


async def skip_older(
    connection: AsyncConnection, which: JobFilter, after: JobPosition
) -> JobPosition:
    """Return the position to begin with, by the time that ids of batches contain."""
    tree = which.tree
    if which.descending:
        until = latest(tree, "create_time")
        return after if until is None else min(after, (ids_of_time(until)[1], LAST_ID))
    since = earliest(tree, "create_time")
    first = 0 if since is None else ids_of_time(since)[0]
    if first <= after[0]:
        return after
    older: Any = select(Batch.id).where(Batch.id < FIRST_ISSUED_ID).limit(1)
    has_older = await connection.scalar(which.owned(older)) is not None
    return after if has_older else (first, 0)


def next_batches(which: JobFilter, position: JobPosition) -> Select[Any]:
    """Return the statement that reads the batches from a position on, not ordered yet."""
    listed: Any = select(Batch.id, Batch.accepted_count)
    statement = which.owned(listed)
    batch_id, job_id = position
    if which.descending:
        statement = statement.where(Batch.id <= batch_id if job_id else Batch.id < batch_id)
        since = earliest(which.tree, "create_time")
        if since is not None:
            first = Batch.id >= ids_of_time(since)[0]
            statement = statement.where(or_(first, Batch.id < FIRST_ISSUED_ID))
    else:
        unread = job_id < LAST_ID
        statement = statement.where(Batch.id >= batch_id if unread else Batch.id > batch_id)
        until = latest(which.tree, "create_time")
        if until is not None:
            statement = statement.where(Batch.id <= ids_of_time(until)[1])
    return statement


@dataclass(frozen=True, slots=True)
class _BatchRows:
    """A batch, and the largest number of rows that have to be read of it."""

    batch_id: int
    rows: int


class _JobWalk:
    """One walk through batches and their jobs."""

    def __init__(
        self,
        connection: AsyncConnection,
        which: JobFilter,
        limit: int,
        rows: int,
        matches: ColumnElement[bool] | None = None,
    ) -> None:
        self._connection = connection
        self._which = which
        self._limit = limit
        self._left = rows
        self._found: list[JobPosition] = []
        self._group_rows = max(_FIRST_ROWS, 2 * limit)
        of_jobs = [term for term in required(which.tree) if not is_batch_level(term)]
        # Every row that is read is a match.
        self._matches_all = not of_jobs and matches is None
        self._of_jobs = of_jobs
        self._matching = true() if matches is None else matches
        self._in_trouble = which.states <= TROUBLE
        self._batches_wanted = _BATCHES_AT_FIRST

    async def run(self, after: JobPosition) -> FoundJobs:
        """Walk until enough was found, all was read, or the rows are used up."""
        if not self._which.states:
            return FoundJobs([])
        position: JobPosition | None = await skip_older(self._connection, self._which, after)
        more_seen = True
        while position is not None and self._left > 0 and more_seen:
            batches, following, more_seen = await self._candidates(position)
            stopped = await self._read(batches, position)
            if len(self._found) >= self._limit:
                return FoundJobs(self._found)
            position = following if stopped is None else stopped
        return FoundJobs(self._found, position)

    async def _candidates(
        self, position: JobPosition
    ) -> tuple[list[_BatchRows], JobPosition | None, bool]:
        """Return the next batches that may have matches.

        The second value is the position after them, None if there are no more batches; the third
        one is whether this walk may look at more batches.
        """
        which, limit = self._which, min(self._batches_wanted, _BATCHES_AT_ONCE)
        self._batches_wanted = _BATCHES_AT_ONCE
        wanted = batch_condition(which.tree)
        if which.states != ALL_STATES:
            wanted &= may_have(which.states)
        found = await search(
            self._connection,
            next_batches(which, position),
            Batch.id,
            None if which.tree is None else wanted,
            limit,
            descending=which.descending,
            most=_BATCHES_SEEN,
        )
        ids = [row.id for row in found.rows]
        rows = {row.id: row.accepted_count for row in found.rows}
        if self._in_trouble:
            for batch_id, counts in (await batch_counts(self._connection, ids)).items():
                rows[batch_id] = sum(counts[state] for state in TROUBLE)
        batches = [_BatchRows(batch_id, max(rows[batch_id], 1)) for batch_id in ids]
        if len(batches) == limit:
            return batches, which.after_batch(ids[-1]), True
        if found.reached is None:
            return batches, None, False
        return batches, which.after_batch(found.reached), False

    async def _read(
        self, batches: Sequence[_BatchRows], position: JobPosition
    ) -> JobPosition | None:
        """Read the batches in groups. Return None, or the position where the rows were used up."""
        at = 0
        while at < len(batches) and len(self._found) < self._limit:
            if self._left <= 0:
                return position
            most = min(self._group_rows, self._left)
            self._group_rows *= _GROWTH
            group = self._group(batches, at, most)
            rows, until = sum(each.rows for each in group), None
            if rows > most and not self._matches_all:
                # Only a single batch can have more than `most`.
                rows, until = await self._boundary(group[0].batch_id, position, most)
            ids = [each.batch_id for each in group]
            found = await self._matches(ids, position, until)
            self._found += found
            self._left -= max(len(found), len(group)) if self._matches_all else rows
            if until is None:
                at += len(group)
                position = self._which.after_batch(ids[-1])
            else:
                position = ids[0], until
        return None if at == len(batches) else position

    @staticmethod
    def _group(batches: Sequence[_BatchRows], at: int, most: int) -> Sequence[_BatchRows]:
        """Return the batches from `at` on to read with one statement: few rows, or one batch."""
        end, rows = at + 1, batches[at].rows
        while end < len(batches) and rows + batches[end].rows <= most:
            rows += batches[end].rows
            end += 1
        return batches[at:end]

    async def _boundary(
        self, batch_id: int, position: JobPosition, most: int
    ) -> tuple[int, int | None]:
        """Return how many rows of a batch may be read, and the last of them; None if all may."""
        which = self._which
        after = position[1] if position[0] == batch_id else which.start[1]
        jobs = (
            select(EmailJob.id)
            .where(self._within(literal(batch_id, BigInteger), literal(after, BigInteger)))
            .order_by(*which.ordered(EmailJob.batch_id, EmailJob.id))
        )
        part = jobs.limit(most).subquery("part")
        last = func.min(part.c.id) if which.descending else func.max(part.c.id)
        row = (await self._connection.execute(select(func.count(), last))).one()
        rows, end = row
        return max(rows, 1), end if rows == most else None

    def _within(
        self, batch_id: ColumnElement[int], after: ColumnElement[int], until: int | None = None
    ) -> ColumnElement[bool]:
        """Return the condition that a job is of a batch, after one job and up to another.

        Pairs are compared, as the index by batches and jobs orders them. With an equal sign for the
        batch, the planner might read the primary key, with the jobs of all other batches.
        """
        which = self._which
        place = (EmailJob.batch_id, EmailJob.id)
        end = 0 if which.descending else LAST_ID
        found = which.beyond(place, (batch_id, after))
        found &= ~which.beyond(place, (batch_id, literal(end if until is None else until)))
        if not self._in_trouble:
            return found
        return found & in_trouble()

    async def _matches(
        self, batch_ids: Sequence[int], position: JobPosition, until: int | None
    ) -> list[JobPosition]:
        """Return the matching jobs of some batches after the position, up to the limit."""
        which = self._which
        given = literal(list(batch_ids), ARRAY(BigInteger))
        listed = select(Batch.id, Batch.created_at, Batch.labels, Batch.test)
        listed = listed.where(Batch.id == any_(given))
        batches = listed.subquery("batch")
        leaves = job_leaves(batches.c.created_at, batches.c.labels, batches.c.test)
        terms = [condition(term, leaves) for term in self._of_jobs]
        here, start = batches.c.id == position[0], literal(which.start[1], BigInteger)
        after = case((here, literal(position[1], BigInteger)), else_=start)
        place = (EmailJob.batch_id, EmailJob.id)
        within = self._within(batches.c.id, after, until)
        jobs = select(*place).where(within, self._matching, *terms)
        left = self._limit - len(self._found)
        part = lateral(jobs.order_by(*which.ordered(*place)).limit(left), "part")
        statement = (
            select(part.c.batch_id, part.c.id)
            .select_from(batches)
            .join(part, true())
            # The jobs are found by the batches, whose index has the order of the result, so the
            # read ends early.
            .order_by(*which.ordered(batches.c.id, part.c.id))
            .limit(left)
        )
        return [(row.batch_id, row.id) for row in await self._connection.execute(statement)]
