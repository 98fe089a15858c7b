"""The fields that filters of each list may name, and the orders that each list has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final, Protocol

from outbox_server.shared.auth.keys import ApiKeyKind
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.filters.fields import FieldKind, Filter, FilterField, check_filter
from outbox_server.shared.filters.grammar import parse_filter
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass, SenderState


class ShownBatchState(IntEnum):
    """The states of a batch that callers see, numbered as in the proto."""

    ACTIVE = 1
    CANCELLED = 2
    DONE = 3
    PAUSED = 4


class DeliveryState(IntEnum):
    """The states of a failed delivery of a webhook, numbered as in the proto."""

    PENDING = 1
    FAILED = 2


class ShownDispatcherState(IntEnum):
    """The states of a dispatcher, numbered as in the proto."""

    SERVING = 1
    DRAINING = 2


def _states(kind: type[IntEnum], prefix: str) -> FilterField:
    return FilterField(FieldKind.STATE, {state.name: int(state) for state in kind}, prefix)


_ID: Final = FilterField(FieldKind.ID)
_TIME: Final = FilterField(FieldKind.TIME)
_NUMBER: Final = FilterField(FieldKind.NUMBER)
_TEXT: Final = FilterField(FieldKind.TEXT)
_ADDRESS: Final = FilterField(FieldKind.ADDRESS)
_LABELS: Final = FilterField(FieldKind.LABELS)
_FLAG: Final = FilterField(FieldKind.FLAG)

JOB_FIELDS: Final[Mapping[str, FilterField]] = {
    "state": _states(JobState, "EMAIL_JOB_STATE_"),
    "batch_id": _ID,
    "sender_id": _ID,
    "recipient": _ADDRESS,
    "external_id": _TEXT,
    "labels": _LABELS,
    "create_time": _TIME,
    "schedule_time": _TIME,
    "finish_time": _TIME,
    "send_time": _TIME,
    "attempt_count": _NUMBER,
    "row_number": _NUMBER,
    "test": _FLAG,
}
BATCH_FIELDS: Final[Mapping[str, FilterField]] = {
    "state": _states(ShownBatchState, "BATCH_STATE_"),
    "sender_id": _ID,
    "request_id": _TEXT,
    "external_id": _TEXT,
    "labels": _LABELS,
    "create_time": _TIME,
    "schedule_time": _TIME,
    "accepted_count": _NUMBER,
    "rejected_count": _NUMBER,
    "test": _FLAG,
}
SENDER_FIELDS: Final[Mapping[str, FilterField]] = {
    "state": _states(SenderState, "SENDER_STATE_"),
    "email": _ADDRESS,
    "create_time": _TIME,
    "update_time": _TIME,
}
SUPPRESSION_FIELDS: Final[Mapping[str, FilterField]] = {"reason": _TEXT, "create_time": _TIME}
CHANGE_FIELDS: Final[Mapping[str, FilterField]] = {
    "actor": _TEXT,
    "identity": _TEXT,
    "action": _TEXT,
    "target": _TEXT,
    "user_id": _TEXT,
    "event_time": _TIME,
}
DELIVERY_FIELDS: Final[Mapping[str, FilterField]] = {
    "state": _states(DeliveryState, "WEBHOOK_DELIVERY_STATE_"),
    "event_count": _NUMBER,
    "attempt_count": _NUMBER,
    "http_status": _NUMBER,
    "create_time": _TIME,
    "next_attempt_time": _TIME,
}
REJECTION_FIELDS: Final[Mapping[str, FilterField]] = {
    "row_number": _NUMBER,
    "column": _TEXT,
    "reason": _TEXT,
}
KEY_FIELDS: Final[Mapping[str, FilterField]] = {
    "kind": _states(ApiKeyKind, "API_KEY_KIND_"),
    "user_id": _TEXT,
    "display_name": _TEXT,
    "read_only": _FLAG,
    "create_time": _TIME,
    "expire_time": _TIME,
    "last_use_time": _TIME,
    "revoke_time": _TIME,
}
WEBHOOK_FIELDS: Final[Mapping[str, FilterField]] = {
    "url": _TEXT,
    "sender_id": _ID,
    "disabled": _FLAG,
    "create_time": _TIME,
}
ATTEMPT_FIELDS: Final[Mapping[str, FilterField]] = {
    "attempt_number": _NUMBER,
    "outcome": _states(AttemptOutcome, "ATTEMPT_OUTCOME_"),
    "reply_class": _states(ReplyClass, "REPLY_CLASS_"),
    "smtp_code": _NUMBER,
    "enhanced_code": _TEXT,
    "dispatcher_id": _TEXT,
    "endpoint": _TEXT,
    "start_time": _TIME,
    "end_time": _TIME,
}
USER_FIELDS: Final[Mapping[str, FilterField]] = {"user_id": _TEXT, "update_time": _TIME}
DISPATCHER_FIELDS: Final[Mapping[str, FilterField]] = {
    "dispatcher_id": _TEXT,
    "state": _states(ShownDispatcherState, "DISPATCHER_STATE_"),
    "in_flight_count": _NUMBER,
    "concurrency": _NUMBER,
    "oldest_lease_time": _TIME,
    "start_time": _TIME,
    "report_time": _TIME,
}
ENDPOINT_FIELDS: Final[Mapping[str, FilterField]] = {
    "user_id": _TEXT,
    "host": _TEXT,
    "port": _NUMBER,
    "attempt_count": _NUMBER,
    "dispatcher_count": _NUMBER,
    "circuit_open_time": _TIME,
    "next_probe_time": _TIME,
}
# The orders of each list. The first one is the default.
JOB_ORDERS: Final = ("create_time", "create_time desc", "schedule_time", "schedule_time desc")
BATCH_ORDERS: Final = ("create_time desc", "create_time")
SENDER_ORDERS: Final = ("create_time", "create_time desc")
SUPPRESSION_ORDERS: Final = ("email", "email desc")
CHANGE_ORDERS: Final = ("event_time desc", "event_time")
DELIVERY_ORDERS: Final = ("create_time", "create_time desc")
REJECTION_ORDERS: Final = ("row_number", "row_number desc")
KEY_ORDERS: Final = ("api_key_id", "api_key_id desc")
WEBHOOK_ORDERS: Final = ("create_time", "create_time desc")
ATTEMPT_ORDERS: Final = ("attempt_number", "attempt_number desc")
USER_ORDERS: Final = ("user_id", "user_id desc")
DISPATCHER_ORDERS: Final = ("start_time", "start_time desc")
ENDPOINT_ORDERS: Final = ("attempt_count desc", "attempt_count")


class FilteredList(Protocol):
    """The fields of a request for a list that has a filter and an order."""

    filter: str
    order_by: str


def checked_list(
    request: FilteredList,
    fields: Mapping[str, FilterField],
    orders: Sequence[str],
    wrong: Violations,
) -> tuple[Filter | None, bool]:
    """Return the filter of a list, and whether it is descending. Errors are added to `wrong`."""
    tree = wrong.value(lambda: check_filter(parse_filter(request.filter), fields), None)
    _, descending = wrong.value(lambda: check_order(request.order_by, orders), ("", False))
    return tree, descending


def check_order(text: str, orders: Sequence[str]) -> tuple[str, bool]:
    """Return the field of `order_by` (AIP-132), and whether it is descending.

    Raises:
        InvalidInput: ORDER_BY_INVALID: the list has no such order.
    """
    words = text.split() or orders[0].split()
    field, *direction = words
    order = field if direction in ([], ["asc"]) else " ".join(words)
    if order not in orders:
        raise wrong_order(f"must be one of: {', '.join(orders)} (got {text[:80]!r})")
    return field, direction == ["desc"]


def wrong_order(problem: str) -> InvalidInput:
    """Return the error for an `order_by` that the list does not have."""
    return InvalidInput.field("order_by", problem, reason="ORDER_BY_INVALID")
