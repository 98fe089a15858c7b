"""Eve takes as much as she can; Ann's calls go on as without her."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
import psycopg
import pytest
from outbox.v1 import stats_service_pb2_grpc
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.batch_service_pb2 import (
    ScheduleBatchRequest,
    UploadBatchRequest,
    WatchBatchRequest,
)
from outbox.v1.sender_pb2 import SMTP_SECURITY_NONE, Sender, SmtpEndpoint
from outbox.v1.sender_service_pb2 import (
    GetSenderRequest,
    UpdateSenderRequest,
    VerifySenderRequest,
)
from outbox.v1.stats_service_pb2 import ForecastBatchRequest, PlannedBatch
from outbox.v1.suppression_service_pb2 import EraseRecipientRequest

from outbox_server.services.scheduler.verifying import AT_ONCE_PER_USER
from outbox_server.shared import turns
from outbox_server.shared.auth.keys import make_key
from outbox_server.shared.callers import current_claimant
from outbox_server.shared.fair_shares import PATIENCE as PLACE_PATIENCE
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.rpc import refusals as refusals_module
from outbox_server.shared.rpc import request_rates
from outbox_server.shared.rpc.request_rates import RequestRates
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import options_for, refusal_of
from tests.smtp_servers import ScriptedServer, Wait
from tests.stats_stack import stats_server
from tests.two_users import (
    Metadata,
    Rivals,
    check_as_fast,
    give_up,
    make_keys,
    p99,
    refusals,
    rivals,
    whose_limit,
)


async def quiet_and_loaded(rivals: Rivals, sender: Sender) -> tuple[Any, float]:
    """Return a call of Ann's, and the latency of such calls while nobody else calls."""

    async def call() -> Sender:
        request = GetSenderRequest(sender_id=sender.sender_id)
        return await rivals.scheduler.senders.GetSender(
            request, metadata=rivals.ann, timeout=PATIENCE
        )

    await call()
    return call, await p99(call)


def updates(both: Rivals, request: UpdateSenderRequest, count: int) -> list[asyncio.Future[Any]]:
    """Begin as many calls of Eve's at once."""
    update = both.scheduler.senders.UpdateSender
    return [asyncio.ensure_future(update(request, metadata=both.eve)) for _ in range(count)]


async def test_slow_calls_of_one_user_leave_the_calls_of_another_as_fast_as_before(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        call, quiet = await quiet_and_loaded(both, hers)
        request = UpdateSenderRequest(sender=Sender(sender_id=evil.sender_id, display_name="Slow"))
        with psycopg.connect(database_url) as holder:
            # Every call of Eve's waits for this row, most of them with a connection.
            holder.execute("SELECT FROM senders WHERE id = %s FOR UPDATE", [int(evil.sender_id)])
            flood = updates(both, request, 850)
            # 45 run, 750 wait, and the rest is refused.
            await eventually(lambda: sum(each.done() for each in flood) == 55)
            assert refusals(flood) == {("TOO_MANY_CALLS", "user eve"): 55}
            await check_as_fast(call, quiet)
        await give_up(flood)


async def test_a_user_whose_calls_are_refused_waits_for_further_refusals(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals_module, "_AT_ONCE", 1)
    monkeypatch.setattr(refusals_module, "_EVERY_S", 3600.0)
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        request = GetSenderRequest(sender_id=evil.sender_id)
        await both.set_quotas("eve", calls=0)

        async def code(deadline: float) -> grpc.StatusCode:
            call = both.scheduler.senders.GetSender(request, metadata=both.eve, timeout=deadline)
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        async def is_refused() -> bool:
            return await code(PATIENCE) is grpc.StatusCode.RESOURCE_EXHAUSTED

        # A key may have the quotas of before for some seconds.
        await eventually(is_refused)
        assert await code(1) is grpc.StatusCode.DEADLINE_EXCEEDED
        call, _ = await quiet_and_loaded(both, hers)
        await call()


async def test_calls_of_one_user_run_one_at_a_time_beside_those_of_another(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Usually a call that waits for a lock soon makes room for another one.
    monkeypatch.setattr(turns, "_COUNTS_S", 3600.0)
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        call, _ = await quiet_and_loaded(both, hers)
        request = UpdateSenderRequest(sender=Sender(sender_id=evil.sender_id, display_name="Slow"))
        with psycopg.connect(database_url) as holder:
            holder.execute("SELECT FROM senders WHERE id = %s FOR UPDATE", [int(evil.sender_id)])
            flood = updates(both, request, 10)
            await eventually(lambda: waits_for_a_row(database_url) == turns.AT_ONCE)
            await p99(call)
            # On a busy machine a call may have reached its limit, and the next one begins.
            await eventually(lambda: waits_for_a_row(database_url) >= turns.AT_ONCE)
            assert waits_for_a_row(database_url) == turns.AT_ONCE
        await give_up(flood)


async def test_requests_of_many_empty_entries_leave_the_calls_of_another_as_fast_as_before(
    database_url: str, redis_url: str
) -> None:
    # Each of them would take 0.25 s and 100 MB if it were decoded at once.
    request = UpdateSenderRequest()
    request.update_mask.paths.extend([""] * 2_400_000)
    wire = request.SerializeToString()
    async with (
        rivals(database_url, redis_url) as both,
        grpc.aio.insecure_channel(both.scheduler.address) as channel,
    ):
        hers = await both.sender(both.ann)
        call, quiet = await quiet_and_loaded(both, hers)
        update: Any = channel.unary_unary("/outbox.v1.SenderService/UpdateSender")
        answers: Counter[tuple[str, str]] = Counter()

        async def flood() -> None:
            while True:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await update(wire, metadata=both.eve)
                answers[whose_limit(caught.value)] += 1

        floods = [asyncio.ensure_future(flood()) for _ in range(10)]
        await check_as_fast(call, quiet)
        await give_up(floods)
        assert set(answers) == {("UPDATE_MASK_INVALID", "")}


async def test_large_requests_of_one_user_wait_unread_while_another_calls(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After the first bytes, the rate is nearly nothing.
    monkeypatch.setattr(request_rates, "_PER_S", 1.0)
    read = Counter[str]()
    add = RequestRates.add

    def noted(rates: RequestRates, size: int) -> None:
        read[current_claimant().name] += size
        add(rates, size)

    monkeypatch.setattr(RequestRates, "add", noted)
    large = UpdateSenderRequest(sender=Sender(display_name="x" * 4_000_000))
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        call, _ = await quiet_and_loaded(both, hers)

        async def endless() -> AsyncIterator[UploadBatchRequest]:
            yield UploadBatchRequest(options=options_for(evil))
            while True:
                yield UploadBatchRequest(chunk=b"x" * 4_000_000)

        async def flood(begin: Callable[[], Any]) -> None:
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await begin()

        update, upload = both.scheduler.senders.UpdateSender, both.scheduler.batches.UploadBatch
        floods = [
            asyncio.ensure_future(flood(begin))
            for begin in (
                lambda: update(large, metadata=both.eve),
                lambda: upload(endless(), metadata=both.eve),
            )
            for _ in range(5)
        ]
        await eventually(lambda: read["eve"] > request_rates._AT_ONCE)
        for _ in range(4):
            await p99(call)
        # Those that were being read together.
        assert read["eve"] < request_rates._AT_ONCE + 12 * 4_000_000
        # Her own requests are not held up.
        request = ScheduleBatchRequest(options=options_for(hers), csv=b"email\n" + b"\n" * 100_000)
        with pytest.raises(grpc.aio.AioRpcError, match="no rows"):
            await both.scheduler.batches.ScheduleBatch(request, metadata=both.ann)
        so_far = read["eve"]
        # Nobody else calls any more.
        await eventually(lambda: read["eve"] > so_far)
        await give_up(floods)


async def test_erasures_of_one_user_leave_the_calls_of_another_as_fast_as_before(
    database_url: str, redis_url: str
) -> None:
    # Texts that were cut have to be compared with each part of the address.
    wrong = "".join(f"{'x' * 300}{number}\n" for number in range(10_000))
    address = f"x@{'long.' * 48}org"
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        for _ in range(2):
            request = ScheduleBatchRequest(
                options=options_for(evil), csv=f"email\na@b.org\n{wrong}".encode()
            )
            await both.scheduler.batches.ScheduleBatch(request, metadata=both.eve)
        call, quiet = await quiet_and_loaded(both, hers)
        erasures = [
            asyncio.ensure_future(
                both.scheduler.suppressions.EraseRecipient(
                    EraseRecipientRequest(email=address), metadata=both.eve
                )
            )
            for _ in range(40)
        ]
        await check_as_fast(call, quiet)
        assert {reason for reason, _ in refusals(erasures)} <= {"TOO_MANY_CALLS"}
        await give_up(erasures)


async def trickle(
    sender: Sender, stop: asyncio.Event, *, every: float = 0.05
) -> AsyncIterator[UploadBatchRequest]:
    """Yield an upload of one byte at a time."""
    yield UploadBatchRequest(options=options_for(sender))
    yield UploadBatchRequest(chunk=b"email\n")
    while not stop.is_set():
        try:
            async with asyncio.timeout(every):
                await stop.wait()
        except TimeoutError:
            yield UploadBatchRequest(chunk=b"a")


async def whole(sender: Sender) -> AsyncIterator[UploadBatchRequest]:
    yield UploadBatchRequest(options=options_for(sender))
    yield UploadBatchRequest(chunk=b"email\na@b.org\n")


def slow_uploads(
    both: Rivals, sender: Sender, stop: asyncio.Event, count: int
) -> list[asyncio.Future[Any]]:
    return [
        asyncio.ensure_future(
            both.scheduler.batches.UploadBatch(trickle(sender, stop), metadata=both.eve)
        )
        for _ in range(count)
    ]


async def test_slow_uploads_of_one_user_leave_places_for_those_of_another(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = FairShares.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "patience", PLACE_PATIENCE)
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        stop = asyncio.Event()

        async def upload() -> None:
            answer = await both.scheduler.batches.UploadBatch(whole(hers), metadata=both.ann)
            assert answer.batch.accepted_count == 1

        await upload()
        quiet = await p99(upload, 10)
        uploads = slow_uploads(both, evil, stop, 16)
        await check_as_fast(upload, quiet, 10)
        # 12 hold a place, and 4 wait for one.
        await eventually(lambda: sum(each.done() for each in uploads) == 4)
        assert refusals(uploads) == {("TOO_MANY_CALLS", "user eve"): 4}
        stop.set()
        await give_up(uploads)


async def test_an_upload_below_the_least_rate_ends(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url, upload_patience="500ms") as both:
        stop = asyncio.Event()
        uploads = slow_uploads(both, await both.sender(both.eve), stop, 3)
        await eventually(lambda: all(each.done() for each in uploads))
        assert refusals(uploads) == {("UPLOAD_TOO_SLOW", ""): 3}


async def test_an_upload_that_never_begins_ends(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url, upload_patience="200ms") as both:
        never = asyncio.Event()

        async def nothing() -> AsyncIterator[UploadBatchRequest]:
            await never.wait()
            yield UploadBatchRequest(options=BatchOptions())

        call = both.scheduler.batches.UploadBatch(nothing(), metadata=both.eve)
        assert (await refusal_of(call)).reason == "UPLOAD_STALLED"


async def test_watches_of_one_user_leave_room_for_those_of_another(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        batches = [
            (
                await both.scheduler.batches.UploadBatch(
                    whole(await both.sender(key)), metadata=key
                )
            ).batch.batch_id
            for key in (both.ann, both.eve)
        ]

        async def watch() -> None:
            request = WatchBatchRequest(batch_id=batches[0])
            hers = both.scheduler.batches.WatchBatch(request, metadata=both.ann)
            async with watching([hers]) as (read,):
                async with asyncio.timeout(PATIENCE):
                    assert (await read).batch.batch_id == batches[0]

        await watch()
        quiet = await p99(watch, 10)
        reads: list[asyncio.Future[Any]] = []
        async with AsyncExitStack() as open_watches:
            # In groups: a call that waits for a connection to PostgreSQL is refused after 10 s.
            for _ in range(8):
                group = [
                    both.scheduler.batches.WatchBatch(
                        WatchBatchRequest(batch_id=batches[1]), metadata=both.eve
                    )
                    for _ in range(100)
                ]
                opened = await open_watches.enter_async_context(watching(group))
                _, late = await asyncio.wait(opened, timeout=PATIENCE)
                assert not late
                reads.extend(opened)
            assert refusals(reads) == {("TOO_MANY_CALLS", "user eve"): 800 - 704}
            await check_as_fast(watch, quiet, 10)


@asynccontextmanager
async def watching(streams: list[Any]) -> AsyncIterator[list[asyncio.Future[Any]]]:
    """Read the first message of each stream, and end them all."""
    reads = [asyncio.ensure_future(stream.read()) for stream in streams]
    try:
        yield reads
    finally:
        await give_up(reads)
        for stream in streams:
            stream.cancel()


async def test_verifications_of_one_user_leave_those_and_the_calls_of_another_as_before(
    database_url: str, redis_url: str
) -> None:
    async with (
        rivals(database_url, redis_url, smtp_allow="127.0.0.0/8") as both,
        ScriptedServer({"greeting": Wait()}) as silent,
        ScriptedServer() as good,
    ):
        evil = await both.sender(both.eve, smtp=at(silent))
        hers = await both.sender(both.ann, smtp=at(good))
        call, quiet = await quiet_and_loaded(both, hers)
        flood = [verify(both, evil, both.eve) for _ in range(200)]
        # A service's key that names no user is limited by its share.
        flood += [verify(both, evil, both.service) for _ in range(100)]
        await eventually(lambda: silent.waiting["greeting"] > AT_ONCE_PER_USER)
        # Calls with the service's key may be refused as well.
        await eventually(lambda: refusals(flood)["TOO_MANY_CALLS", "user eve"] == 196)
        await check_as_fast(call, quiet)
        assert (await verify(both, hers, both.ann)).ready
        silent.cut()
        await give_up(flood)


def at(server: ScriptedServer) -> SmtpEndpoint:
    return SmtpEndpoint(host="127.0.0.1", port=server.port, security=SMTP_SECURITY_NONE)


def verify(both: Rivals, sender: Sender, key: Metadata) -> asyncio.Future[Any]:
    request = VerifySenderRequest(sender_id=sender.sender_id)
    return asyncio.ensure_future(both.scheduler.senders.VerifySender(request, metadata=key))


async def test_forecasts_of_one_user_leave_a_place_for_those_of_another(
    database_url: str, redis_url: str
) -> None:
    keys = await make_keys(database_url)
    async with stats_server(database_url, redis_url, auth="keys") as channel:
        with psycopg.connect(database_url) as holder:
            ids = {}
            for user in ("ann", "eve"):
                ids[user] = holder.execute(
                    "INSERT INTO senders (user_id, email, hourly_limit) VALUES (%s, 'a@b.org', 9)"
                    " RETURNING id",
                    [user],
                ).fetchone()
            holder.commit()

            async def plan() -> None:
                assert (await forecast(channel, ids["ann"], keys["ann"])).job_count == 5

            await plan()
            quiet = await p99(plan, 10)
            # In a thread: the server in this process may have to end a transaction first.
            await asyncio.to_thread(holder.execute, "LOCK TABLE senders IN ACCESS EXCLUSIVE MODE")
            flood = [forecast(channel, ids["eve"], keys["eve"]) for _ in range(100)]
            # 3 run, 75 wait, and the rest is refused.
            await eventually(lambda: sum(each.done() for each in flood) == 22)
            assert refusals(flood) == {("TOO_MANY_CALLS", "user eve"): 22}
            hers = forecast(channel, ids["ann"], keys["ann"])
            await eventually(lambda: waits_for_lock(database_url) == 4)
        async with asyncio.timeout(PATIENCE):
            assert (await hers).job_count == 5
        # Nothing is locked any more: all of hers run beside as many of the other user's as may.
        flood += [forecast(channel, ids["eve"], keys["eve"]) for _ in range(70)]
        await check_as_fast(plan, quiet, 10)
        await give_up(flood)


def forecast(channel: grpc.aio.Channel, row: Any, key: Metadata) -> asyncio.Future[Any]:
    stub = stats_service_pb2_grpc.StatsServiceStub(channel)
    planned = PlannedBatch(options=BatchOptions(sender_id=str(row[0])), recipient_count=5)
    request = ForecastBatchRequest(planned_batch=planned)
    return asyncio.ensure_future(stub.ForecastBatch(request, metadata=key))


def waits_for_lock(database_url: str) -> int:
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'senders'::regclass"
        ).fetchone()
    assert row is not None
    return int(row[0])


async def test_made_up_keys_leave_connections_to_others(database_url: str, redis_url: str) -> None:
    async with rivals(database_url, redis_url, database_pool=20) as both:
        hers = await both.sender(both.ann)
        request = GetSenderRequest(sender_id=hers.sender_id)
        get = both.scheduler.senders.GetSender
        with psycopg.connect(database_url) as holder:
            # Each look-up waits for the table, for a while.
            holder.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
            flood = [
                asyncio.ensure_future(
                    get(request, metadata=(("authorization", f"Bearer {make_key().text}"),))
                )
                for _ in range(100)
            ]
            await eventually(lambda: waits_for_a_row(database_url) >= 4)
            for _ in range(10):
                await get(request, metadata=both.ann, timeout=PATIENCE)
                # Her key may be looked up again, and health may look at the table.
                assert waits_for_a_row(database_url) <= 4 + 2
        await asyncio.wait(flood)
        assert refusals(flood).keys() <= {("API_KEY_INVALID", ""), ("DATABASE_UNAVAILABLE", "")}
        await get(request, metadata=both.ann)


@pytest.mark.parametrize("kind", ["ann", "operator"])
async def test_other_callers_have_connections_while_one_users_calls_wait_for_a_lock(
    database_url: str, redis_url: str, kind: str
) -> None:
    async with rivals(database_url, redis_url, database_pool=4) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        request = UpdateSenderRequest(sender=Sender(sender_id=evil.sender_id, display_name="Slow"))
        with psycopg.connect(database_url) as holder:
            holder.execute("SELECT FROM senders WHERE id = %s FOR UPDATE", [int(evil.sender_id)])
            flood = updates(both, request, 20)
            await eventually(lambda: waits_for_a_row(database_url) == 3)
            found = await both.scheduler.senders.GetSender(
                GetSenderRequest(sender_id=hers.sender_id),
                metadata=getattr(both, kind),
                timeout=PATIENCE,
            )
            assert found.sender_id == hers.sender_id
            assert not any(each.done() for each in flood)
        await give_up(flood)


def waits_for_a_row(database_url: str) -> int:
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock'"
        ).fetchone()
    assert row is not None
    return int(row[0])
