"""No text in any field costs a service more time than a harmless one of the same length."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from outbox.v1.batch_pb2 import Recipient

from outbox_server.shared.rpc.field_limits import LimitUnit
from tests.contract_methods import contract_methods
from tests.eventually import PATIENCE
from tests.hostile_shapes import harmless_texts, hostile_texts
from tests.scheduler_stack import Scheduler, options_for, running_scheduler
from tests.service.test_field_limits import LimitedField, places
from tests.stats_stack import stats_server

# A quadratic parser needs seconds for so much, and a linear one milliseconds.
MOST_SIZE: Final = 16_384
# Templates are parsed within a budget of time, which their own tests check. Here they only must not
# be worse than that.
TEMPLATES: Final = frozenset(("subject", "body", "html"))
MOST_TEMPLATE: Final = 1_000
# Work that is linear differs by its constant: a marker costs a template more than a letter.
MOST_RATIO: Final = 8
# Less is noise: what the collector of garbage or a query of a servicer adds to a call.
FLOOR_S: Final = 0.1


@dataclass(frozen=True)
class AttackedServers:
    """The servers, in this process, and values that make a request valid but for one field."""

    channels: dict[str, grpc.aio.Channel]
    scheduler: Scheduler
    sender: Any

    def request(self, place: LimitedField, text: str) -> list[bytes]:
        """Return the messages of a request that has `text` in one place."""
        kind = message_factory.GetMessageClass(place.method.input_type)
        message = kind()
        names = {field.name for field in place.method.input_type.fields}
        if "options" in names:
            message.options.CopyFrom(options_for(self.sender))  # type: ignore[attr-defined]
            message.options.request_id = f"shape {time.monotonic_ns()}"  # type: ignore[attr-defined]
        if "recipients" in names:
            message.recipients.rows.append(  # type: ignore[attr-defined]
                Recipient(email="a@b.org", columns={"name": "Ann"})
            )
        put(message, place.fields, text)
        if not place.method.client_streaming:
            return [message.SerializeToString()]
        # Only the streams of a batch begin with a message of options.
        if "options" not in names or place.fields[0].name == "options":
            return [message.SerializeToString()]
        opening = kind()
        opening.options.CopyFrom(message.options)  # type: ignore[attr-defined]
        message.ClearField("options")
        put(message, place.fields, text)
        return [opening.SerializeToString(), message.SerializeToString()]

    async def seconds(self, place: LimitedField, text: str) -> float:
        """Return the time on the CPU that a call takes this process, whose loop stands meanwhile.

        Other processes of a busy machine do not add to it.
        """
        method = place.method
        service = method.containing_service.full_name
        channel: Any = self.channels[service]
        path = f"/{service}/{method.name}"
        messages = self.request(place, text)
        began = time.process_time()
        ended_by_limit = False
        try:
            if method.client_streaming:
                await channel.stream_unary(path)(iter(messages), timeout=PATIENCE)
            elif method.server_streaming:
                stream = channel.unary_stream(path)(messages[0], timeout=PATIENCE)
                await stream.read()
                stream.cancel()
            else:
                await channel.unary_unary(path)(messages[0], timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            ended_by_limit = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not ended_by_limit, f"{place}: {text[:30]!r}"
        return time.process_time() - began


def put(message: Any, fields: tuple[FieldDescriptor, ...], text: str) -> None:
    """Put a text into a field, as the only entry of each list and map on the way."""
    field, rest = fields[0], fields[1:]
    here = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        message.ClearField(field.name)
        named = rest and rest[0].name == "value"
        pair = {"name": text} if named else {text: "x"}
        getattr(message, field.name).update(pair)
    elif kind is not None:
        inner = (here[0] if here else here.add()) if field.is_repeated else here
        inner.SetInParent()
        if rest:
            put(inner, rest, text)
    elif field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).append(text)
    else:
        value = text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        setattr(message, field.name, value)


def texts() -> Iterator[tuple[LimitedField, int]]:
    """Yield each place of a text, with the size that its limit lets through."""
    for place in places():
        field = place.fields[-1]
        if place.method.containing_service.name == "DispatcherService":
            continue
        if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            continue
        if field.is_repeated and not place.each:
            continue
        most = place.limit.most
        if place.limit.unit is LimitUnit.BYTES:
            most //= 4
        yield place, min(most, MOST_TEMPLATE if field.name in TEMPLATES else MOST_SIZE)


@pytest.fixture
async def target(database_url: str, redis_url: str) -> AsyncIterator[AttackedServers]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(running_scheduler(database_url, redis_url))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address))
        stats = await stack.enter_async_context(stats_server(database_url, redis_url))
        channels = {method.containing_service.full_name: channel for method in contract_methods()}
        channels["outbox.v1.StatsService"] = stats
        yield AttackedServers(channels, scheduler, await scheduler.sender())


# The texts that are parsed get many shapes, the others one: other ones in each run.
PARSED: Final = frozenset(("subject", "body", "html", "csv", "email", "key", "value", "chunk"))
PARSED_SHAPES: Final = 6


async def test_no_text_in_any_field_stalls_a_service(target: AttackedServers) -> None:
    chance = random.Random()
    slow: list[str] = []
    seen: set[tuple[str, str]] = set()
    for place, size in texts():
        # The methods that take the same message share its checks.
        kind = (str(place.fields[-1].containing_type), place.fields[-1].name)
        many = place.fields[-1].name in PARSED and kind not in seen
        seen.add(kind)
        for shape in chance.sample(hostile_texts(size), PARSED_SHAPES if many else 1):
            # A collection of garbage may fall into one call, but not into three.
            for _ in range(3):
                seconds = await target.seconds(place, shape)
                if seconds < FLOOR_S:
                    break
            else:
                harmless = max([await target.seconds(place, text) for text in harmless_texts(size)])
                if seconds > MOST_RATIO * harmless:
                    slow.append(f"{place}: {shape[:30]!r}: {seconds:.3f} s, not {harmless:.3f} s")
    assert not slow, "\n".join(slow)
    assert len(seen) > 40
