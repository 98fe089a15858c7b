"""Large requests are decoded in parts, with the same result as at once."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from outbox.v1.batch_pb2 import BatchOptions, Recipient
from outbox.v1.batch_service_pb2 import PreviewBatchRequest, ScheduleBatchRequest
from outbox.v1.email_job_event_service_pb2 import WatchEmailJobsRequest
from outbox.v1.email_job_service_pb2 import RetryEmailJobsRequest
from outbox.v1.sender_service_pb2 import UpdateSenderRequest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.rpc.decoding import AT_ONCE, Decoder

# Entries of nothing: two bytes each on the wire.
EMPTY = 2_500_000

texts = st.text(max_size=8)
rows = st.builds(
    lambda email, columns, times: [Recipient(email=email, columns=columns)] * times,
    texts,
    st.dictionaries(texts, texts, max_size=3),
    st.sampled_from((0, 1, 600)),
)


def varint(number: int) -> bytes:
    if number <= 0x7F:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def in_field(kind: type[Message], name: str, body: bytes) -> bytes:
    """Return a field of bytes on the wire."""
    number = kind.DESCRIPTOR.fields_by_name[name].number
    return varint(number << 3 | 2) + varint(len(body)) + body


async def decoded(kind: type[Any], data: bytes) -> Any:
    return await Decoder().decode(kind, data)


@given(st.lists(rows, max_size=3), st.lists(st.integers(1, 2**31 - 1), max_size=10), st.data())
def test_a_message_in_parts_is_the_message_at_once(
    batches: list[list[Recipient]], numbers: list[int], data: st.DataObject
) -> None:
    made = PreviewBatchRequest(row_numbers=numbers)
    made.options.labels["of"] = "options"
    made.options.subject = "x" * AT_ONCE
    for each in batches:
        made.recipients.rows.extend(each)
        # A row that is decoded in parts.
        made.recipients.rows.add(email="long@example.org").columns["a"] = "long" * AT_ONCE
    wire = made.SerializeToString()
    assert asyncio.run(decoded(PreviewBatchRequest, wire)) == made
    # Split fields merge, and damaged ones are refused as they are at once.
    assert asyncio.run(decoded(PreviewBatchRequest, wire * 2)) == PreviewBatchRequest.FromString(
        wire * 2
    )
    cut = wire[: data.draw(st.integers(0, len(wire)))]
    try:
        expected = PreviewBatchRequest.FromString(cut)
    except DecodeError:
        with pytest.raises(DecodeError):
            asyncio.run(decoded(PreviewBatchRequest, cut))
    else:
        assert asyncio.run(decoded(PreviewBatchRequest, cut)) == expected


@pytest.mark.parametrize(
    ("kind", "wire", "path"),
    [
        (
            UpdateSenderRequest,
            in_field(UpdateSenderRequest, "update_mask", b"\x0a\x00" * EMPTY),
            "update_mask.paths",
        ),
        (
            RetryEmailJobsRequest,
            in_field(RetryEmailJobsRequest, "email_job_ids", b"") * EMPTY,
            "email_job_ids",
        ),
        (
            WatchEmailJobsRequest,
            in_field(WatchEmailJobsRequest, "states", b"\x01" * EMPTY),
            "states",
        ),
        (
            ScheduleBatchRequest,
            in_field(
                ScheduleBatchRequest, "options", in_field(BatchOptions, "headers", b"") * EMPTY
            ),
            "options.headers",
        ),
    ],
    ids=["mask", "ids", "packed", "headers"],
)
async def test_a_list_above_its_limit_is_refused_before_it_is_decoded(
    kind: type[Message], wire: bytes, path: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await decoded(kind, wire)
    shown = re.fullmatch(
        rf"{path}: must have at most .* \(got at least ([\d,]+)\)", str(caught.value)
    )
    assert shown, caught.value
    # The rest was not read. Numbers are counted by the bytes that they take.
    assert int(shown[1].replace(",", "")) <= EMPTY // 10


async def test_a_large_entry_of_a_map_is_one_entry() -> None:
    entry = in_field(BatchOptions, "labels", b"\x12" + varint(99_000) + b"x" * 99_000)
    found = await decoded(ScheduleBatchRequest, in_field(ScheduleBatchRequest, "options", entry))
    assert found.options.labels == {"": "x" * 99_000}


async def test_other_work_runs_between_the_parts() -> None:
    wire = in_field(ScheduleBatchRequest, "recipients", b"\x0a\x00" * 100_000)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    found = await decoded(ScheduleBatchRequest, wire)
    counting.cancel()
    assert len(found.recipients.rows) == 100_000
    assert turns >= 200  # a part has at most 500 entries


@pytest.mark.parametrize(
    "wire",
    [
        b"\x0b\x0c" * AT_ONCE,
        b"\xff" * 2 * AT_ONCE,
        b"\x0a\xff\xff\xff\xff\x7f" + bytes(AT_ONCE),
        # A size of 2**17 bytes, as options that have it, in more bytes than FromString accepts.
        in_field(ScheduleBatchRequest, "options", b"")[:1]
        + b"\x80\x80\x88\x80\x80\x00"
        + b"\x0a\x00" * 2**16,
        b"\x78\x01" * EMPTY,
    ],
    ids=["groups", "endless number", "size beyond the end", "long size", "a number set often"],
)
async def test_large_bytes_that_are_no_message_are_refused(wire: bytes) -> None:
    with pytest.raises(DecodeError):
        await decoded(ScheduleBatchRequest, wire)
