"""Implements HoldService, for operators."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final, TypeVar

from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import hold_pb2, hold_service_pb2, hold_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made
from outbox_server.services.scheduler.holding import LOAD_LIMIT, cancel_held, release_held
from outbox_server.services.scheduler.servicers.calls import Context, acting_user
from outbox_server.services.scheduler.storage import holds as storage
from outbox_server.services.scheduler.storage.holds import (
    HeldFilter,
    HeldGroupRecord,
    HeldSenderRecord,
)
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.holds.storage import begin_hold
from outbox_server.shared.rpc.proto_mapping import (
    from_timestamp,
    id_text,
    parse_id,
    to_timestamp,
)
from outbox_server.shared.states import HoldReason

M = TypeVar("M", bound=Message)

_INVALID: Final = "HELD_FILTER_INVALID"
_REQUESTED: Final = "an operator asked for it"
_STATES: Final = {
    hold_pb2.HELD_STATE_UNSPECIFIED: None,
    hold_pb2.HELD_STATE_WAITING: False,
    hold_pb2.HELD_STATE_SENDING: True,
}


class HoldServicer(hold_service_pb2_grpc.HoldServiceServicer):
    """Shows, begins and ends the hold of the installation."""

    def __init__(self, engine: AsyncEngine, loader: HeadLoader, changes: Changes) -> None:
        self._engine = engine
        self._loader = loader
        self._changes = changes

    async def GetHold(
        self, request: hold_service_pb2.GetHoldRequest, context: Context
    ) -> hold_pb2.Hold:
        """Return the hold, and the numbers of the jobs that it holds."""
        return await self._read(_filter(request.filter))

    async def BeginHold(
        self, request: hold_service_pb2.BeginHoldRequest, context: Context
    ) -> hold_pb2.Hold:
        """Hold the installation."""

        async def begin(connection: AsyncConnection) -> Made[Empty]:
            held = await storage.lock_hold(connection) is not None
            if not held:
                await begin_hold(connection, HoldReason.REQUESTED, _REQUESTED)
            return Made(Empty(), before={"held": False}, after={"held": True}, changed=not held)

        await self._changes.make(request, None, Empty, begin)
        return await self._read(HeldFilter())

    async def ReleaseHeldJobs(
        self, request: hold_service_pb2.ReleaseHeldJobsRequest, context: Context
    ) -> hold_service_pb2.ReleaseHeldJobsResponse:
        """Release held jobs."""
        which = _wanted(request.filter, everything=request.all)

        async def release(
            connection: AsyncConnection,
        ) -> Made[hold_service_pb2.ReleaseHeldJobsResponse]:
            released = await release_held(connection, which)
            answer = hold_service_pb2.ReleaseHeldJobsResponse(
                released_count=released.jobs, hold_ended=released.hold_ended
            )

            async def load() -> None:
                if released.sender_ids:
                    await load_soon(self._loader, released.sender_ids, limit=LOAD_LIMIT)

            return replace(_made(answer, request.filter, which), afterwards=load)

        return await self._changes.make(
            request, which.user_id, hold_service_pb2.ReleaseHeldJobsResponse, release
        )

    async def CancelHeldJobs(
        self, request: hold_service_pb2.CancelHeldJobsRequest, context: Context
    ) -> hold_service_pb2.CancelHeldJobsResponse:
        """Cancel held jobs."""
        which = _wanted(request.filter, everything=request.all)

        async def cancel() -> Made[hold_service_pb2.CancelHeldJobsResponse]:
            cancelled = await cancel_held(self._engine, which)
            answer = hold_service_pb2.CancelHeldJobsResponse(
                cancelled_count=cancelled.jobs,
                more=cancelled.more,
                sending_count=cancelled.sending,
                hold_ended=cancelled.hold_ended,
            )
            return _made(answer, request.filter, which)

        return await self._changes.make_in_parts(
            request, which.user_id, hold_service_pb2.CancelHeldJobsResponse, cancel
        )

    async def _read(self, which: HeldFilter) -> hold_pb2.Hold:
        async with snapshot(self._engine) as connection:
            hold = await storage.lock_hold(connection, lock=False)
            if hold is None:
                return hold_pb2.Hold()
            held = await storage.read_held(connection, which)
            releases = await storage.list_releases(connection)
        return hold_pb2.Hold(
            held=True,
            reason=hold_pb2.HoldReason.ValueType(hold.reason),
            start_time=to_timestamp(hold.held_at),
            detail=hold.detail,
            job_count=sum(group.jobs for group in held.groups),
            groups=map(_to_group, held.groups),
            senders=map(_to_sender, held.senders),
            sender_count=held.sender_count,
            releases=map(_to_filter, releases),
        )


def _made(answer: M, given: hold_pb2.HeldFilter, which: HeldFilter) -> Made[M]:
    """Return the values for the audit log: which jobs, and what happened to them."""
    return Made(
        answer,
        user_id=which.user_id,
        after={
            "filter": json_format.MessageToDict(given, preserving_proto_field_name=True),
            **json_format.MessageToDict(answer, preserving_proto_field_name=True),
        },
    )


def _wanted(given: hold_pb2.HeldFilter, *, everything: bool) -> HeldFilter:
    """Return which held jobs a call is about.

    Raises:
        InvalidInput: FILTER_REQUIRED: it names none. HELD_FILTER_INVALID.
    """
    which = _filter(given)
    if everything and which != HeldFilter():
        raise InvalidInput.field(
            "all", "cannot be combined with a filter; set one of them", reason=_INVALID
        )
    if not everything and which == HeldFilter():
        raise InvalidInput.field(
            "filter", "name at least one field, or set `all`", reason="FILTER_REQUIRED"
        )
    return which


def _filter(given: hold_pb2.HeldFilter) -> HeldFilter:
    wrong = Violations()
    with wrong:
        if given.state not in _STATES:
            raise InvalidInput.field(
                "filter.state",
                f"must be HELD_STATE_WAITING or HELD_STATE_SENDING (got {given.state})",
                reason=_INVALID,
            )
    due_from = wrong.value(lambda: _time(given, given.due_start_time, "due_start_time"), None)
    due_before = wrong.value(lambda: _time(given, given.due_end_time, "due_end_time"), None)
    with wrong:
        if due_from is not None and due_before is not None and due_from >= due_before:
            raise InvalidInput.field(
                "filter.due_end_time", "must be later than due_start_time", reason=_INVALID
            )
    user_id = wrong.value(lambda: acting_user(given.user_id, "filter.user_id"), None)
    wrong.raise_any()
    return HeldFilter(
        user_id=user_id,
        sender_id=parse_id(given.sender_id, "filter.sender_id") if given.sender_id else None,
        batch_id=parse_id(given.batch_id, "filter.batch_id") if given.batch_id else None,
        due_from=due_from,
        due_before=due_before,
        sending=_STATES[given.state],
    )


def _time(given: Message, stamp: Timestamp, name: str) -> datetime | None:
    return from_timestamp(stamp, f"filter.{name}") if given.HasField(name) else None


def _state(*, sending: bool) -> hold_pb2.HeldState.ValueType:
    return hold_pb2.HELD_STATE_SENDING if sending else hold_pb2.HELD_STATE_WAITING


def _to_group(group: HeldGroupRecord) -> hold_pb2.HeldGroup:
    return hold_pb2.HeldGroup(
        state=_state(sending=group.sending),
        age=hold_pb2.HeldAge.ValueType(group.age),
        job_count=group.jobs,
        first_schedule_time=to_timestamp(group.first_due),
        last_schedule_time=to_timestamp(group.last_due),
    )


def _to_sender(sender: HeldSenderRecord) -> hold_pb2.HeldSender:
    return hold_pb2.HeldSender(
        sender_id=id_text(sender.sender_id),
        user_id=sender.user_id,
        email=sender.email,
        job_count=sender.jobs,
        overdue_count=sender.overdue,
        sending_count=sender.sending,
        first_schedule_time=to_timestamp(sender.first_due),
        last_schedule_time=to_timestamp(sender.last_due),
    )


def _to_filter(which: HeldFilter) -> hold_pb2.HeldFilter:
    found = hold_pb2.HeldFilter(
        user_id=which.user_id or "",
        sender_id="" if which.sender_id is None else id_text(which.sender_id),
        batch_id="" if which.batch_id is None else id_text(which.batch_id),
    )
    if which.sending is not None:
        found.state = _state(sending=which.sending)
    if which.due_from is not None:
        found.due_start_time.CopyFrom(to_timestamp(which.due_from))
    if which.due_before is not None:
        found.due_end_time.CopyFrom(to_timestamp(which.due_before))
    return found
