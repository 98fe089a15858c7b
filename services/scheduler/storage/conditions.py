"""Turns filters into conditions of SQL. Every value is a bound parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias
from typing import cast as typed

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    SQLColumnExpression,
    Text,
    and_,
    any_,
    cast,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import array

from outbox_server.shared.database.cancellations import being_cancelled, finished_now
from outbox_server.shared.database.models import Batch, EmailJob, Sender
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.filters.fields import FieldTest, Filter
from outbox_server.shared.filters.grammar import AllOf, AnyOf, Negation
from outbox_server.shared.filters.matching import OPERATORS
from outbox_server.shared.intake.addresses import address_key, folded_key
from outbox_server.shared.intake.tags import external_key
from outbox_server.shared.states import JobState

# A condition of SQL for a comparison.
Leaf: TypeAlias = Callable[[FieldTest], ColumnElement[bool]]


def condition(tree: Filter | None, fields: Mapping[str, Leaf]) -> ColumnElement[bool]:
    """Return the condition that a row matches the filter."""
    match tree:
        case None:
            return true()
        case AllOf(terms):
            return and_(*(condition(term, fields) for term in terms))
        case AnyOf(terms):
            return or_(*(condition(term, fields) for term in terms))
        case Negation(term):
            return not_(condition(term, fields))
        case FieldTest():
            return fields[tree.field.partition(".")[0]](tree)


def column(of: SQLColumnExpression[Any] | Callable[[], Any], *, nullable: bool = False) -> Leaf:
    """Return the leaf that compares a column; an unset value matches only `!=`."""

    def compare(test: FieldTest) -> ColumnElement[bool]:
        if test.value is None:
            return true() if test.operator == "!=" else false()
        compared = of() if callable(of) else of
        found: ColumnElement[bool] = OPERATORS[test.operator](compared, test.value)
        return func.coalesce(found, test.operator == "!=") if nullable else found

    return compare


def labels_of(*stored: Any) -> Leaf:
    """Return the leaf that compares a label, which the first of the columns with it decides."""

    def compare(test: FieldTest) -> ColumnElement[bool]:
        values = [each.op("->>")(literal(test.key, Text)) for each in stored]
        return column(func.coalesce(*values), nullable=True)(test)

    return compare


def _spellings(address: str) -> list[ColumnElement[str]]:
    """Return the lower-case spellings by which jobs to an address are found.

    With the locale C, PostgreSQL's lower() changes ASCII letters only. If the address has other
    letters, only the given spelling and the lower-case spelling are found.
    """
    return [func.lower(literal(each, Text)) for each in sorted({address, address_key(address)})]


def senders_of(user_id: str | None) -> Select[int]:
    """Return the ids of all senders of a user, including deleted ones. None means all users."""
    return owned_by(select(Sender.id), Sender.user_id, user_id)


def hash_is_in(keys: Any, senders: Select[int]) -> ColumnElement[bool]:
    """Return the condition that a job's address may be one of `keys`, by an index.

    It reads only jobs of these senders. `keys` is an array of folded or lower-case addresses, which
    the caller must compare too, because their hashes are compared.
    """
    hashes = func.hashtextextended(func.unnest(keys), Sender.id)
    wanted = senders.with_only_columns(hashes).correlate_except(Sender).scalar_subquery()
    own = select(senders.subquery("own").c.id).scalar_subquery()
    folded = func.coalesce(EmailJob.recipient_key, func.lower(EmailJob.recipient))
    stored = func.hashtextextended(folded, EmailJob.sender_id)
    # The sum keeps the planner from the index of the waiting jobs of each sender.
    owned = EmailJob.sender_id + 0 == any_(func.array(own))
    return (stored == any_(func.array(wanted))) & owned


def is_addressed_to(address: str) -> ColumnElement[bool]:
    """Return the condition that a job goes to `address`, in a form that matches no index."""
    return func.lower(EmailJob.recipient).in_(_spellings(address))


def may_be_to(address: str, senders: Select[int]) -> ColumnElement[bool]:
    """Return the condition that a job of some senders may go to `address`, by an index.

    The condition must be true of every spelling of the address.
    """
    keys = [literal(folded_key(address), Text), *_spellings(address)]
    return hash_is_in(array(keys), senders)


def is_to(address: str, senders: Select[int]) -> ColumnElement[bool]:
    """Return the condition that a job goes to `address`, without regard to case, by an index."""
    return may_be_to(address, senders) & is_addressed_to(address)


def _has_state(state: JobState) -> ColumnElement[bool]:
    """Return the condition that the row of a job has a state, in a form that matches no index.

    A walk reads a few rows of a batch and decides about each. On a table that was just filled, the
    planner would read all jobs in the state instead, by one of the partial indexes.
    """
    return EmailJob.state + 0 == int(state)


def job_state(cancelled: Callable[[], ColumnElement[bool]] = being_cancelled) -> Leaf:
    """Return the leaf of `state`. A job whose row is SCHEDULED is CANCELLED if `cancelled`."""

    def compare(test: FieldTest) -> ColumnElement[bool]:
        state = JobState(typed(int, test.value))
        found = _has_state(state)
        if state is JobState.SCHEDULED:
            found &= ~cancelled()
        elif state is JobState.CANCELLED:
            found |= _has_state(JobState.SCHEDULED) & cancelled()
        return found if test.operator == "=" else not_(found)

    return compare


def _recipient(test: FieldTest) -> ColumnElement[bool]:
    equal = test.operator == "="
    if not isinstance(test.value, str):
        return false() if equal else true()
    found = is_addressed_to(test.value)
    return found if equal else not_(found)


def _of_batch(wanted: Any) -> Any:
    return select(wanted).where(Batch.id == EmailJob.batch_id).correlate(EmailJob).scalar_subquery()


def has_external_id(user_id: str, external_id: str) -> ColumnElement[bool]:
    """Return the condition that a job of this user has this external id, by an index."""
    key = literal(external_key(user_id, external_id), BigInteger)
    return (EmailJob.external_key == key) & (EmailJob.external_id == external_id)


def may_be_labelled(test: FieldTest) -> ColumnElement[bool]:
    """Return the condition on Batch that one of its jobs may match a comparison of a label."""
    return or_(Batch.row_labels, labels_of(Batch.labels)(test))


def _send_time(test: FieldTest) -> ColumnElement[bool]:
    sent = _has_state(JobState.SENT)
    compared = column(EmailJob.finished_at, nullable=True)(test)
    return or_(~sent, compared) if test.operator == "!=" else and_(sent, compared)


_BATCH_LABELS: Final = _of_batch(Batch.labels)
# The conditions of a job, on EmailJob.
JOB_LEAVES: Final[Mapping[str, Leaf]] = {
    "state": job_state(),
    "batch_id": column(EmailJob.batch_id),
    "sender_id": column(EmailJob.sender_id),
    "recipient": _recipient,
    "external_id": column(EmailJob.external_id, nullable=True),
    "labels": labels_of(EmailJob.labels, _BATCH_LABELS),
    "create_time": column(_of_batch(Batch.created_at)),
    "schedule_time": column(EmailJob.scheduled_at),
    "finish_time": column(finished_now, nullable=True),
    "send_time": _send_time,
    # Compared as the largest type, because a filter may have any number.
    "attempt_count": column(cast(EmailJob.attempt, BigInteger)),
    "row_number": column(cast(EmailJob.row_number, BigInteger)),
    "test": column(_of_batch(Batch.test)),
}


def job_leaves(created_at: Any, labels: Any, test: Any) -> Mapping[str, Leaf]:
    """Return JOB_LEAVES with columns of a joined batch, in place of a subquery in each term."""
    return {
        **JOB_LEAVES,
        "create_time": column(created_at),
        "labels": labels_of(EmailJob.labels, labels),
        "test": column(test),
    }


# The conditions of a job that all jobs of a batch share, on Batch.
BATCH_OF_JOB_LEAVES: Final[Mapping[str, Leaf]] = {
    "batch_id": column(Batch.id),
    "sender_id": column(Batch.sender_id),
    "create_time": column(Batch.created_at),
    "test": column(Batch.test),
}
