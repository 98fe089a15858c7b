"""Every text, list and map of every request has a limit, and the real methods check it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from outbox_server.shared.rpc.field_limits import FieldLimit, LimitUnit, limit_of
from tests.contract_methods import contract_methods
from tests.eventually import PATIENCE
from tests.scheduler_stack import Refusal, Scheduler, options_for, refusal_of, running_scheduler
from tests.stats_stack import stats_server

# A larger message never reaches a service (gRPC's own limit, less room for the other fields).
MOST_BYTES: Final = 5 * 1024 * 1024 - 1_000


@dataclass(frozen=True)
class LimitedField:
    """A field of a request, by the fields that lead to it, with its limit."""

    method: MethodDescriptor
    fields: tuple[FieldDescriptor, ...]
    limit: FieldLimit
    # Whether it is the limit of the texts of a list or map.
    each: bool = False

    def __str__(self) -> str:
        path = ".".join(field.name for field in self.fields)
        return f"{self.method.name}({path}{'[]' if self.each else ''})"

    @property
    def path(self) -> str:
        """The path that an error names."""
        names = [
            f"{field.name}[0]"
            if field.is_repeated and (self.each or field != self.fields[-1])
            else field.name
            for field in self.fields
        ]
        return ".".join(names)


def places() -> Iterator[LimitedField]:
    for method in contract_methods():
        yield from _places(method, method.input_type, ())


def _places(
    method: MethodDescriptor, kind: Descriptor, before: tuple[FieldDescriptor, ...]
) -> Iterator[LimitedField]:
    for field in kind.fields:
        assert field not in before, "a request that contains itself needs a limit of its depth"
        fields = (*before, field)
        limit = limit_of(field)
        if limit is not None:
            yield LimitedField(method, fields, limit)
            if limit.each is not None:
                yield LimitedField(method, fields, limit.each, each=True)
        if field.message_type is not None:
            yield from _places(method, field.message_type, fields)


def test_every_text_list_and_map_of_every_request_has_a_limit() -> None:
    found = list(places())
    names = {str(place) for place in found}
    # `limit_of` fails for a field without one. These show that the walk goes to any depth.
    assert {
        "UpdateSender(update_mask.paths[])",
        "ScheduleBatch(recipients.rows.columns.key)",
        "ForecastBatch(planned_batch.options.subject)",
        "UploadBatchFile(file.extensions.value)",
    } <= names
    for place in found:
        assert place.limit.most > 0, str(place)


def test_a_repeated_list_of_texts_limits_each_text_too() -> None:
    for place in places():
        field = place.fields[-1]
        if field.is_repeated and field.type == FieldDescriptor.TYPE_STRING and not place.each:
            assert place.limit.each is not None, str(place)


def _too_much(field: FieldDescriptor, limit: FieldLimit) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"a" * (limit.most + 1)
    # Bytes are counted, not characters.
    if limit.unit is LimitUnit.BYTES:
        return "\u00fc" * (limit.most // 2 + 1)
    return "a" * (limit.most + 1)


def _fill(message: Message, place: LimitedField, fields: tuple[FieldDescriptor, ...]) -> None:
    """Put one entry more, or one character more, than the limit into the field."""
    field, rest = fields[0], fields[1:]
    here = getattr(message, field.name)
    if _is_map(field):
        _fill_map(here, place, rest)
    elif rest:
        inner = here.add() if field.is_repeated else here
        inner.SetInParent()
        _fill(inner, place, rest)
    elif place.each:
        here.append(_too_much(field, place.limit))
    elif field.is_repeated:
        one = "x" if field.type == FieldDescriptor.TYPE_STRING else 1
        for _ in range(place.limit.most + 1):
            here.append(one) if field.message_type is None else here.add()
    else:
        setattr(message, field.name, _too_much(field, place.limit))


def _fill_map(here: Any, place: LimitedField, rest: tuple[FieldDescriptor, ...]) -> None:
    if not rest:
        here.update({str(number): "x" for number in range(place.limit.most + 1)})
    elif rest[0].name == "key":
        here[_too_much(rest[0], place.limit)] = "x"
    else:
        here["name"] = _too_much(rest[0], place.limit)


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


@dataclass(frozen=True)
class LimitedServers:
    """The channels of all services, by service, and a valid sender."""

    channels: dict[str, grpc.aio.Channel]
    scheduler: Scheduler
    sender: Any

    def message(self, place: LimitedField) -> Message:
        message = message_factory.GetMessageClass(place.method.input_type)()
        if place.limit.by_row:
            # All but the row is right, so that the row is read.
            message.options.CopyFrom(options_for(self.sender))  # type: ignore[attr-defined]
            if place.fields[0].name == "recipient":
                message.recipient.email = "a@b.org"  # type: ignore[attr-defined]
            elif place.fields[-1].name != "email":
                row = message.recipients.rows.add()  # type: ignore[attr-defined]
                row.email = "a@b.org"
                _fill(row, place, place.fields[2:])
                return message
        _fill(message, place, place.fields)
        return message

    async def refusal(self, place: LimitedField) -> Refusal:
        method = place.method
        service = method.containing_service.full_name
        channel: Any = self.channels[service]
        path = f"/{service}/{method.name}"
        data = self.message(place).SerializeToString()
        if method.client_streaming:
            first = []
            if place.fields[0].name == "chunk" and "options" in method.input_type.fields_by_name:
                opening = message_factory.GetMessageClass(method.input_type)()
                opening.options.CopyFrom(options_for(self.sender))  # type: ignore[attr-defined]
                first.append(opening.SerializeToString())
            return await refusal_of(
                channel.stream_unary(path)(iter([*first, data]), timeout=PATIENCE)
            )
        if method.server_streaming:
            return await refusal_of(channel.unary_stream(path)(data, timeout=PATIENCE).read())
        return await refusal_of(channel.unary_unary(path)(data, timeout=PATIENCE))


@pytest.fixture
async def servers(database_url: str, redis_url: str) -> AsyncIterator[LimitedServers]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(running_scheduler(database_url, redis_url))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address))
        stats = await stack.enter_async_context(stats_server(database_url, redis_url))
        channels = {method.containing_service.full_name: channel for method in contract_methods()}
        channels["outbox.v1.StatsService"] = stats
        yield LimitedServers(channels, scheduler, await scheduler.sender())


def can_arrive(place: LimitedField) -> bool:
    """Return whether a value over the limit fits into a message."""
    entry = 2 if place.limit.unit is LimitUnit.ENTRIES else 1
    return place.limit.most * entry < MOST_BYTES


async def test_every_method_refuses_values_above_their_limits(servers: LimitedServers) -> None:
    tested = [
        place
        for place in places()
        if can_arrive(place) and place.method.containing_service.name != "DispatcherService"
    ]
    at_once = asyncio.Semaphore(8)

    async def check(place: LimitedField) -> None:
        async with at_once:
            refusal = await servers.refusal(place)
        about = (str(place), refusal)
        said = f"{refusal.message} {refusal.violations}"
        assert f"{place.limit.most:,}" in said or f"{place.limit.most // 1024} KiB" in said, about
        if place.limit.by_row:
            assert refusal.code == "INVALID_ARGUMENT", about
            one = place.fields[0].name == "recipient"
            assert refusal.reason == ("ROW_REJECTED" if one else "NO_ROW_ACCEPTED"), about
            assert place.limit.reason in said, about
            assert ("recipient" if one else "rows[1]") in said, about
            return
        assert refusal.reason == place.limit.reason, about
        if place.limit.exhausted:
            assert refusal.code == "RESOURCE_EXHAUSTED", about
            assert refusal.message.startswith(f"{place.path}: "), about
        else:
            assert refusal.code == "INVALID_ARGUMENT", about
            assert set(refusal.violations) == {place.path}, about

    async with asyncio.TaskGroup() as group:
        for place in tested:
            group.create_task(check(place))
    assert len(tested) > 100
