"""A real server on a free port, and real clients: grpc.aio, grpcurl, buf curl."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import sys
import time
import weakref
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from outbox.v1 import (
    batch_service_pb2,
    stats_service_pb2,
)

from outbox_server.shared.callers import CallerKind, current_caller
from outbox_server.shared.errors import (
    ConfigurationError,
    FieldViolation,
    InvalidInput,
    Unavailable,
    Violations,
)
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE, eventually
from tests.grpc_stack import (
    BATCHES,
    GRACE,
    NOT_SERVING,
    SERVING,
    STATS,
    Stack,
    detail,
    reason,
    running,
)

BIN = Path(sys.executable).parent


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[Stack]:
    async with running(load_settings(auth="off")) as stack:
        yield stack


# Errors


async def test_a_domain_error_arrives_with_its_details(stack: Stack) -> None:
    async def fail() -> None:
        raise InvalidInput.field("sender_id", "is no number", metadata={"sender_id": "x"})

    stack.stats.behaviour = fail
    status = await stack.refused(stack.call())
    assert reason(status) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert status.message == "sender_id: is no number"
    assert detail(status, error_details_pb2.ErrorInfo).metadata["sender_id"] == "x"
    violation = detail(status, error_details_pb2.BadRequest).field_violations[0]
    assert (violation.field, violation.description) == ("sender_id", "is no number")


async def test_an_error_in_a_stream_arrives_after_its_messages(stack: Stack) -> None:
    async def fail() -> None:
        raise Unavailable("gone", retry_after=timedelta(seconds=3))

    stack.stats.behaviour = fail
    watch = stack.stub.WatchSenderStats(stats_service_pb2.WatchSenderStatsRequest())
    assert await watch.read() is not grpc.aio.EOF
    status = await stack.refused(watch.read())
    assert reason(status) == ("UNAVAILABLE", "UNAVAILABLE")
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.seconds == 3


async def test_an_unknown_error_reports_only_an_incident_id(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise KeyError("the secret text")

    stack.stats.behaviour = fail
    status = await stack.refused(stack.call())
    assert reason(status) == ("INTERNAL", "INTERNAL")
    assert "secret text" not in str(status)
    incident = detail(status, error_details_pb2.ErrorInfo).metadata["incident"]
    logged = "".join(capsys.readouterr())
    assert incident in logged
    assert "the secret text" in logged


async def test_a_refused_call_leaves_no_garbage(stack: Stack) -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []

    async def fail() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        wrong = Violations()
        for name in ("a", "b"):
            with wrong:
                raise InvalidInput.field(name, "is wrong")
        wrong.raise_any()

    stack.stats.behaviour = fail
    gc.disable()  # a server runs a full collection every few minutes only
    try:
        await stack.refused(stack.call())
        await eventually(lambda: kept[0]() is None)
    finally:
        gc.enable()


async def test_an_answer_of_another_type_leaks_nothing(stack: Stack) -> None:
    stack.stats.answer = "the secret text"
    status = await stack.refused(stack.call())
    assert reason(status) == ("INTERNAL", "INTERNAL")
    assert "str" not in status.message


async def test_an_error_of_many_fields_still_reaches_the_client(stack: Stack) -> None:
    async def fail() -> None:
        raise InvalidInput(
            "\u6f22" * 5_000,
            violations=[FieldViolation(f"rows[{n}]", "\u6f22" * 200) for n in range(5_000)],
            metadata={"columns": "\u6f22" * 10_000},
        )

    stack.stats.behaviour = fail
    status = await stack.refused(stack.call())
    assert reason(status) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert detail(status, error_details_pb2.BadRequest).field_violations[0].field == "rows[0]"


@pytest.mark.parametrize("method", ["ForecastBatch", "AuditSender", "QuerySenderSeries"])
async def test_an_unimplemented_method_returns_unimplemented(stack: Stack, method: str) -> None:
    status = await stack.refused(stack.channel.unary_unary(f"/{STATS}/{method}")(b""))
    assert reason(status) == ("UNIMPLEMENTED", "NOT_IMPLEMENTED")
    assert method in status.message


async def test_an_unimplemented_stream_returns_unimplemented(stack: Stack) -> None:
    watch = stack.channel.unary_stream(f"/{BATCHES}/WatchBatch")(b"")
    assert reason(await stack.refused(watch.read())) == ("UNIMPLEMENTED", "NOT_IMPLEMENTED")


async def test_an_unknown_method_is_reported_for_every_kind_of_call(stack: Stack) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b""

    channel, name = stack.channel, f"/{STATS}/Nonsense"
    for call in (
        channel.unary_unary(name)(b""),
        channel.stream_unary(name)(chunks()),
        channel.unary_stream(name)(b"").read(),
        channel.stream_stream(name)(chunks()).read(),
    ):
        assert reason(await stack.refused(call)) == ("UNIMPLEMENTED", "METHOD_NOT_FOUND")


async def test_bytes_that_are_not_a_message_are_an_invalid_argument(stack: Stack) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"\xff\xff"

    for call in (
        stack.channel.unary_unary(f"/{STATS}/GetSenderStats")(b"\xff\xff"),
        stack.channel.unary_stream(f"/{STATS}/WatchSenderStats")(b"\xff\xff").read(),
        stack.upload(chunks()),
    ):
        status = await stack.refused(call)
        assert reason(status) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


# Deadlines and callers


async def test_a_servicer_receives_the_caller(stack: Stack) -> None:
    kinds: list[CallerKind] = []

    async def ask() -> None:
        kinds.append(current_caller().kind)

    stack.stats.behaviour = ask
    await stack.call()
    assert kinds == [CallerKind.LOCAL]


async def test_the_callers_deadline_cancels_the_work(stack: Stack) -> None:
    stack.stats.behaviour = stack.stats.wait
    # On a busy machine, a deadline may end before the work begins.
    for seconds in (0.1, 1, 10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.call(timeout=seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if stack.stats.entered.is_set():
            break
    async with asyncio.timeout(PATIENCE):
        assert await stack.stats.ended is asyncio.CancelledError


async def test_a_unary_call_without_a_deadline_gets_the_default_one(stack: Stack) -> None:
    stack.server._calls._default_deadline = 0.1
    stack.stats.behaviour = stack.stats.wait
    status = await stack.refused(stack.call(timeout=None))
    assert reason(status) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


async def test_a_stream_has_no_default_deadline(stack: Stack) -> None:
    stack.server._calls._default_deadline = 0.0
    watch = stack.stub.WatchSenderStats(stats_service_pb2.WatchSenderStatsRequest())
    assert [answer async for answer in watch] == [stats_service_pb2.WatchSenderStatsResponse()]


async def test_a_disconnected_caller_cancels_the_work(stack: Stack) -> None:
    stack.stats.behaviour = stack.stats.wait
    watch = stack.stub.WatchSenderStats(stats_service_pb2.WatchSenderStatsRequest())
    await watch.read()
    await stack.stats.entered.wait()
    watch.cancel()
    async with asyncio.timeout(PATIENCE):
        assert await stack.stats.ended is asyncio.CancelledError


# Uploads


def chunk(size: int) -> bytes:
    return batch_service_pb2.UploadBatchRequest(chunk=b"a" * size).SerializeToString()


async def test_a_complete_upload_is_seen_as_complete(stack: Stack) -> None:
    call = stack.upload()
    for _ in range(3):
        await call.write(chunk(64 * 1024))
    await call.done_writing()
    answer = batch_service_pb2.ScheduleBatchResponse.FromString(await call)
    assert answer.batch.batch_id == "1"
    assert await stack.batches.ended == "whole"


async def test_a_cancelled_upload_never_looks_complete(stack: Stack) -> None:
    call = stack.upload()
    await call.write(chunk(1000))
    await stack.batches.begun.wait()
    call.cancel()
    async with asyncio.timeout(PATIENCE):
        assert await stack.batches.ended != "whole"


async def test_an_upload_with_a_message_over_the_limit_never_looks_complete(stack: Stack) -> None:
    call = stack.upload()
    await call.write(chunk(1000))
    await stack.batches.begun.wait()
    await call.write(chunk(6 * 1024 * 1024))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in str(caught.value.details())
    async with asyncio.timeout(PATIENCE):
        assert await stack.batches.ended != "whole"


async def test_an_upload_of_a_client_that_is_killed_never_looks_complete(stack: Stack) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"""
import grpc, threading
def chunks():
    yield {chunk(1000)!r}
    threading.Event().wait()
grpc.insecure_channel("{stack.address}").stream_unary("/{BATCHES}/UploadBatch")(chunks())
""",
    )
    async with asyncio.timeout(PATIENCE):
        await stack.batches.begun.wait()
        client.kill()
        await client.wait()
        assert await stack.batches.ended != "whole"


async def test_a_unary_call_without_a_message_is_an_error_of_the_caller(stack: Stack) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in tuple[bytes]():
            yield message

    call = stack.channel.stream_unary(f"/{STATS}/GetSenderStats")
    status = await stack.refused(call(nothing(), timeout=PATIENCE))
    assert reason(status) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


async def test_a_message_over_the_size_limit_is_refused_unread(stack: Stack) -> None:
    call = stack.channel.unary_unary(f"/{STATS}/GetSenderStats")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\x12" + bytes(6 * 1024 * 1024), timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not stack.stats.entered.is_set()


async def test_calls_beyond_the_concurrency_limit_wait_and_the_rest_is_refused(
    stack: Stack,
) -> None:
    stack.stats.behaviour = stack.stats.wait
    inside = [asyncio.ensure_future(stack.call()) for _ in range(3)]

    async def is_full() -> bool:
        return bool(await stack.state() == NOT_SERVING)

    await eventually(is_full)
    status = await stack.refused(stack.call())
    assert reason(status) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    # Supervisors call health to decide whether to restart the process.
    assert await stack.state() == NOT_SERVING
    stack.stats.release.set()
    for call in inside:
        assert (await call).sender_id == "7"


async def test_streams_are_limited_too_and_one_that_ends_makes_room(stack: Stack) -> None:
    request = stats_service_pb2.WatchSenderStatsRequest(sender_id="7")
    stack.stats.behaviour = stack.stats.wait
    first = stack.stub.WatchSenderStats(request)
    await stack.stats.entered.wait()
    status = await stack.refused(stack.stub.WatchSenderStats(request).read())
    assert reason(status) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
    first.cancel()
    await stack.stats.ended

    async def watched() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return isinstance(
                await stack.stub.WatchSenderStats(request).read(),
                stats_service_pb2.WatchSenderStatsResponse,
            )
        return False

    await eventually(watched)


async def test_a_csv_of_4_mib_fits_into_a_unary_call(stack: Stack) -> None:
    call = stack.upload()
    await call.write(chunk(4 * 1024 * 1024))
    await call.done_writing()
    await call
    assert await stack.batches.ended == "whole"


# Health and reflection


async def test_health_starts_as_not_serving_for_every_service(stack: Stack) -> None:
    for name in ("", STATS, BATCHES):
        assert await stack.state(name) == NOT_SERVING
    stack.server.set_serving(True)
    for name in ("", STATS, BATCHES):
        assert await stack.state(name) == SERVING


async def test_health_of_an_unknown_service_is_not_found(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.state("outbox.v1.Nonsense")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_of_health_receives_every_change(stack: Stack) -> None:
    watch = stack.health.Watch(health_pb2.HealthCheckRequest(service=STATS))
    assert (await watch.read()).status == NOT_SERVING
    for serving in (True, False, True):
        stack.server.set_serving(serving)
        async with asyncio.timeout(PATIENCE):
            assert (await watch.read()).status == (SERVING if serving else NOT_SERVING)


async def tool(*command: str) -> tuple[int, str]:
    """Run a real client; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        BIN / command[0], *command[1:], stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE):
        written, _ = await process.communicate()
    return process.returncode or 0, written.decode()


async def test_grpcurl_lists_describes_and_calls(stack: Stack) -> None:
    code, listed = await tool("grpcurl", "-plaintext", stack.address, "list")
    assert code == 0
    assert set(listed.split()) == {
        STATS,
        BATCHES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    code, described = await tool("grpcurl", "-plaintext", stack.address, "describe", STATS)
    assert "rpc GetSenderStats" in described
    code, answer = await tool(
        *("grpcurl", "-plaintext", "-d", '{"sender_id": "7"}'),
        *(stack.address, f"{STATS}/GetSenderStats"),
    )
    assert (code, json.loads(answer)["sender_id"]) == (0, "7")


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_curl_finds_the_methods_by_both_reflections(stack: Stack, protocol: str) -> None:
    code, listed = await tool(
        *("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
        *("--reflect-protocol", protocol, "--list-methods", f"http://{stack.address}"),
    )
    assert code == 0
    assert f"{STATS}/GetSenderStats" in listed.split()


# The drain


async def test_a_drain_reports_not_serving_and_finishes_the_calls_under_way() -> None:
    async with running(load_settings(auth="off")) as stack:
        stack.server.set_serving(True)
        stack.stats.behaviour = stack.stats.wait
        call = asyncio.create_task(stack.call())
        await stack.stats.entered.wait()
        drain = asyncio.create_task(stack.server.drain_and_stop(GRACE))
        watch = stack.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        assert reason(await stack.refused(watch.read())) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert await stack.state(STATS) == NOT_SERVING
        stack.server.set_serving(True)
        assert await stack.state(STATS) == NOT_SERVING
        assert not drain.done()
        stack.stats.release.set()
        assert (await call).sender_id == "7"
        await drain


async def test_a_drain_ends_the_watches_at_once() -> None:
    async with running(load_settings(auth="off")) as stack:
        stack.server.set_serving(True)
        stack.stats.behaviour = stack.stats.wait
        watch = stack.stub.WatchSenderStats(stats_service_pb2.WatchSenderStatsRequest())
        health = stack.health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        assert (await health.read()).status == SERVING
        await stack.stats.entered.wait()
        async with asyncio.timeout(PATIENCE):
            await stack.server.drain_and_stop(timedelta(hours=1))
        assert reason(await stack.refused(watch.read())) == ("UNAVAILABLE", "SHUTTING_DOWN")


async def test_a_drain_takes_no_longer_than_its_grace_period() -> None:
    async with running(load_settings(auth="off")) as stack:
        stack.stats.behaviour = stack.stats.wait
        call = asyncio.create_task(stack.call())
        await stack.stats.entered.wait()
        begun = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            await stack.server.drain_and_stop(timedelta(seconds=0.5))
        assert time.monotonic() - begun > 0.4
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert await stack.stats.ended is asyncio.CancelledError


# The start


async def test_auth_off_beyond_loopback_prevents_the_start() -> None:
    with pytest.raises(ConfigurationError, match="OUTBOX_AUTH=off is accepted only") as caught:
        GrpcServer(load_settings(auth="off"), "0.0.0.0:0", [])
    assert "127.0.0.1" in caught.value.message


async def test_keys_in_clear_beyond_loopback_prevent_the_start() -> None:
    settings = load_settings(stats_listen="0.0.0.0:0")
    with pytest.raises(
        ConfigurationError,
        match=r"OUTBOX_STATS_LISTEN: .* 0\.0\.0\.0:0.*unencrypted.*OUTBOX_PLAINTEXT",
    ):
        GrpcServer(settings, "0.0.0.0:0", [])


@pytest.mark.parametrize("listen", ["", "50051", "127.0.0.1", "127.0.0.1:99999", "::1:5", "a b:1"])
async def test_an_invalid_address_prevents_the_start(listen: str) -> None:
    settings = load_settings(auth="off", stats_listen=listen)
    with pytest.raises(ConfigurationError, match="OUTBOX_STATS_LISTEN"):
        GrpcServer(settings, listen, [])


async def test_a_port_in_use_prevents_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = load_settings(auth="off", dispatcher_listen=listen)
        with pytest.raises(ConfigurationError, match=f"OUTBOX_DISPATCHER_LISTEN: {listen}"):
            await GrpcServer(settings, listen, []).start()


async def test_two_servers_never_share_a_port(stack: Stack) -> None:
    with pytest.raises(ConfigurationError, match="cannot be bound"):
        await GrpcServer(load_settings(auth="off"), stack.address, []).start()
