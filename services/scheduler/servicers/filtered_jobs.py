"""Converts the filters of requests for jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from outbox.v1 import email_job_service_pb2

from outbox_server.services.scheduler.servicers.calls import acting_user, listed_user, named_user
from outbox_server.services.scheduler.storage.job_changes import NewTime
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.shared.bounds import MAX_EXPIRE_AFTER
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput, NotFound, Violations
from outbox_server.shared.filters.fields import (
    FieldTest,
    Filter,
    both,
    check_filter,
    possible_values,
    required_value,
    stored_address,
)
from outbox_server.shared.filters.grammar import parse_filter
from outbox_server.shared.filters.resources import (
    JOB_FIELDS,
    JOB_ORDERS,
    check_order,
    wrong_order,
)
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.proto_mapping import from_duration, from_timestamp, parse_id
from outbox_server.shared.rpc.requested_changes import AttributedRequest
from outbox_server.shared.states import JobState, requested_enum

_PARTS: Final = "parts of a set of jobs"
_STATES: Final = frozenset(map(int, JobState))


class JobsRequest(Protocol):
    """The fields that restrict a call to jobs of a sender or batch, and its filter."""

    sender_id: str
    batch_id: str
    filter: str


class JobSetRequest(JobsRequest, AttributedRequest, Protocol):
    """The fields of a request that changes the jobs that match."""

    user_id: str
    validate_only: bool
    page_token: str


def listed_jobs(request: email_job_service_pb2.ListEmailJobsRequest) -> JobFilter:
    """Return which jobs the request lists, and in which order.

    Raises:
        InvalidInput: FILTER_INVALID, ORDER_BY_INVALID, USER_ID_REQUIRED, and others.
    """
    wrong = Violations()
    tree = wrong.value(lambda: job_tree(request), None)
    state = wrong.value(lambda: requested_enum(JobState, request.state, "state"), None)
    if state is not None:
        tree = both(tree, FieldTest("state", "=", int(state)))
    if request.recipient:
        tree = both(tree, FieldTest("recipient", "=", stored_address(request.recipient)))
    field, descending = wrong.value(lambda: check_order(request.order_by, JOB_ORDERS), ("", False))
    wrong.raise_any()
    by_due_time = field == "schedule_time"
    if by_due_time:
        _check_due_order(tree)
    user_id = listed_user(request.user_id, narrowed=is_narrowed(tree))
    return JobFilter(user_id, tree, descending, by_due_time)


def job_tree(request: JobsRequest) -> Filter | None:
    """Return the filter of the request, which includes its sender and its batch."""
    tree = check_filter(parse_filter(request.filter), JOB_FIELDS)
    for field in ("batch_id", "sender_id"):
        text = getattr(request, field)
        if text:
            tree = both(tree, FieldTest(field, "=", _id(text, field)))
    return tree


def is_narrowed(tree: Filter | None) -> bool:
    """Return whether all jobs that match belong to one sender or batch, and so to one user."""
    return any(required_value(tree, field)[0] for field in ("sender_id", "batch_id"))


def _check_due_order(tree: Filter | None) -> None:
    states = possible_values(tree, "state", _STATES)
    if not required_value(tree, "sender_id")[0] or states != {JobState.SCHEDULED}:
        raise wrong_order(
            "`schedule_time` orders the waiting jobs of one sender: restrict the list to "
            "state = SCHEDULED and one sender_id, or order by `create_time`"
        )


def _id(text: str, field: str) -> int | None:
    """Return the id that a text means; None if no resource can have it."""
    try:
        return parse_id(text, field)
    except NotFound:
        return None


@dataclass(frozen=True, slots=True)
class SetPart:
    """The part of a set of jobs with which a call begins."""

    after: JobPosition
    digest: bytes

    def token(self, reached: JobPosition | None) -> str:
        """Return the token of the next part; an empty text if there is none."""
        return "" if reached is None else page_tokens.encode(_PARTS, self.digest, reached)


def changed_jobs(
    request: JobSetRequest,
    method: str,
    check_more: Callable[[], object] = lambda: None,
    *,
    ids: str = "",
) -> tuple[JobFilter, SetPart]:
    """Return which jobs the request changes, and where it begins.

    `check_more` checks other fields, whose errors are raised with those found here. `ids` names the
    field with ids of jobs, which may stand alone.

    Raises:
        InvalidInput: FILTER_REQUIRED, FILTER_INVALID, PAGE_TOKEN_INVALID, USER_ID_REQUIRED.
    """
    wrong = Violations()
    tree = wrong.value(lambda: job_tree(request), None)
    with wrong:
        check_more()
    wrong.raise_any()
    user_id = acting_user(request.user_id) if is_narrowed(tree) else named_user(request.user_id)
    if tree is None and not (ids and getattr(request, ids)):
        names = (
            f"`filter`, `batch_id`, `sender_id` and `{ids}`"
            if ids
            else ("`filter`, `batch_id` and `sender_id`")
        )
        raise InvalidInput.field("filter", f"one of {names} must be set", reason="FILTER_REQUIRED")
    which = JobFilter(user_id, tree)
    digest = page_tokens.digest_filters(
        method, user_id, request.sender_id, request.batch_id, request.filter, request.validate_only
    )
    after = page_tokens.decode(request.page_token, _PARTS, digest, which.start)
    return which, SetPart(after, digest)


def new_time(request: email_job_service_pb2.RescheduleEmailJobsRequest) -> NewTime:
    """Return when the jobs of the request become due.

    Raises:
        InvalidInput: NEW_TIME_INVALID.
    """
    match request.WhichOneof("new_time"):
        case "schedule_time":
            return NewTime(at=from_timestamp(request.schedule_time, "schedule_time"))
        case "delay":
            delay = from_duration(request.delay, "delay")
            if abs(delay) <= MAX_EXPIRE_AFTER:
                return NewTime(delay=delay)
            raise InvalidInput.field(
                "delay",
                f"must be at most {MAX_EXPIRE_AFTER.days} days, in either direction",
                reason="NEW_TIME_INVALID",
            )
    raise InvalidInput.field(
        "schedule_time", "one of `schedule_time` and `delay` must be set", reason="NEW_TIME_INVALID"
    )


def audited_time(new: NewTime) -> dict[str, str]:
    """Return a new due time for the audit log."""
    if new.at is not None:
        return {"schedule_time": new.at.isoformat()}
    sign = "-" if new.delay < timedelta(0) else ""
    return {"delay": f"{sign}{format_duration(abs(new.delay))}"}
