"""Every method names all wrong fields of a request at once. The methods come from the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import pytest
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from outbox.v1 import api_key_pb2, api_key_service_pb2, webhook_pb2, webhook_service_pb2

from outbox_server.shared.secrets import generate_key
from tests.contract_methods import contract_methods
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE
from tests.scheduler_stack import NO_RELAY, Scheduler, running_scheduler
from tests.stats_stack import stats_server

# Right values by field name, so that nothing but the wrong fields is wrong.
RIGHT: Final[Mapping[str, Any]] = {
    "user_id": "ann",
    "subject": "Hello",
    "body": "Good day",
    "csv": b"email\na@b.org\n",
    "chunk": b"email\na@b.org\n",
    "data": b"email\na@b.org\n",
    "email": "x@y.org",
    "recipient_count": 1,
    "resolution": 1,
    "url": "https://example.com/hook",
    "kind": 2,
    "host": "mail.example.com",
    "username": "news",
    "start": "08:00",
    "end": "17:00",
    "time_zone": "Europe/Berlin",
    "schedule_time": Timestamp(seconds=2_000_000_000),
    "options.request_id": "1",
    "client_id": "app",
    "client_secret": "hush",
    "refresh_token": "again",
    "token_url": "https://example.com/token",
}
# Wrong ones. Any other text is wrong with a control character.
WRONG: Final = {
    "filter": "foo = 1",
    "order_by": "foo",
    "page_token": "x",
    "resume_token": "x",
    "sender_id": "",
    "batch_id": "",
    "email_job_id": "",
    "webhook_id": "",
    "webhook_delivery_id": "",
    "api_key_id": "",
}
SECONDS: Final = {"google.protobuf.Timestamp": 10**15, "google.protobuf.Duration": 10**13}
NUMBERS: Final = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
# A watch whose request is right answers only when something changes. A refusal on a busy machine
# takes less than this.
ANSWER_S: Final = 8


@dataclass(frozen=True)
class Wrong:
    """A field with a wrong value, by the fields that lead to it."""

    fields: tuple[FieldDescriptor, ...]
    value: Any

    @property
    def path(self) -> str:
        return ".".join(field.name for field in self.fields)

    def put(self, message: Any) -> None:
        """Put the wrong value into a request."""
        *before, last = self.fields
        for outer in before:
            message = getattr(message, outer.name)
            message.SetInParent()
        kind = last.message_type
        if last.is_repeated:
            getattr(message, last.name).append(self.value)
        elif kind is None:
            setattr(message, last.name, self.value)
        elif kind.name == "FieldMask":
            getattr(message, last.name).paths.append(self.value)
        else:
            getattr(message, last.name).seconds = self.value

    def is_named_in(self, violations: Collection[str]) -> bool:
        """Return whether violations name the field, or an entry of it."""
        return any(each.partition("[")[0] == self.path for each in violations)


def wrong_fields(kind: Descriptor, before: tuple[FieldDescriptor, ...] = ()) -> Iterator[Wrong]:
    """Yield each field of a request with a wrong value, also of the messages within it."""
    for each in _settable(kind):
        inner = each.message_type
        for value in _wrong_values(each):
            yield Wrong((*before, each), value)
        if inner and not each.is_repeated and inner.file.package == "outbox.v1":
            yield from wrong_fields(inner, (*before, each))


def _settable(kind: Descriptor) -> Iterator[FieldDescriptor]:
    """Yield the fields that a caller may set together: one of each oneof."""
    for each in kind.fields:
        oneof = each.containing_oneof
        if FieldBehavior.OUTPUT_ONLY in each.GetOptions().Extensions[field_behavior]:
            continue
        if oneof is None or each == max(oneof.fields, key=lambda one: bool(one.message_type)):
            yield each


def _wrong_values(each: FieldDescriptor) -> list[Any]:
    kind = each.message_type
    if kind is not None:
        if kind.name == "FieldMask":
            return ["foo"]
        return [SECONDS[kind.full_name]] if kind.full_name in SECONDS else []
    match each.type:
        case FieldDescriptor.TYPE_STRING:
            # Some methods need a user.
            return ["\0", ""] if each.name == "user_id" else [WRONG.get(each.name, "\0")]
        case FieldDescriptor.TYPE_ENUM:
            return [99]
        case number if number in NUMBERS:
            return [-1]
    return []


def filled(kind: Descriptor, ids: Mapping[str, str], path: str = "") -> Message:
    """Return a request whose values are right."""
    message: Any = message_factory.GetMessageClass(kind)()
    for each in _settable(kind):
        value = ids.get(each.name, RIGHT.get(f"{path}{each.name}", RIGHT.get(each.name)))
        if each.is_repeated:
            continue
        if each.message_type is None:
            if value is not None:
                setattr(message, each.name, value)
        elif each.message_type.file.package == "outbox.v1":
            inner = filled(each.message_type, ids, f"{path}{each.name}.")
            if inner.ByteSize():
                getattr(message, each.name).CopyFrom(inner)
        elif isinstance(value, Message):
            getattr(message, each.name).CopyFrom(value)
    return message  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CheckedServers:
    """The channels of all services, by service."""

    channels: dict[str, grpc.aio.Channel]
    scheduler: Scheduler
    at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(16))

    async def ids(self) -> dict[str, str]:
        """Create one resource of each kind; return their ids by field name."""
        sender = await self.scheduler.sender()
        batch = (await self.scheduler.schedule(sender)).batch
        job = self.scheduler.value("SELECT id FROM email_jobs WHERE batch_id = %s", batch.batch_id)
        hook = webhook_pb2.Webhook(url=RIGHT["url"], sender_id=sender.sender_id)
        webhook = await self.scheduler.webhooks.CreateWebhook(
            webhook_service_pb2.CreateWebhookRequest(user_id="ann", webhook=hook)
        )
        key = await self.scheduler.api_keys.CreateApiKey(
            api_key_service_pb2.CreateApiKeyRequest(
                api_key=api_key_pb2.ApiKey(kind=api_key_pb2.API_KEY_KIND_SERVICE)
            )
        )
        return {
            "sender_id": sender.sender_id,
            "batch_id": batch.batch_id,
            "email_job_id": str(job),
            "webhook_id": webhook.webhook_id,
            "api_key_id": key.api_key.api_key_id,
        }

    async def violations(self, method: MethodDescriptor, message: Message) -> set[str]:
        """Return the fields that the answer to a call names; none if it is no refusal of fields."""
        service = method.containing_service.full_name
        channel: Any = self.channels[service]
        path, data = f"/{service}/{method.name}", message.SerializeToString()
        call: Any
        async with self.at_once:
            if method.client_streaming:
                call = channel.stream_unary(path)(iter([data]), timeout=PATIENCE)
            elif method.server_streaming:
                call = channel.unary_stream(path)(data, timeout=ANSWER_S).read()
            else:
                call = channel.unary_unary(path)(data, timeout=PATIENCE)
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return _named(error, f"{method.name}({message})")
        return set()


def _named(error: grpc.aio.AioRpcError, call: str) -> set[str]:
    assert error.code() is not grpc.StatusCode.INTERNAL, call
    named = set()
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            named |= {each.field for each in request.field_violations}
    return named


@pytest.fixture
async def servers(database_url: str, redis_url: str) -> AsyncIterator[CheckedServers]:
    settings: dict[str, Any] = {"encryption_keys": generate_key(), "user_webhooks": 1_000}
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, **settings)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address))
        stats = await stack.enter_async_context(stats_server(database_url, redis_url))
        channels = {method.containing_service.full_name: channel for method in contract_methods()}
        channels["outbox.v1.StatsService"] = stats
        values = options(database_url, redis_url, NO_RELAY, min_gap="2s")
        dispatcher = await stack.enter_async_context(running(settings_of(values)))
        channels["outbox.v1.DispatcherService"] = dispatcher.channel
        yield CheckedServers(channels, scheduler)


async def test_every_method_names_all_wrong_fields_at_once(servers: CheckedServers) -> None:
    tested = [method for method in contract_methods() if len(_wrong_of(method)) > 1]
    at_once = asyncio.Semaphore(4)
    shared = await servers.ids()

    async def check(method: MethodDescriptor) -> int:
        async with at_once:
            reads = method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
            return await _check(servers, method, shared if reads else await servers.ids())

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(check(method)) for method in tested]
    assert sum(task.result() for task in tasks) > 300


async def _check(servers: CheckedServers, method: MethodDescriptor, ids: Mapping[str, str]) -> int:
    """Check that no field is named for a wrong value only when nothing else is wrong."""
    every = _wrong_of(method)

    async def named(wrong: Collection[Wrong], given: Mapping[str, str] = ids) -> set[str]:
        message = filled(method.input_type, given)
        for each in wrong:
            each.put(message)
        return await servers.violations(method, message)

    # A mask decides which fields of a resource are read.
    no_mask = [each for each in every if each.path != "update_mask"]
    of_request = [each for each in every if len(each.fields) == 1]
    found = set()
    # The last of two wrong values of a field counts.
    for together in (no_mask, no_mask[::-1], of_request):
        wrong = {each.path: each for each in together}.values()
        names = await named(wrong)
        for each in wrong:
            if each.is_named_in(names):
                found.add(each.path)
            else:
                alone = await named([each])
                assert not each.is_named_in(alone), (method.name, each.path, names)
    # Ids that no resource can have hide nothing.
    odd = await named(
        [each for each in of_request if each.path not in ids], dict.fromkeys(ids, "q")
    )
    assert "identity" in odd or "identity" not in method.input_type.fields_by_name, method.name
    assert "page_token" in odd or "page_token" not in method.input_type.fields_by_name, method.name
    assert "identity" in found or "identity" not in method.input_type.fields_by_name, method.name
    return len(found)


def _wrong_of(method: MethodDescriptor) -> list[Wrong]:
    return list(wrong_fields(method.input_type))
