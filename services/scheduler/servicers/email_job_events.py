"""Implements EmailJobEventService."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Final

from outbox.v1 import (
    email_job_event_pb2,
    email_job_event_service_pb2,
    email_job_event_service_pb2_grpc,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.servicers.calls import Context, named_user
from outbox_server.services.scheduler.storage.batches import batch_exists
from outbox_server.services.scheduler.storage.senders import read_sender
from outbox_server.shared.callers import in_parts
from outbox_server.shared.database.engine import from_unix_ms, unix_ms
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.events.mapping import to_job_event
from outbox_server.shared.events.storage import EventPosition, JobEventRecord, find_start, is_valid
from outbox_server.shared.events.watching import EventFilter, EventPage, EventWatch, expired
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.proto_mapping import from_timestamp, not_found, parse_id
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import requested_states

_WATCHED: Final = "events of jobs"
# The id of the event, and Unix ms.
_POSITION: Final = re.compile(r"(\d{1,18})\.(\d{1,14})")


class EmailJobEventServicer(email_job_event_service_pb2_grpc.EmailJobEventServiceServicer):
    """Streams the changes of jobs."""

    def __init__(self, engine: AsyncEngine, watch: EventWatch, settings: Settings) -> None:
        self._engine = engine
        self._watch = watch
        self._retention = settings.event_retention

    async def WatchEmailJobs(
        self,
        request: email_job_event_service_pb2.WatchEmailJobsRequest,
        context: Context,
    ) -> AsyncIterator[email_job_event_service_pb2.WatchEmailJobsResponse]:
        """Stream the changes of a user's jobs."""
        user_id = named_user(request.user_id)
        stream = page_tokens.digest_filters(user_id)
        which = _filter(request, user_id)
        start = await self._start(request, which, stream)
        async with aclosing(self._watch.follow(which, start)) as pages:
            async for page in pages:
                yield email_job_event_service_pb2.WatchEmailJobsResponse(
                    email_job_events=await in_parts(page.events, partial(_to_event, page)),
                    resume_token=_token(page.position, stream),
                )

    async def _start(
        self,
        request: email_job_event_service_pb2.WatchEmailJobsRequest,
        which: EventFilter,
        stream: bytes,
    ) -> EventPosition | None:
        """Check the filter, and return the position at which to begin; None means now."""
        position = _position(request.resume_token, stream)
        time = (
            from_timestamp(request.start_time, "start_time")
            if request.HasField("start_time")
            else None
        )
        bind_call(which.user_id)
        async with self._engine.connect() as connection:
            if (
                which.sender_id is not None
                and await read_sender(connection, which.sender_id, which.user_id) is None
            ):
                raise not_found("sender_id", request.sender_id)
            if which.batch_id is not None and not await batch_exists(
                connection, which.batch_id, which.user_id
            ):
                raise not_found("batch_id", request.batch_id)
            if position is not None:
                if not await is_valid(connection, position, which.user_id, self._retention):
                    raise expired()
                return position
            return None if time is None else await find_start(connection, time, which.user_id)


def _filter(
    request: email_job_event_service_pb2.WatchEmailJobsRequest, user_id: str
) -> EventFilter:
    states = requested_states(request.states, "states")
    return EventFilter(
        user_id,
        parse_id(request.sender_id, "sender_id") if request.sender_id else None,
        parse_id(request.batch_id, "batch_id") if request.batch_id else None,
        states,
    )


def _to_event(page: EventPage, event: JobEventRecord) -> email_job_event_pb2.EmailJobEvent:
    return to_job_event(event, page.outcome_of(event))


def _token(position: EventPosition, stream: bytes) -> str:
    text = f"{position.event_id}.{unix_ms(position.at)}"
    return page_tokens.encode(_WATCHED, stream, (text,))


def _position(token: str, stream: bytes) -> EventPosition | None:
    found = page_tokens.decode_resume(token, _WATCHED, stream)
    if found is None:
        return None
    parts = _POSITION.fullmatch(str(found[0]))
    try:
        if parts is not None:
            return EventPosition(int(parts[1]), from_unix_ms(int(parts[2])))
    except OverflowError:
        pass
    raise InvalidInput.field(
        "resume_token", "is not a token of this stream", reason="RESUME_TOKEN_INVALID"
    )
