"""Pauses, resumes and updates batches: the methods of BatchService that change waiting mail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

from outbox.v1 import batch_pb2, batch_service_pb2
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made, check_etag
from outbox_server.services.scheduler.pausing import check_pause_end
from outbox_server.services.scheduler.respreading import Respreader
from outbox_server.services.scheduler.servicers.batch_mapping import (
    LONG_OR_PERSONAL,
    batch_etag,
    to_batch,
)
from outbox_server.services.scheduler.servicers.calls import (
    acting_user,
    check_mask,
    check_unchangeable,
    requested_pause_end,
)
from outbox_server.services.scheduler.storage import batch_changes as storage
from outbox_server.services.scheduler.storage.batch_changes import TEXTS, LockedBatch
from outbox_server.services.scheduler.storage.batches import BatchRecord, read_batch
from outbox_server.services.scheduler.storage.respreading import begin_respread, respread_part
from outbox_server.services.scheduler.storage.unsent_rows import read_templates
from outbox_server.services.scheduler.template_changes import TemplateChanges
from outbox_server.shared import bounds
from outbox_server.shared.database.audit_events import shortened_text
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import Aborted, FailedPrecondition, Violations
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.intake.batch_options import check_no_nul
from outbox_server.shared.intake.option_mapping import from_headers
from outbox_server.shared.rpc.proto_mapping import from_timestamp, not_found, parse_id, whole_ms
from outbox_server.shared.states import BatchState

# The caller waits no longer than this for the head; dispatchers load it otherwise.
_LOAD_LIMIT: Final = timedelta(seconds=1)
# The due times of at most this many jobs are written in the transaction of the call.
_RESPREAD_IN_CALL: Final = 5_000
# How often templates are checked again because another call has changed them meanwhile.
_TRIES: Final = 3
_TIMES: Final = ("schedule_time", "spacing")
_CONTENT: Final = (*TEXTS, "headers")
_CHANGEABLE: Final = (*_CONTENT, *_TIMES)
# What to use instead.
_UNCHANGEABLE: Final = {
    "state": "use PauseBatch, ResumeBatch or CancelBatch",
    "user_id": "a batch stays with its user",
    "sender_id": "a batch stays with its sender",
    **dict.fromkeys(
        ("reply_to", "name_column", "external_id", "labels", "expire_after", "duplicates", "mode"),
        "it is fixed when the batch is accepted",
    ),
}
_MILLISECOND: Final = timedelta(milliseconds=1)

_Step = Callable[[AsyncConnection, LockedBatch], Awaitable[bool]]


class _TemplatesChangedError(Exception):
    """Another call has changed the templates since they were checked."""


class BatchControl:
    """Changes batches that were accepted."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        changes: Changes,
        templates: TemplateChanges,
        respreader: Respreader,
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._changes = changes
        self._templates = templates
        self._respreader = respreader

    async def pause(self, request: batch_service_pb2.PauseBatchRequest) -> batch_pb2.Batch:
        """Pause a batch."""
        until = requested_pause_end(request)

        async def pause(connection: AsyncConnection, batch: LockedBatch) -> bool:
            check_pause_end(until, batch.now)
            return await storage.pause_batch(connection, batch, until)

        return await self._change(request, pause)

    async def resume(self, request: batch_service_pb2.ResumeBatchRequest) -> batch_pb2.Batch:
        """End the pause of a batch."""
        return await self._change(request, storage.resume_batch)

    async def update(self, request: batch_service_pb2.UpdateBatchRequest) -> batch_pb2.Batch:
        """Change templates, headers, schedule time and spacing of the unsent mail of a batch."""
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        batch_id = wrong.value(lambda: parse_id(request.batch.batch_id, "batch.batch_id"), 0)
        names = wrong.value(lambda: _masked(request), ())
        values = wrong.value(lambda: _values(request.batch, names), dict[str, Any]())
        wrong.raise_any()
        new: dict[str, str | None] = {name: values[name] for name in TEXTS if name in values}
        for _ in range(_TRIES):
            async with self._engine.connect() as connection:
                stored = await read_templates(connection, batch_id, user_id)
            if stored is None:
                raise not_found("batch_id", request.batch.batch_id)
            if any(name in values for name in _CONTENT):
                await self._templates.check(batch_id, stored, new, values.get("headers"))
            checked = {name: getattr(stored, name) for name in TEXTS}
            checked["headers"] = stored.head.headers
            try:
                return await self._make_update(request, batch_id, user_id, values, checked)
            except _TemplatesChangedError:
                continue
        raise Aborted(
            "the templates of this batch were changed by other calls meanwhile; try again",
            reason="BATCH_CHANGED",
        )

    async def _make_update(
        self,
        request: batch_service_pb2.UpdateBatchRequest,
        batch_id: int,
        user_id: str | None,
        values: Mapping[str, Any],
        checked: Mapping[str, Any],
    ) -> batch_pb2.Batch:
        async def update(connection: AsyncConnection) -> Made[batch_pb2.Batch]:
            batch = await self._lock(connection, request.batch.batch_id, user_id)
            found = await self._read(connection, batch, user_id)
            check_etag(request.batch.etag, batch_etag(batch.state, batch.revision), "this batch")
            _check_not_cancelled(batch)
            if not request.update_mask.paths:
                _check_unchangeable(request.batch, to_batch(found), batch.now)
            if not values:
                return await self._made(
                    connection, batch, found, _nothing, user_id=user_id, changed=False
                )
            if any(name in values for name in _CONTENT) and batch.templates != checked:
                raise _TemplatesChangedError
            changed = {name: values[name] for name in TEXTS if name in values}
            if "headers" in values:
                changed["headers"] = [list(header) for header in values["headers"]] or None
            respread = any(name in values for name in _TIMES)
            if respread:
                start = values.get("schedule_time", batch.start_at) or batch.now
                changed["start_at"] = start = max(start, batch.now)
                changed["spacing_ms"] = values.get("spacing", batch.spacing_ms)
                changed["respreading"] = True
                await begin_respread(connection, batch_id, start, changed["spacing_ms"])
            await storage.change_batch(connection, batch, changed)
            if respread and found.counts.scheduled < _RESPREAD_IN_CALL:
                await respread_part(connection, batch_id, _RESPREAD_IN_CALL)
            settle = partial(self._settle, batch)
            return await self._made(connection, batch, found, settle, user_id=user_id)

        return await self._changes.make(
            request, user_id, batch_pb2.Batch, update, partial(_complete, user_id)
        )

    async def _settle(self, batch: LockedBatch) -> None:
        await load_soon(self._loader, [batch.sender_id], limit=_LOAD_LIMIT)
        await self._respreader.respread_in_call(batch.batch_id)

    async def _change(
        self,
        request: batch_service_pb2.PauseBatchRequest | batch_service_pb2.ResumeBatchRequest,
        step: _Step,
    ) -> batch_pb2.Batch:
        user_id = acting_user(request.user_id)

        async def change(connection: AsyncConnection) -> Made[batch_pb2.Batch]:
            batch = await self._lock(connection, request.batch_id, user_id)
            found = await self._read(connection, batch, user_id)
            check_etag(request.etag, batch_etag(batch.state, batch.revision), "this batch")
            _check_not_cancelled(batch)
            changed = await step(connection, batch)

            async def afterwards() -> None:
                if changed:
                    await load_soon(self._loader, [batch.sender_id], limit=_LOAD_LIMIT)

            return await self._made(
                connection, batch, found, afterwards, user_id=user_id, changed=changed
            )

        return await self._changes.make(
            request, user_id, batch_pb2.Batch, change, partial(_complete, user_id)
        )

    async def _lock(
        self, connection: AsyncConnection, id_in_request: str, user_id: str | None
    ) -> LockedBatch:
        batch_id = parse_id(id_in_request, "batch_id")
        batch = await storage.lock_batch(connection, batch_id, user_id)
        if batch is None:
            raise not_found("batch_id", id_in_request)
        return batch

    async def _read(
        self, connection: AsyncConnection, batch: LockedBatch, user_id: str | None
    ) -> BatchRecord:
        found = await read_batch(connection, batch.batch_id, user_id)
        if found is None:
            raise AssertionError("a locked batch has disappeared")
        return found

    async def _made(
        self,
        connection: AsyncConnection,
        batch: LockedBatch,
        before: BatchRecord,
        afterwards: Callable[[], Awaitable[object]],
        *,
        user_id: str | None,
        changed: bool = True,
    ) -> Made[batch_pb2.Batch]:
        after = await self._read(connection, batch, user_id) if changed else before
        answer = to_batch(after)
        # The texts are left out as in lists, because they may be long.
        for text in TEXTS:
            answer.ClearField(text)
        stored = batch_pb2.Batch()
        stored.CopyFrom(answer)
        for name in LONG_OR_PERSONAL:
            stored.ClearField(name)
        was, became = _audited(before), _audited(after)
        names = [name for name in was if was[name] != became[name]]
        return Made(
            answer,
            f"batches/{batch.batch_id}",
            batch.user_id,
            before={name: was[name] for name in names},
            after={name: became[name] for name in names},
            changed=changed,
            stored=stored,
            afterwards=afterwards,
        )


async def _complete(
    user_id: str | None, connection: AsyncConnection, stored: batch_pb2.Batch
) -> batch_pb2.Batch:
    """Return the answer of a repeated call, with the present values that are not stored with it."""
    found = await read_batch(connection, int(stored.batch_id), user_id)
    if found is not None:
        present = to_batch(found)
        # An older release stored these texts with the answer.
        for name in LONG_OR_PERSONAL:
            stored.ClearField(name)
        stored.reply_to, stored.external_id = present.reply_to, present.external_id
        stored.headers.extend(present.headers)
        stored.labels.update(present.labels)
    return stored


async def _nothing() -> None:
    pass


def _audited(record: BatchRecord) -> dict[str, Any]:
    """Return the values of a batch for the audit log; of a template, its beginning."""
    until = record.paused_until
    return {
        "paused": record.paused_at is not None,
        "pause_end_time": None if until is None else until.isoformat(),
        "schedule_time": record.start_at.isoformat(),
        "spacing": format_duration(record.spacing_ms * _MILLISECOND),
        **{name: shortened_text(getattr(record, name)) for name in TEXTS},
        "headers": [f"{name}: {shortened_text(text)}" for name, text in record.headers],
    }


def _check_not_cancelled(batch: LockedBatch) -> None:
    if batch.state is BatchState.CANCELLED:
        raise FailedPrecondition(
            "this batch is cancelled, which is final; schedule a new batch",
            reason="BATCH_CANCELLED",
        )


def _masked(request: batch_service_pb2.UpdateBatchRequest) -> Sequence[str]:
    """Return the fields to change: those of the mask or, without a mask, those that are set."""
    paths = list(dict.fromkeys(request.update_mask.paths))
    if not paths:
        given = [name for name in (*TEXTS, *_TIMES) if request.batch.HasField(name)]
        return [*given, "headers"] if request.batch.headers else given
    check_mask(
        paths,
        _CHANGEABLE,
        lambda path: _UNCHANGEABLE.get(path, f"use {', '.join(_CHANGEABLE)}"),
    )
    return paths


def _check_unchangeable(asked: batch_pb2.Batch, present: batch_pb2.Batch, now: datetime) -> None:
    """Check that an update without a mask changes no other field.

    Raises:
        InvalidInput: UPDATE_MASK_INVALID.
    """
    # Since it was read, the batch may have ended, a job of it may be retried, or its pause may have
    # ended by itself.
    same = {batch_pb2.BATCH_STATE_ACTIVE, batch_pb2.BATCH_STATE_DONE}
    pause_ended = asked.HasField("pause_end_time") and asked.pause_end_time.ToDatetime(UTC) <= now
    if asked.state == batch_pb2.BATCH_STATE_PAUSED and pause_ended:
        same.add(batch_pb2.BATCH_STATE_PAUSED)
    if {asked.state, present.state} <= same:
        present.state = asked.state
    check_unchangeable(asked, present, "batch", _UNCHANGEABLE)


def _values(batch: batch_pb2.Batch, names: Sequence[str]) -> dict[str, Any]:
    """Return the new values. None means a text that each row has itself, or the present time."""
    values: dict[str, Any] = {}
    wrong = Violations()
    for name in names:
        if name == "headers":
            values[name] = from_headers(batch.headers)
            continue
        given = batch.HasField(name)  # type: ignore[arg-type]  # name is a field
        with wrong:
            if name == "schedule_time":
                values[name] = (
                    from_timestamp(batch.schedule_time, "batch.schedule_time") if given else None
                )
            elif name == "spacing":
                values[name] = _spacing(batch) if given else 0
            else:
                text: str = getattr(batch, name)
                values[name] = check_no_nul(f"batch.{name}", text) if given else None
    wrong.raise_any()
    return values


def _spacing(batch: batch_pb2.Batch) -> int:
    spacing_ms = whole_ms(batch.spacing, "batch.spacing")
    bounds.check_spacing("batch.spacing", spacing_ms * _MILLISECOND)
    return spacing_ms
