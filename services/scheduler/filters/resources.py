"""The fields that filters of each list may name, and the orders that each list has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final

from outbox_server.services.scheduler.filters.fields import FieldKind, FilterField
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.states import JobState, SenderState


class ShownBatchState(IntEnum):
    """The states of a batch that callers see, numbered as in the proto."""

    ACTIVE = 1
    CANCELLED = 2
    DONE = 3
    PAUSED = 4


def _states(kind: type[IntEnum], prefix: str) -> FilterField:
    names = {state.name: int(state) for state in kind}
    long = {f"{prefix}{name}": number for name, number in names.items()}
    return FilterField(FieldKind.STATE, names | long)


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
# The orders of each list. The first one is the default.
JOB_ORDERS: Final = ("create_time", "create_time desc", "schedule_time", "schedule_time desc")
BATCH_ORDERS: Final = ("create_time desc", "create_time")
SENDER_ORDERS: Final = ("create_time", "create_time desc")
SUPPRESSION_ORDERS: Final = ("email", "email desc")


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
