"""Both clients against a real scheduler."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import grpc
import pytest
from outbox.v1.batch_pb2 import BatchOptions, BatchState
from outbox.v1.batch_service_pb2 import CancelBatchRequest, ListRejectionsRequest
from outbox.v1.email_job_service_pb2 import ListEmailJobsRequest
from outbox.v1.sender_service_pb2 import GetSenderRequest
from outbox_client import NO_RETRIES, AlreadyExists, AsyncClient, NotFound, Tls, Unavailable

from outbox_server.deploy.certificates import self_signed
from tests.eventually import PATIENCE
from tests.for_each import for_each_case
from tests.misbehaving import EitherClient, misbehaving_server
from tests.scheduler_stack import Scheduler, running_scheduler, stored

CSV = b"email,name\na@b.org,Ann\nbroken,Bob\nc@d.org,Cid\n"


@pytest.fixture(params=["asyncio", "threads"])
def client(request: pytest.FixtureRequest) -> EitherClient:
    return EitherClient(request.param)


async def options(scheduler: Scheduler, **more: Any) -> BatchOptions:
    sender = await scheduler.sender()
    more = {"subject": "Hello", "body": "Good day", "user_id": "ann", **more}
    return BatchOptions(sender_id=sender.sender_id, **more)


@for_each_case(
    "kind",
    [("path",), ("file",), ("bytes",), ("iterator",), ("rows",)],
)
async def test_a_batch_is_created_from_any_supported_source_of_rows(
    scheduler: Scheduler, client: EitherClient, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "people.csv"
    path.write_bytes(CSV)
    rows = [{"email": "a@b.org"}, {"email": "broken"}, {"email": "c@d.org"}]
    source: Any = {
        "path": path,
        "file": io.BytesIO(CSV),
        "bytes": CSV,
        "iterator": iter([CSV[:7], CSV[7:]]),
        "rows": rows,
    }[kind]
    wanted = await options(scheduler)
    answer = await client.do(scheduler.address, lambda c: c.upload(source, wanted))
    assert (answer.batch.accepted_count, answer.batch.rejected_count) == (2, 1)
    assert answer.batch.request_id


async def test_the_same_request_id_counts_once_and_with_other_rows_is_refused(
    scheduler: Scheduler, client: EitherClient
) -> None:
    wanted = await options(scheduler, request_id="once")
    first = await client.do(scheduler.address, lambda c: c.upload(CSV, wanted))
    again = await client.do(scheduler.address, lambda c: c.upload(CSV, wanted))
    assert (again.replayed, again.batch.batch_id) == (True, first.batch.batch_id)
    with pytest.raises(AlreadyExists) as caught:
        # Large enough to be under way when the server refuses it.
        await client.do(
            scheduler.address, lambda c: c.upload(CSV + b"x@y.org,Eve\n" * 50_000, wanted)
        )
    assert (caught.value.reason, caught.value.request_id) == ("REQUEST_ID_REUSED", "once")


async def test_a_refusal_of_the_options_arrives_during_the_upload(
    scheduler: Scheduler, client: EitherClient
) -> None:
    wanted = BatchOptions(sender_id="999", subject="x", body="y", user_id="ann")
    for _ in range(5):
        with pytest.raises(NotFound) as caught:
            await client.do(scheduler.address, lambda c: c.upload(CSV * 20_000, wanted))
        assert caught.value.reason == "SENDER_NOT_FOUND"


async def test_jobs_and_rejections_are_listed_across_pages(
    scheduler: Scheduler, client: EitherClient
) -> None:
    wanted = await options(scheduler)
    rows = [{"email": f"{n}@b.org" if n % 2 else "broken"} for n in range(10)]
    answer = await client.do(scheduler.address, lambda c: c.upload(rows, wanted))
    batch_id = answer.batch.batch_id
    jobs = await client.do(
        scheduler.address,
        lambda c: c.list_email_jobs(ListEmailJobsRequest(batch_id=batch_id, page_size=2)),
    )
    assert [job.recipient for job in jobs] == [f"{n}@b.org" for n in range(1, 10, 2)]
    rejections = await client.do(
        scheduler.address,
        lambda c: c.list_rejections(ListRejectionsRequest(batch_id=batch_id, page_size=2)),
    )
    assert [one.row_number for one in rejections] == [1, 3, 5, 7, 9]


async def test_waiting_ends_when_no_job_of_the_batch_waits(
    scheduler: Scheduler, client: EitherClient
) -> None:
    wanted = await options(scheduler)
    answer = await client.do(scheduler.address, lambda c: c.upload(CSV, wanted))
    batch_id = answer.batch.batch_id
    await client.do(
        scheduler.address, lambda c: c.batches.CancelBatch(CancelBatchRequest(batch_id=batch_id))
    )
    batch = await client.do(
        scheduler.address, lambda c: c.wait_for_batch(batch_id, "ann", timeout=PATIENCE)
    )
    assert batch.state == BatchState.BATCH_STATE_CANCELLED
    assert batch.counts.cancelled_count == 2


async def test_a_call_survives_a_restart_of_the_scheduler(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as first:
        sender = await first.sender()
        request = GetSenderRequest(sender_id=sender.sender_id, user_id="ann")
        client = AsyncClient(first.address)
        assert stored(await client.senders.GetSender(request)) == sender
    with pytest.raises(Unavailable):
        await client.senders.GetSender(request, timeout=0.5)
    async with running_scheduler(database_url, redis_url, scheduler_listen=first.address):
        assert stored(await client.senders.GetSender(request)) == sender
    await client.close()


async def test_a_client_presents_its_certificate_to_a_server_that_requires_one(
    client: EitherClient, tmp_path: Path
) -> None:
    server_certificate, server_key = self_signed(tmp_path / "server")
    own_certificate, own_key = self_signed(tmp_path / "client")
    credentials = grpc.ssl_server_credentials(
        [(server_key.read_bytes(), server_certificate.read_bytes())],
        own_certificate.read_bytes(),
        require_client_auth=True,
    )
    tls = Tls(server_certificate, own_certificate, own_key)
    request = GetSenderRequest(sender_id="7")
    async with misbehaving_server(credentials) as server:
        for use in (
            lambda c: c.senders.GetSender(request),
            lambda c: c.upload(CSV, BatchOptions()),
        ):
            await client.do(server.address, use, tls=tls)
            with pytest.raises(Unavailable):
                await client.do(server.address, use, tls=Tls(server_certificate), retry=NO_RETRIES)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        AsyncClient("127.0.0.1:1", tls=Tls(certificate="x.crt"))
