"""The jobs that a call is about, and what its filter implies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from sqlalchemy import BigInteger, ColumnElement, Select, and_, literal, true, tuple_

from outbox_server.services.scheduler.storage.conditions import (
    BATCH_OF_JOB_LEAVES,
    condition,
    may_be_labelled,
)
from outbox_server.shared.database.models import Batch
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.filters.fields import (
    FieldTest,
    Filter,
    names_only,
    possible_values,
    required,
    required_value,
)
from outbox_server.shared.states import JobState

# An id above all others.
LAST_ID: Final = 2**63 - 1
ALL_STATES: Final = frozenset(JobState)

# The batch and the job; the job 0 or LAST_ID is before or after all jobs of the batch. In the order
# of due times: the time in us since 1970, and the job.
JobPosition: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs a call is about, and in which order. None means any."""

    user_id: str | None
    tree: Filter | None = None
    descending: bool = False
    # Whether the order is that of due times instead of acceptance. Only for waiting jobs of one
    # sender.
    by_due_time: bool = False

    @property
    def states(self) -> frozenset[JobState]:
        """The states that a match can have."""
        numbers = possible_values(self.tree, "state", frozenset(map(int, ALL_STATES)))
        return frozenset(map(JobState, numbers))

    def only(self, field: str) -> Any:
        """Return the one value of `field` that all matches have; None if there is none."""
        return required_value(self.tree, field)[1]

    @property
    def start(self) -> JobPosition:
        """The position before the first match."""
        return (LAST_ID, LAST_ID) if self.descending else (0, 0)

    def after_batch(self, batch_id: int) -> JobPosition:
        """Return the position after all jobs of a batch."""
        return batch_id, 0 if self.descending else LAST_ID

    def ordered(self, *columns: Any) -> Sequence[Any]:
        """Return the columns to order by."""
        return [each.desc() if self.descending else each.asc() for each in columns]

    def beyond(self, columns: Sequence[Any], position: Sequence[Any]) -> ColumnElement[bool]:
        """Return the condition that the columns come after a position."""
        place, other = tuple_(*columns), tuple_(*position)
        return place < other if self.descending else place > other

    def owned(self, statement: Select[Any]) -> Select[Any]:
        """Return a statement on Batch, restricted to the batches that can have matches."""
        statement = owned_by(statement, Batch.user_id, self.user_id)
        for field, column in (("sender_id", Batch.sender_id), ("batch_id", Batch.id)):
            known, value = required_value(self.tree, field)
            if known:
                # No id is negative.
                statement = statement.where(column == (-1 if value is None else value))
        return statement


@dataclass(frozen=True, slots=True)
class FoundJobs:
    """Batch and id of the jobs that a walk found, and the position where the next one continues.

    `reached` is None if there are no more jobs, or if as many were found as were wanted.
    """

    found: Sequence[JobPosition]
    reached: JobPosition | None = None


def id_after(job: JobPosition) -> list[ColumnElement[int]]:
    """Return a position as values of SQL."""
    return [literal(part, BigInteger) for part in job]


def is_batch_level(tree: Filter) -> bool:
    """Return whether all jobs of a batch match the filter, or none."""
    return names_only(tree, BATCH_OF_JOB_LEAVES.__contains__)


def batch_condition(tree: Filter | None) -> ColumnElement[bool]:
    """Return the condition on batches that the filter implies."""
    terms = required(tree)
    implied = [condition(each, BATCH_OF_JOB_LEAVES) for each in terms if is_batch_level(each)]
    implied += [may_be_labelled(each) for each in terms if isinstance(each, FieldTest) and each.key]
    return and_(true(), *implied)
