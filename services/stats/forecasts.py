"""Answers ForecastBatch: converts protos to the forecast and back."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Literal

from outbox.v1 import sender_pb2, stats_service_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.stats import storage
from outbox_server.services.stats.planned import PlannedBatch, check_planned
from outbox_server.shared.errors import InvalidInput, NotFound, Violations
from outbox_server.shared.forecast.forecasts import (
    HELD_NOTICE,
    Forecast,
    forecast_batch,
    forecast_planned,
)
from outbox_server.shared.forecast.microseconds import to_us
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.forecast.simulation import Bound, JobGroup
from outbox_server.shared.rpc.proto_mapping import (
    from_duration,
    from_timestamp,
    not_found,
    parse_id,
    to_cooldown,
    to_timestamp,
)

_MICROSECOND: Final = timedelta(microseconds=1)
_OPTIONS: Final = "planned_batch.options"
_TIMES: Final[tuple[Literal["schedule_time", "spread_until"], ...]] = (
    "schedule_time",
    "spread_until",
)
_DURATIONS: Final[tuple[Literal["expire_after", "spacing"], ...]] = ("expire_after", "spacing")
_LIMITS: Final = {
    Bound.SPACING: sender_pb2.BINDING_LIMIT_SPACING,
    Bound.GAP: sender_pb2.BINDING_LIMIT_MIN_GAP,
    Bound.WINDOW: sender_pb2.BINDING_LIMIT_HOURLY_LIMIT,
    Bound.USER_WINDOW: sender_pb2.BINDING_LIMIT_USER_HOURLY_LIMIT,
    Bound.USER_GAP: sender_pb2.BINDING_LIMIT_USER_GAP,
    Bound.HOURS: sender_pb2.BINDING_LIMIT_SENDING_HOURS,
    Bound.COOLDOWN: sender_pb2.BINDING_LIMIT_COOLDOWN,
    Bound.PAUSE: sender_pb2.BINDING_LIMIT_PAUSE,
}
_REASONS: Final = {
    None: "only its due time delays it",
    Bound.SPACING: "the spacing of its mails binds",
    Bound.GAP: "the sender's gap binds",
    Bound.WINDOW: "the sender's hourly limit binds",
    Bound.USER_WINDOW: "the hourly limit of its user for all senders binds",
    Bound.USER_GAP: "the gap of its user for all senders binds",
    Bound.HOURS: "the sender's sending hours bind",
    Bound.COOLDOWN: "the sender's cooldown binds",
    Bound.PAUSE: "the sender's pause binds",
    Bound.PLACES: "the duration of each send binds",
}


async def forecast(
    engine: AsyncEngine,
    request: stats_service_pb2.ForecastBatchRequest,
    user_id: str | None,
    planned: PlannedBatch | None,
    rules: Rules,
) -> stats_service_pb2.ForecastBatchResponse:
    """Answer ForecastBatch. `planned` is None if the batch exists.

    Raises:
        InvalidInput: SPREAD_UNTIL_INVALID.
        NotFound: BATCH_NOT_FOUND, SENDER_NOT_FOUND.
    """
    if planned is None:
        batch_id = parse_id(request.batch_id, "batch_id")
        async with storage.snapshot(engine) as connection:
            sender_id = await storage.sender_of_batch(connection, batch_id, user_id)
            if sender_id is None:
                raise not_found("batch_id", request.batch_id)
            found = await forecast_batch(connection, sender_id, batch_id, rules)
            return _answer(found, await storage.last_failure(connection, sender_id))
    named = request.planned_batch.options.sender_id
    sender_id = parse_id(named, f"{_OPTIONS}.sender_id")
    async with storage.snapshot(engine) as connection:
        if not await storage.sender_exists(connection, sender_id, user_id):
            raise not_found(f"{_OPTIONS}.sender_id", named)
        found = await forecast_planned(
            connection, sender_id, lambda now: [_group(planned, now)], rules
        )
        return _answer(found, await storage.last_failure(connection, sender_id))


def requested_plan(request: stats_service_pb2.ForecastBatchRequest) -> PlannedBatch | None:
    """Return the planned batch of a request; None if the batch exists.

    Raises:
        InvalidInput: FORECAST_SUBJECT_REQUIRED, or an error of the planned batch.
    """
    match request.WhichOneof("subject"):
        case "batch_id":
            return None
        case "planned_batch":
            return _planned(request.planned_batch)
    raise InvalidInput.field(
        "batch_id",
        "one of `batch_id` and `planned_batch` must be set",
        reason="FORECAST_SUBJECT_REQUIRED",
    )


def _planned(planned: stats_service_pb2.PlannedBatch) -> PlannedBatch:
    options = planned.options
    wrong = Violations()
    with wrong, suppress(NotFound):  # a sender that does not exist is reported later
        parse_id(options.sender_id, f"{_OPTIONS}.sender_id")
    start, spread_until = (
        wrong.value(partial(from_timestamp, getattr(options, name), f"{_OPTIONS}.{name}"), None)
        if options.HasField(name)
        else None
        for name in _TIMES
    )
    expire_after, spacing = (
        wrong.value(partial(from_duration, getattr(options, name), f"{_OPTIONS}.{name}"), None)
        if options.HasField(name)
        else None
        for name in _DURATIONS
    )
    found = PlannedBatch(
        planned.recipient_count, start, spacing or timedelta(0), spread_until, expire_after
    )
    with wrong:
        check_planned(found)
    wrong.raise_any()
    return found


def _group(planned: PlannedBatch, now: datetime) -> JobGroup:
    start = max(now, planned.start or now)
    expire_after = planned.expire_after
    return JobGroup(
        due=to_us(start),
        count=planned.recipients,
        step=planned.spacing_from(start) // _MICROSECOND,
        expire_after=None if expire_after is None else expire_after // _MICROSECOND,
    )


def _answer(
    found: Forecast, trouble: storage.EndpointFailure | None
) -> stats_service_pb2.ForecastBatchResponse:
    return stats_service_pb2.ForecastBatchResponse(
        job_count=found.jobs,
        first_send_time=to_timestamp(found.first) if found.first else None,
        end_time=to_timestamp(found.end) if found.end else None,
        binding_limit=_LIMITS.get(found.bound, sender_pb2.BINDING_LIMIT_UNSPECIFIED)
        if found.bound
        else sender_pb2.BINDING_LIMIT_UNSPECIFIED,
        ahead_count=found.ahead,
        expiring_count=found.expiring,
        explanation=_explain(found, trouble),
        cooldown=to_cooldown(found.cooldown),
        estimated=found.estimated,
        held=found.held,
    )


def _explain(found: Forecast, trouble: storage.EndpointFailure | None) -> str:
    unknown = _why_unknown(found)
    if unknown:
        return unknown
    cause = "" if found.cooldown is None else f"{found.cooldown.describe(found.read_at)} "
    if found.end is None:
        all_expire = "The mail expires" if found.jobs == 1 else f"All {found.jobs:,} mails expire"
        return f"{cause}{all_expire} before the limits allow to send any."
    when = f"{found.end:%Y-%m-%d %H:%M:%S} UTC"
    if found.estimated:
        # An estimate may be wrong by days.
        when = (
            f"about {found.end:%Y-%m}, an estimate because the exact time takes too long to compute"
        )
    text = f"The last of {_mails(found.jobs)} will be sent at {when}"
    if found.ahead:
        text += f", after {found.ahead:,} others of the sender"
    text += f"; {_reason(found)}"
    if found.expiring:
        text += f"; {found.expiring:,} expire before"
    conditions = [
        condition
        for condition, holds in (
            ("the probe is accepted", found.cooldown),
            ("the endpoint works again", trouble),
        )
        if holds
    ]
    if conditions:
        text = f"{cause}If {' and '.join(conditions)}: {text[0].lower()}{text[1:]}"
    if trouble:
        return (
            f"{text}. The sender's last attempt, at {trouble.ended_at:%Y-%m-%d %H:%M:%S} UTC, "
            f"failed: {trouble.message}"
        )
    return f"{text}."


def _why_unknown(found: Forecast) -> str:
    """Return why there is no forecast; an empty text if there is one."""
    if not found.jobs:
        return "No job of the batch is waiting."
    if found.held:
        return HELD_NOTICE
    if not found.active:
        return "The sender is paused or deleted: nothing is sent before ResumeSender."
    if found.batch_paused:
        return "The batch is paused, or gets new due times: nothing of it is sent until that ends."
    return "" if found.within_sight else "The end is too far away for a forecast."


def _reason(found: Forecast) -> str:
    if found.bound in (Bound.USER_WINDOW, Bound.USER_GAP) and found.sharing > 1:
        turns = f"if its {found.sharing:,} senders with due mail keep taking turns"
        return f"{_REASONS[found.bound]}, {turns}"
    return _REASONS[found.bound]


def _mails(count: int) -> str:
    return "1 mail" if count == 1 else f"{count:,} mails"
