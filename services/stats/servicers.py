"""Implements StatsService: converts protos to the domain and back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any, Final

import grpc
from outbox.v1 import email_job_pb2, stats_pb2, stats_service_pb2, stats_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.stats import storage
from outbox_server.services.stats.auditing import audit, requested_interval
from outbox_server.services.stats.forecasts import forecast, requested_plan
from outbox_server.services.stats.series import requested_buckets, series
from outbox_server.services.stats.storage import WatchedSender
from outbox_server.services.stats.storage.endpoints import EndpointCounts, read_endpoints
from outbox_server.shared.callers import CallerKind, current_caller, effective_user, require_user
from outbox_server.shared.errors import Violations
from outbox_server.shared.filters.fields import Value
from outbox_server.shared.filters.matching import selected
from outbox_server.shared.filters.resources import (
    ENDPOINT_FIELDS,
    ENDPOINT_ORDERS,
    checked_list,
)
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import (
    id_text,
    not_found,
    parse_id,
    to_cooldown,
    to_duration,
    to_job_counts,
    to_timestamp,
)
from outbox_server.shared.rpc.watching import Watch
from outbox_server.shared.smtp.latencies import quantile

_WATCHED: Final = "sender_stats"
_MOST_ENDPOINTS: Final = 1_000
# The values that a filter of ListEndpointStats compares.
_ENDPOINT_VALUES: Final[Mapping[str, Callable[[EndpointCounts], Value]]] = {
    "user_id": lambda one: one.user_id,
    "host": lambda one: one.host,
    "port": lambda one: one.port,
    "attempt_count": lambda one: sum(one.replies),
    "dispatcher_count": lambda one: one.dispatchers,
    "circuit_open_time": lambda one: one.circuit_open_at,
    "next_probe_time": lambda one: one.next_probe_at,
}


class StatsServicer(stats_service_pb2_grpc.StatsServiceServicer):
    """Answers from PostgreSQL only."""

    def __init__(
        self, engine: AsyncEngine, rules: Callable[[], Rules], watch: Watch[WatchedSender]
    ) -> None:
        self._watch = watch
        self._engine = engine
        self._rules = rules

    async def GetSenderStats(
        self,
        request: stats_service_pb2.GetSenderStatsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_pb2.SenderStats:
        """Return the counts of one sender."""
        user_id = effective_user(current_caller(), request.user_id)
        sender_id = parse_id(request.sender_id, "sender_id")
        async with storage.snapshot(self._engine) as connection:
            found = await storage.read_sender(connection, sender_id, user_id, self._rules().window)
        if found is None:
            raise not_found("sender_id", request.sender_id)
        return _sender_stats(found)

    async def GetUserStats(
        self,
        request: stats_service_pb2.GetUserStatsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_pb2.UserStats:
        """Return the counts of one user, and of one page of the user's senders."""
        user_id = require_user(current_caller(), request.user_id)
        page = requested_page(request, "user_stats", user_id, start=(0,))
        async with storage.snapshot(self._engine) as connection:
            found = await storage.read_user(connection, user_id, *page.after, page.limit)
        shown, token = page.cut(found.senders, lambda sender: (sender.sender_id,))
        return _user_stats(user_id, replace(found, senders=shown), token)

    async def ListEndpointStats(
        self,
        request: stats_service_pb2.ListEndpointStatsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_service_pb2.ListEndpointStatsResponse:
        """Return the recent counts at the endpoints of one user, or of all users."""
        caller = current_caller()
        everyone = caller.kind in (CallerKind.OPERATOR, CallerKind.LOCAL)
        which = effective_user if everyone else require_user
        wrong = Violations()
        user_id = wrong.value(lambda: which(caller, request.user_id), None)
        tree, descending = checked_list(request, ENDPOINT_FIELDS, ENDPOINT_ORDERS, wrong)
        wrong.raise_any()
        async with self._engine.connect() as connection:
            found = selected(await read_endpoints(connection, user_id), tree, _ENDPOINT_VALUES)
        found.sort(key=lambda one: sum(one.replies), reverse=descending)
        return stats_service_pb2.ListEndpointStatsResponse(
            endpoint_stats=map(_endpoint_stats, found[:_MOST_ENDPOINTS])
        )

    async def ForecastBatch(
        self,
        request: stats_service_pb2.ForecastBatchRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_service_pb2.ForecastBatchResponse:
        """Return when all mails of a batch, real or planned, will have been sent."""
        planned = requested_plan(request)
        user_id = effective_user(current_caller(), request.user_id)
        return await forecast(self._engine, request, user_id, planned, self._rules())

    async def AuditSender(
        self,
        request: stats_service_pb2.AuditSenderRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_service_pb2.AuditSenderResponse:
        """Check the recorded attempts of a sender against its limits."""
        interval = requested_interval(request)
        user_id = effective_user(current_caller(), request.user_id)
        return await audit(self._engine, request, user_id, interval, self._rules())

    async def QuerySenderSeries(
        self,
        request: stats_service_pb2.QuerySenderSeriesRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> stats_service_pb2.QuerySenderSeriesResponse:
        """Return the results of a sender over time."""
        buckets = requested_buckets(request)
        user_id = effective_user(current_caller(), request.user_id)
        return await series(self._engine, request, user_id, buckets)

    async def WatchSenderStats(
        self,
        request: stats_service_pb2.WatchSenderStatsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[stats_service_pb2.WatchSenderStatsResponse]:
        """Stream the counts of a sender as they change, until it is deleted."""
        user_id = effective_user(current_caller(), request.user_id)
        sender_id = parse_id(request.sender_id, "sender_id")
        stream = page_tokens.digest_filters(sender_id)
        seen = page_tokens.decode_resume(request.resume_token, _WATCHED, stream)
        async with storage.snapshot(self._engine) as connection:
            if not await storage.sender_exists(connection, sender_id, user_id):
                raise not_found("sender_id", request.sender_id)
        async with aclosing(self._watch.follow(sender_id)) as changes:
            async for found in changes:
                state = (_state_of(found),)
                if state != seen:
                    yield stats_service_pb2.WatchSenderStatsResponse(
                        stats=None if found.stats is None else _sender_stats(found.stats),
                        resume_token=page_tokens.encode(_WATCHED, stream, state),
                        done=found.stats is None,
                    )
                if found.stats is None:
                    return
                seen = None


def _endpoint_stats(found: EndpointCounts) -> stats_pb2.EndpointStats:
    opened, probe = found.circuit_open_at, found.next_probe_at
    half, most = quantile(found.latencies, 0.5), quantile(found.latencies, 0.99)
    return stats_pb2.EndpointStats(
        user_id=found.user_id,
        host=found.host,
        port=found.port,
        attempt_count=sum(found.replies),
        replies=[
            stats_pb2.ReplyClassCount(
                reply_class=email_job_pb2.ReplyClass.ValueType(number), count=count
            )
            for number, count in enumerate(found.replies)
            if count
        ],
        latency_p50=None if half is None else to_duration(half),
        latency_p99=None if most is None else to_duration(most),
        circuit_open_time=None if opened is None else to_timestamp(opened),
        next_probe_time=None if probe is None else to_timestamp(probe),
        dispatcher_count=found.dispatchers,
    )


def _state_of(found: WatchedSender) -> str:
    """Return a digest of the state, without the time at which it was read."""
    if found.stats is None:
        return "deleted"
    values = (getattr(found.stats, each.name) for each in fields(found.stats) if each.compare)
    return page_tokens.digest_filters(*values).hex()


def _sender_stats(stats: storage.SenderStats) -> stats_pb2.SenderStats:
    return stats_pb2.SenderStats(
        sender_id=id_text(stats.sender_id),
        counts=to_job_counts(stats.counts),
        hours=[
            stats_pb2.HourCounts(
                start_time=to_timestamp(hour.start), sent_count=hour.sent, failed_count=hour.failed
            )
            for hour in stats.hours
        ],
        waiting_count=stats.counts.scheduled,
        next_email_job_id="" if stats.next_job_id is None else id_text(stats.next_job_id),
        next_schedule_time=None if stats.next_due is None else to_timestamp(stats.next_due),
        window_used_count=stats.window_used,
        hourly_limit=stats.hourly_limit,
        cooldown=to_cooldown(stats.cooldown),
        read_time=to_timestamp(stats.read_at),
    )


def _user_stats(
    user_id: str, stats: storage.UserStats, next_page_token: str
) -> stats_pb2.UserStats:
    return stats_pb2.UserStats(
        user_id=user_id,
        counts=to_job_counts(stats.counts),
        senders=[
            stats_pb2.SenderCounts(
                sender_id=id_text(sender.sender_id),
                email=sender.email,
                counts=to_job_counts(sender.counts),
            )
            for sender in stats.senders
        ],
        next_page_token=next_page_token,
        read_time=to_timestamp(stats.read_at),
    )
