"""Implements AuditService, for operators."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import audit_pb2, audit_service_pb2, audit_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.servicers.calls import Context, acting_user
from outbox_server.services.scheduler.storage.audit_events import ChangeFilter, list_changes
from outbox_server.shared.bounds import AUDIT_TARGET
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.errors import Violations
from outbox_server.shared.filters.resources import CHANGE_FIELDS, CHANGE_ORDERS, checked_list
from outbox_server.shared.rpc.page_tokens import MAX_ID
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import from_timestamp, id_text, to_timestamp

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
# Places after and before every event.
_LAST: Final = (MAX_ID, MAX_ID)
_FIRST: Final = (0, 0)


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    """Shows who changed what."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def ListAuditEvents(
        self,
        request: audit_service_pb2.ListAuditEventsRequest,
        context: Context,
    ) -> audit_service_pb2.ListAuditEventsResponse:
        """Return one page of changes, the newest first unless another order is asked for."""
        wrong = Violations()
        tree, descending = checked_list(request, CHANGE_FIELDS, CHANGE_ORDERS, wrong)
        which = ChangeFilter(
            user_id=wrong.value(lambda: acting_user(request.user_id), None),
            target=wrong.value(lambda: AUDIT_TARGET.check("target", request.target), "") or None,
            start=wrong.value(lambda: _time(request, request.start_time, "start_time"), None),
            end=wrong.value(lambda: _time(request, request.end_time, "end_time"), None),
            tree=tree,
        )
        wrong.raise_any()
        filters = (which.user_id, which.target, which.start, which.end)
        start = _LAST if descending else _FIRST
        page = requested_page(request, "audit_events", *filters, start=start)
        after = None if page.after == start else (_from_us(page.after[0]), page.after[1])
        async with self._engine.connect() as connection:
            found, reached = await list_changes(
                connection, which, after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, _position, None if reached is None else (_to_us(reached[0]), reached[1])
        )
        return audit_service_pb2.ListAuditEventsResponse(
            audit_events=map(_to_event, shown), next_page_token=token
        )


def _time(request: Message, stamp: Timestamp, name: str) -> datetime | None:
    return from_timestamp(stamp, name) if request.HasField(name) else None


def _position(change: RecordedChange) -> tuple[int, int]:
    return _to_us(change.happened_at or _EPOCH), change.event_id


def _to_us(at: datetime) -> int:
    return (at - _EPOCH) // _MICROSECOND


def _from_us(us: int) -> datetime:
    """Return a time; the last one that exists for a number that a caller has made up."""
    return _EPOCH + min(us, _LAST_US) * _MICROSECOND


def _to_event(change: RecordedChange) -> audit_pb2.AuditEvent:
    event = audit_pb2.AuditEvent(
        audit_event_id=id_text(change.event_id),
        event_time=to_timestamp(change.happened_at or _EPOCH),
        actor=change.actor,
        identity=change.identity,
        reason=change.reason,
        action=change.action,
        target=change.target,
        user_id=change.user_id or "",
    )
    if change.before is not None:
        event.before.CopyFrom(_struct(change.before))
    if change.after is not None:
        event.after.CopyFrom(_struct(change.after))
    return event


def _struct(values: Any) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct
