"""The metrics of running services, compared with the counts of the mail server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.hold_service_pb2 import BeginHoldRequest, ReleaseHeldJobsRequest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from outbox_server.deploy.ports import free_port
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.metrics import endpoint as endpoint_module
from outbox_server.shared.metrics.endpoint import (
    CONNECTIONS,
    CONNECTIONS_OF_ONE_ADDRESS,
    MetricsEndpoint,
)
from tests import dispatchers
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.scraping import Scrape, scrape
from tests.smtp_servers import Say, ScriptedServer
from tests.stats_stack import stats_server
from tests.unit.test_metrics_page import registered

GET = b"GET /metrics HTTP/1.1\r\n\r\n"
DEFERRED = Say("450 4.7.1 <c@b.org>: Recipient address rejected: Greylisted, try again later")
QUOTA = Say("550 5.4.5 Daily user sending limit exceeded.")
REFUSED = Say("550 5.1.1 <x@b.org>: Recipient address rejected: User unknown")


@dataclass
class MeasuredInstallation:
    """All three services in this process, with their metrics."""

    scheduler: Scheduler
    smtp: ScriptedServer
    addresses: dict[str, str]

    async def of(self, service: str) -> Scrape:
        return await scrape(self.addresses[service])

    async def once(self, service: str, condition: Callable[[Scrape], object]) -> Scrape:
        """Return the first scrape of a service that fulfils the condition."""

        async def found() -> Scrape | None:
            scraped = await self.of(service)
            return scraped if condition(scraped) else None

        first = await eventually(found)
        assert first is not None
        return first


@pytest.fixture
async def installation(database_url: str, redis_url: str) -> AsyncIterator[MeasuredInstallation]:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("scheduler", "dispatcher", "stats")}
    async with AsyncExitStack() as stack:
        smtp = await stack.enter_async_context(ScriptedServer())
        scheduler = await stack.enter_async_context(
            running_scheduler(
                database_url,
                redis_url,
                metrics_listen=addresses["scheduler"],
                min_gap="0",
                smtp_ports="any",
            )
        )
        await stack.enter_async_context(
            stats_server(database_url, redis_url, metrics_listen=addresses["stats"])
        )
        yield MeasuredInstallation(scheduler, smtp, addresses)


def dispatching(installation: MeasuredInstallation, **changes: Any) -> Any:
    settings = installation.scheduler.settings
    values = dispatchers.options(
        settings.database_url,
        settings.redis_url,
        installation.smtp.url,
        metrics_listen=installation.addresses["dispatcher"],
        **changes,
    )
    return dispatchers.running(dispatchers.settings_of(values))


def ended(found: Scrape) -> float:
    return sum(found.all("outbox_attempts_total").values())


async def test_the_metrics_equal_the_counts_of_the_mail_server(
    installation: MeasuredInstallation,
) -> None:
    it, smtp = installation.scheduler, installation.smtp
    # Of five mails, one is deferred once, and one is refused permanently.
    smtp.plan["rcpt"] = [DEFERRED, REFUSED]
    sender = await it.sender(hourly_limit=1000)
    rows = "".join(f"r{number}@b.org\n" for number in range(5))
    await it.schedule(sender, f"email\n{rows}not-an-address\n")

    before = await installation.of("scheduler")
    assert before.value("outbox_due_jobs") == 5
    assert before.value("outbox_oldest_due_age_seconds") > 0

    async with dispatching(installation, defer_backoff="10ms"):
        await eventually(lambda: len(smtp.taken) == 4)

        await installation.once("dispatcher", lambda found: ended(found) == 6)
        await eventually(lambda: it.value("SELECT count(*) = 0 FROM email_jobs WHERE state = 2"))
        # A service shows that it serves after its first check.
        sent, scheduler, stats = [
            await installation.once(name, lambda found: any(found.all("outbox_serving").values()))
            for name in ("dispatcher", "scheduler", "stats")
        ]

    assert smtp.visits["mail"] == 6
    attempts = {
        dict(labels)["outcome"]: n for labels, n in sent.all("outbox_attempts_total").items()
    }
    assert {outcome: n for outcome, n in attempts.items() if n} == {
        "sent": len(smtp.taken),
        "temporary_failure": 1,
        "permanent_failure": 1,
    }
    replies = {
        (dict(labels)["code"], dict(labels)["reply_class"]): n
        for labels, n in sent.all("outbox_replies_total").items()
    }
    assert replies == {
        ("2xx", "sent"): 4,
        ("4xx", "deferred"): 1,
        ("5xx", "recipient"): 1,
    }
    # A claim whose route is not known yet may be given back.
    assert sent.value("outbox_claims_total") >= 6
    assert sent.value("outbox_waits_total", cause="deferred") == 1
    assert sent.value("outbox_lateness_seconds_count") == 6
    assert sent.value("outbox_delay_seconds_count") == 6
    # Each lateness is rounded to a whole microsecond, and a delay is not.
    rounding = 6 * 1e-6
    delays = sent.value("outbox_delay_seconds_sum")
    assert 0 < sent.value("outbox_lateness_seconds_sum") <= delays + rounding
    assert sent.value("outbox_endpoint_seconds_count", route="relay") == 6
    assert sent.value("outbox_endpoint_seconds_count", route="own") == 0
    assert sent.value("outbox_concurrency") == 5

    assert scheduler.value("outbox_accepted_jobs_total") == 5
    assert scheduler.value("outbox_rejected_rows_total") == 1
    assert scheduler.value("outbox_due_jobs") == 0
    assert scheduler.value("outbox_oldest_due_age_seconds") == 0
    assert (
        scheduler.value("outbox_grpc_requests_total", method="outbox.v1.BatchService/ScheduleBatch")
        == 1
    )
    for name, found in (("scheduler", scheduler), ("dispatcher", sent), ("stats", stats)):
        assert found.value("outbox_serving", service=name) == 1
        assert found.value("outbox_dependency_up", dependency="postgresql") == 1
    assert sent.value("outbox_dependency_up", dependency="redis") == 1

    names = {
        name
        for found in (scheduler, sent, stats)
        for name in found.families
        if name.startswith("outbox_")
    }
    assert names == set(registered()), "what services show is what docs/metrics.md lists"


async def test_a_limit_that_makes_a_job_wait_is_counted_as_its_cause(
    installation: MeasuredInstallation,
) -> None:
    it, smtp = installation.scheduler, installation.smtp
    sender = await it.sender(min_gap={"nanos": 200_000_000}, hourly_limit=1000)
    await it.schedule(sender, "email\n" + "".join(f"r{n}@b.org\n" for n in range(3)))
    async with dispatching(installation):
        await eventually(lambda: len(smtp.taken) == 3)
        found = await installation.of("dispatcher")
    assert found.value("outbox_waits_total", cause="min_gap") == 2
    assert found.value("outbox_waits_total", cause="hourly_limit") == 0


async def test_cooldowns_and_circuits_are_counted_with_their_causes(
    installation: MeasuredInstallation,
) -> None:
    it, smtp = installation.scheduler, installation.smtp
    smtp.plan["mail"] = [QUOTA]
    sender = await it.sender(hourly_limit=1000)
    await it.schedule(sender, "email\nr@b.org\n")
    nobody = {"host": "127.0.0.1", "port": free_port(), "security": "SMTP_SECURITY_NONE"}
    broken = await it.sender(hourly_limit=1000, smtp=nobody)
    await it.schedule(broken, "email\na@b.org\nb@b.org\nc@b.org\n")

    async with dispatching(installation, cooldown="1h"):
        found = await installation.once(
            "dispatcher",
            lambda found: (
                found.value("outbox_cooldowns_total", cause="daily_quota")
                and found.value("outbox_open_circuits")
                # Counted after Redis has it.
                and found.value("outbox_circuit_changes_total", change="opened")
            ),
        )
        await installation.once("stats", lambda found: found.value("outbox_cooling_senders") == 1)
    assert found.value("outbox_cooldowns_total", cause="daily_quota") == 1
    assert found.value("outbox_cooldowns_total", cause="account") == 0
    assert found.value("outbox_circuit_changes_total", change="opened") == 1
    assert found.value("outbox_open_circuits") == 1
    assert found.value("outbox_replies_total", code="none", reply_class="none") >= 3
    assert found.value("outbox_endpoint_seconds_count", route="own") >= 3


async def test_a_hold_is_shown_until_it_ends(installation: MeasuredInstallation) -> None:
    it = installation.scheduler
    await it.schedule(await it.sender())
    await it.holds.BeginHold(BeginHoldRequest())
    async with dispatching(installation):
        await installation.once("dispatcher", lambda found: found.value("outbox_held") == 1)
        await it.holds.ReleaseHeldJobs(ReleaseHeldJobsRequest(all=True))
        await eventually(lambda: len(installation.smtp.taken) == 1)
        await installation.once("dispatcher", lambda found: found.value("outbox_held") == 0)


async def test_a_lost_redis_is_counted_as_a_rebuild(
    installation: MeasuredInstallation, redis: Any
) -> None:
    it = installation.scheduler
    await it.schedule(
        await it.sender(hourly_limit=1000), "email\na@b.org\n", schedule_time=_later()
    )
    # A rebuild is counted if it loads a sender. So that of the start is counted as well.
    await redis.flushall()
    async with dispatching(installation):
        rebuilds = partial(Scrape.value, name="outbox_rebuilds_total", result="complete")
        await installation.once("dispatcher", lambda found: rebuilds(found) == 1)
        await redis.flushall()
        await installation.once("dispatcher", lambda found: rebuilds(found) == 2)
        # The gauge was read before the counter, possibly before the end of the rebuild.
        await installation.once(
            "dispatcher", lambda found: found.value("outbox_incomplete_shards") == 0
        )


def _later() -> Any:
    found = Timestamp()
    found.GetCurrentTime()
    found.seconds += 3600
    return found


async def test_calls_and_errors_are_counted_by_method_and_code(
    installation: MeasuredInstallation,
) -> None:
    it = installation.scheduler
    await refusal_of(it.schedule(await it.sender(), subject="{{ broken"))
    async with grpc.aio.insecure_channel(it.address) as channel:
        for number in range(20):
            call: Any = channel.unary_unary(f"/outbox.v1.BatchService/Guess{number}")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"")
    found = await installation.of("scheduler")
    method = "outbox.v1.BatchService/ScheduleBatch"
    assert found.value("outbox_grpc_errors_total", method=method, code="INVALID_ARGUMENT") == 1
    assert found.value("outbox_grpc_duration_seconds_count", method=method) == 1
    assert found.value("outbox_grpc_requests_total", method="unknown") == 20
    assert "Guess" not in found.text


# The HTTP endpoint --------------------------------------------------------------------------


@pytest.fixture
async def address() -> AsyncIterator[str]:
    registry = CollectorRegistry()
    Counter("example", "An example.", registry=registry)
    listen = f"127.0.0.1:{free_port()}"
    endpoint = MetricsEndpoint(listen, registry)
    await endpoint.start()
    yield listen
    await endpoint.close()


async def answer_to(address: str, request: bytes, *, peer: str = "127.0.0.1") -> bytes:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(peer, 0))
    answer = b""
    # A connection that the server closes before it has read the request is reset.
    with suppress(ConnectionResetError, BrokenPipeError):
        writer.write(request)
        async with asyncio.timeout(30):
            answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"GET /metrics?name[]=x HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"\x16\x03\x01\r\n\r\n", b"405 Method Not Allowed"),
    ],
)
async def test_only_a_get_request_for_metrics_returns_them(
    address: str, request_: bytes, status: bytes
) -> None:
    answer = await answer_to(address, request_)
    assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert (b"example_total 0.0" in answer) == (status == b"200 OK")


async def test_a_head_request_gets_no_body(address: str) -> None:
    answer = await answer_to(address, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"example" not in answer


async def test_a_request_that_is_too_long_is_closed_without_an_answer(address: str) -> None:
    assert await answer_to(address, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == b""


async def open_idle(address: str, peer: str) -> list[asyncio.StreamWriter]:
    """Open as many connections as one address may have."""
    host, port = address.split(":")
    opened = [
        await asyncio.open_connection(host, int(port), local_addr=(peer, 0))
        for _ in range(CONNECTIONS_OF_ONE_ADDRESS)
    ]
    return [writer for _, writer in opened]


async def test_a_peer_with_many_idle_connections_shuts_out_only_itself(address: str) -> None:
    async def answered(peer: str) -> bool:
        return b"200 OK" in await answer_to(address, GET, peer=peer)

    idle = await open_idle(address, "127.0.0.2")
    try:
        assert not await answered("127.0.0.2")
        assert await answered("127.0.0.3")
        for number in range(3, 2 + CONNECTIONS // CONNECTIONS_OF_ONE_ADDRESS):
            idle += await open_idle(address, f"127.0.0.{number}")
        # So many that none is left.
        assert not await answered("127.0.0.99")
    finally:
        for writer in idle:
            writer.close()
    await eventually(partial(answered, "127.0.0.2"))
    await eventually(partial(answered, "127.0.0.99"))


async def test_a_client_that_does_not_read_is_cut_off_and_loses_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_module, "_LIMIT", timedelta(seconds=0.5))
    registry = CollectorRegistry()
    # More than the buffers of both kernels hold.
    labelled = Counter("example", "x" * 100, ["n"], registry=registry)
    for number in range(100_000):
        labelled.labels("y" * 100 + str(number))
    host, port = listen = ("127.0.0.1", free_port())
    endpoint = MetricsEndpoint(f"{host}:{port}", registry)
    async with contextlib.AsyncExitStack() as open_:
        await endpoint.start()
        open_.push_async_callback(endpoint.close)
        client = open_.enter_context(contextlib.closing(socket.socket()))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listen)
        await loop.sock_sendall(client, GET)
        await eventually(lambda: endpoint.connections == 1)
        await eventually(lambda: endpoint.connections == 0)
        received = 0
        with suppress(ConnectionResetError):
            async with asyncio.timeout(PATIENCE):
                while got := await loop.sock_recv(client, 1 << 20):
                    received += len(got)
    # The client gets what the kernels' buffers hold, and no more.
    assert received < len(generate_latest(registry)) / 2


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1:x", "127.0.0.1:70000", "unix:/x"])
def test_a_malformed_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigurationError, match=r"OUTBOX_METRICS_LISTEN: .* write host:port"):
        MetricsEndpoint(listen, CollectorRegistry())


async def test_an_address_in_use_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match=f"OUTBOX_METRICS_LISTEN: {address} cannot be"):
        await MetricsEndpoint(address, CollectorRegistry()).start()
