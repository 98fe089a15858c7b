"""Both clients against a server that misbehaves: retried calls, and errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from outbox.v1.batch_pb2 import Batch, BatchOptions, BatchState
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest, WatchBatchResponse
from outbox.v1.sender_service_pb2 import CreateSenderRequest, GetSenderRequest, ListSendersRequest
from outbox_client import (
    AlreadyExists,
    CallError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    RetryPolicy,
    Unavailable,
)

from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.shared.errors import FieldViolation
from tests.eventually import PATIENCE, eventually
from tests.misbehaving import AWAY, EitherClient, FailedCall, MisbehavingServer, misbehaving_server

GET = GetSenderRequest(sender_id="7")
OPTIONS = BatchOptions(sender_id="7")
QUICK = RetryPolicy(tries=4, first=timedelta(milliseconds=5))
Code = grpc.StatusCode


@pytest.fixture
async def server() -> AsyncIterator[MisbehavingServer]:
    async with misbehaving_server() as running:
        yield running


@pytest.fixture(params=["asyncio", "threads"])
def client(request: pytest.FixtureRequest) -> EitherClient:
    return EitherClient(request.param)


def get(client: Any) -> Any:
    return client.senders.GetSender(GET)


def upload(rows: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda client: client.upload(rows, BatchOptions(sender_id="7", **options))


async def test_a_read_is_retried_while_the_server_is_unreachable(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY, AWAY]
    assert (await client.do(server.address, get, retry=QUICK)).sender_id == "7"
    assert len(server.requests) == 3


async def test_a_write_is_never_retried_after_it_may_have_run(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY, AWAY]
    with pytest.raises(Unavailable):
        await client.do(
            server.address, lambda c: c.senders.CreateSender(CreateSenderRequest()), retry=QUICK
        )
    assert len(server.requests) == 1


async def test_a_call_over_a_slow_network_needs_no_second_connection(
    server: MisbehavingServer, client: EitherClient
) -> None:
    async with TcpProxy(lambda: int(server.address.rpartition(":")[2])) as proxy:
        proxy.lag(0.3)
        address = f"127.0.0.1:{proxy.port}"
        await client.do(address, lambda c: c.senders.CreateSender(CreateSenderRequest()))
    assert len(server.requests) == 1


async def test_a_write_with_a_request_id_is_retried(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY, AWAY]
    create = CreateSenderRequest(request_id="once")
    await client.do(server.address, lambda c: c.senders.CreateSender(create), retry=QUICK)
    assert [each.request_id for each in server.requests] == ["once"] * 3


@pytest.mark.parametrize(
    "fault",
    [
        FailedCall(Code.RESOURCE_EXHAUSTED, "wait", "TOO_MANY_CALLS", timedelta(milliseconds=1)),
        FailedCall(Code.ABORTED, "again", "CONFLICT", timedelta(milliseconds=1)),
    ],
)
async def test_a_write_is_retried_if_it_cannot_have_run(
    server: MisbehavingServer, client: EitherClient, fault: FailedCall
) -> None:
    server.faults = [fault, fault]
    create = CreateSenderRequest()
    await client.do(server.address, lambda c: c.senders.CreateSender(create), retry=QUICK)
    assert len(server.requests) == 3


async def test_a_batch_is_retried_with_the_request_id_that_the_client_generated(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY, AWAY]
    request = ScheduleBatchRequest(options=OPTIONS, csv=b"email\na@b.org\n")
    await client.do(server.address, lambda c: c.batches.ScheduleBatch(request), retry=QUICK)
    first, second, third = (each.options.request_id for each in server.requests)
    assert first
    assert first == second == third
    assert not request.options.request_id


async def test_a_request_id_of_the_caller_is_kept(
    server: MisbehavingServer, client: EitherClient
) -> None:
    request = ScheduleBatchRequest(options=BatchOptions(request_id="mine"), csv=b"email\n")
    await client.do(server.address, lambda c: c.batches.ScheduleBatch(request))
    assert server.requests[0].options.request_id == "mine"


async def test_the_retry_delay_of_the_server_is_respected(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [
        FailedCall(
            Code.RESOURCE_EXHAUSTED, "busy", "DATABASE_EXHAUSTED", timedelta(milliseconds=300)
        )
    ]
    await client.do(server.address, get, retry=QUICK)
    first, second = server.times
    assert second - first >= 0.3


@pytest.mark.parametrize(
    "fault",
    [
        FailedCall(Code.RESOURCE_EXHAUSTED, "no", "QUOTA_EXCEEDED"),
        FailedCall(Code.RESOURCE_EXHAUSTED, "Sent message larger than max (5 vs. 4)"),
        FailedCall(Code.NOT_FOUND, "no", "SENDER_NOT_FOUND"),
        FailedCall(Code.INTERNAL, "no", "INTERNAL"),
        FailedCall(Code.INVALID_ARGUMENT, "no", "INVALID_INPUT"),
    ],
)
async def test_permanent_errors_are_not_retried(
    server: MisbehavingServer, client: EitherClient, fault: FailedCall
) -> None:
    server.faults = [fault]
    with pytest.raises(CallError):
        await client.do(server.address, get, retry=QUICK)
    assert len(server.requests) == 1


async def test_after_the_last_try_the_error_is_raised(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY] * 9
    with pytest.raises(Unavailable):
        await client.do(server.address, get, retry=QUICK)
    assert len(server.requests) == 4


async def test_no_pause_exceeds_the_deadline(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [FailedCall(Code.UNAVAILABLE, "later", "SHUTTING_DOWN", timedelta(seconds=60))]
    with pytest.raises(Unavailable, match="later"):
        await client.do(server.address, get, timeout=5)
    assert len(server.requests) == 1


async def test_a_call_has_a_default_deadline(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.silent = True
    with pytest.raises(DeadlineExceeded):
        await client.do(server.address, get, timeout=0.2)


async def test_an_error_has_all_details_of_the_server(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [
        FailedCall(
            Code.INVALID_ARGUMENT,
            "two fields are wrong",
            "INVALID_INPUT",
            violations=(FieldViolation("sender.email", "is no address"),),
        )
    ]
    with pytest.raises(InvalidArgument) as caught:
        await client.do(server.address, get)
    error = caught.value
    assert (error.code, error.reason, error.metadata) == (
        Code.INVALID_ARGUMENT,
        "INVALID_INPUT",
        {"limit": "3"},
    )
    ((field, description),) = [(one.field, one.description) for one in error.violations]
    assert (field, description) == ("sender.email", "is no address")
    assert str(error) == "two fields are wrong (INVALID_INPUT); sender.email: is no address"


async def test_an_error_without_details_uses_its_code_as_the_reason(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [FailedCall(Code.NOT_FOUND, "no such route")]
    with pytest.raises(NotFound) as caught:
        await client.do(server.address, get)
    assert (str(caught.value), caught.value.reason) == ("no such route (NOT_FOUND)", "")


async def test_the_api_key_is_sent_with_every_call(
    server: MisbehavingServer, client: EitherClient
) -> None:
    await client.do(server.address, get, api_key="k1")
    await client.do(server.address, upload(b"email\n"), api_key="k1")
    assert [each["authorization"] for each in server.metadata] == ["Bearer k1"] * 2


async def test_a_list_is_read_page_by_page(server: MisbehavingServer, client: EitherClient) -> None:
    request = ListSendersRequest(user_id="ann")
    server.faults = [AWAY]
    listed = await client.do(server.address, lambda c: c.list_senders(request), retry=QUICK)
    assert [each.sender_id for each in listed] == ["00", "01", "10", "11", "20", "21"]
    assert [each.page_token for each in server.requests] == ["", "", "1", "2"]
    assert not request.page_token


async def test_an_upload_that_can_be_read_again_is_retried_from_the_start(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY, AWAY]
    data = b"email\n" + b"a@b.org\n" * 20_000
    await client.do(server.address, upload(data), retry=QUICK)
    assert server.uploads == [data]
    assert len({each.options.request_id for each in server.requests}) == 1
    assert len(server.requests) == 3


async def test_an_upload_that_can_be_read_once_is_sent_once_and_its_error_has_the_request_id(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [AWAY]
    with pytest.raises(Unavailable) as caught:
        await client.do(server.address, upload(iter([b"email\n", b"a@b.org\n"])), retry=QUICK)
    assert [each.options.request_id for each in server.requests] == [caught.value.request_id]


async def test_an_upload_whose_rows_fail_never_looks_complete_to_the_server(
    server: MisbehavingServer, client: EitherClient
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        for number in range(20_000):
            yield {"email": f"{number}@b.org"}
        raise LookupError("the cursor is gone")

    with pytest.raises(LookupError, match="cursor"):
        await client.do(server.address, upload(rows()))
    await eventually(lambda: server.cancelled == 1)
    assert server.uploads == []


async def test_an_invalid_row_is_an_error_of_the_caller(
    server: MisbehavingServer, client: EitherClient
) -> None:
    with pytest.raises(TypeError, match="int"):
        await client.do(server.address, upload([7]))
    with pytest.raises(ValueError, match="row 2 has a column 'b'"):
        await client.do(server.address, upload([{"email": "a"}, {"email": "a", "b": 1}]))
    assert server.uploads == []


async def test_a_refused_upload_is_not_read_to_its_end(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [FailedCall(Code.ALREADY_EXISTS, "used", "REQUEST_ID_REUSED")]
    stop = threading.Event()

    def endless() -> Iterator[bytes]:
        while not stop.is_set():
            yield b"x" * 60_000

    try:
        with pytest.raises(AlreadyExists):
            await client.do(server.address, upload(endless()))
    finally:
        stop.set()


async def test_rows_become_a_csv_and_progress_is_reported(
    server: MisbehavingServer, client: EitherClient
) -> None:
    seen: list[tuple[int, int | None, int]] = []
    rows = [{"email": "a@b.org", "name": 'A "x", \n'}, {"email": "c@d.org", "name": None}]
    await client.do(
        server.address,
        lambda c: c.upload(
            rows,
            OPTIONS,
            progress=lambda now: seen.append((now.sent_bytes, now.total_bytes, now.rows)),
        ),
    )
    expected = b'email,name\r\na@b.org,"A ""x"", \n"\r\nc@d.org,\r\n'
    assert server.uploads == [expected]
    assert seen == [(len(expected), None, 2)]


async def test_asynchronous_rows_are_uploaded_too(server: MisbehavingServer) -> None:
    async def rows() -> AsyncIterator[dict[str, str]]:
        for number in range(3):
            await asyncio.sleep(0)
            yield {"email": f"{number}@b.org"}

    await EitherClient("asyncio").do(server.address, upload(rows()))
    assert server.uploads == [b"email\r\n0@b.org\r\n1@b.org\r\n2@b.org\r\n"]


async def test_a_cancelled_upload_ends_at_once_on_both_sides(
    server: MisbehavingServer,
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 60_000

    use = upload(endless())
    task = asyncio.create_task(EitherClient("asyncio").do(server.address, use))
    await eventually(lambda: server.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(PATIENCE):
            await task
    await eventually(lambda: server.cancelled == 1)
    assert server.uploads == []


def update(sent: int, *, done: bool = False) -> WatchBatchResponse:
    batch = Batch(batch_id="1")
    batch.counts.sent_count = sent
    return WatchBatchResponse(batch=batch, resume_token=f"t{sent}", done=done)


async def test_a_broken_watch_resumes_from_its_token(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.streams = [[update(1), update(2)], [], [update(3, done=True)]]
    server.faults = [AWAY]
    reported: list[CallError] = []
    seen = await client.do(server.address, lambda c: c.watch_batch("1", trouble=reported.append))
    assert [each.counts.sent_count for each in seen] == [1, 2, 3]
    assert [each.resume_token for each in server.requests] == ["", "", "t2", "t2"]
    assert [type(error) for error in reported] == [Unavailable]


async def test_without_a_watch_the_batch_is_polled_until_it_ends(
    server: MisbehavingServer, client: EitherClient
) -> None:
    server.faults = [FailedCall(Code.UNIMPLEMENTED)]
    going = Batch(state=BatchState.BATCH_STATE_ACTIVE)
    done = Batch(state=BatchState.BATCH_STATE_DONE)
    server.batches = [going, going, done]
    seen = await client.do(server.address, lambda c: c.watch_batch("1"))
    assert seen == [going, done]


async def test_waiting_times_out(server: MisbehavingServer, client: EitherClient) -> None:
    server.faults = [FailedCall(Code.UNIMPLEMENTED)]
    server.batches = [Batch(state=BatchState.BATCH_STATE_ACTIVE)] * 9
    with pytest.raises(DeadlineExceeded):
        await client.do(server.address, lambda c: c.wait_for_batch("1", timeout=0.5))


async def test_a_missing_service_address_is_named(
    server: MisbehavingServer, client: EitherClient
) -> None:
    with pytest.raises(ValueError, match="stats='host:port'"):
        await client.do(server.address, lambda c: c.stats.GetSenderStats(GET))
