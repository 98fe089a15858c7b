"""Many clients of one gateway, which is one peer of the services."""

from __future__ import annotations

import http.client
from collections import Counter
from contextlib import ExitStack, closing
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE, eventually
from tests.gateway_stack import GatewayStack
from tests.listeners import connections_at

# One of this gateway's worker thread, one of its health checks, and as many again while a
# connection that has become old is replaced.
MOST_CONNECTIONS: Final = 4
# The places of one peer for health watches, and for health checks.
PLACES: Final = 100
SERVING: Final = health_pb2.HealthCheckResponse.SERVING


def test_more_clients_than_a_peer_may_have_connections_share_those_of_the_gateway(
    gateway: GatewayStack,
) -> None:
    count = load_settings().connections_per_peer + 44
    scheduler = int(gateway.services["scheduler"].address.rpartition(":")[2])
    headers = {"authorization": f"Bearer {gateway.keys['service']}"}
    with ExitStack() as opened:
        clients = []
        for _ in range(count):
            client = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=PATIENCE)
            opened.enter_context(closing(client))
            client.connect()
            clients.append(client)
        for client in clients:
            client.request("GET", "/api/senders?user_id=many", headers=headers)
        answers = Counter(client.getresponse().status for client in clients)
        assert answers == {200: count}
        assert 1 <= connections_at(scheduler) <= MOST_CONNECTIONS


async def test_strangers_cannot_take_the_places_of_the_gateways_own_health_checks(
    gateway: GatewayStack,
) -> None:
    request = health_pb2.HealthCheckRequest()
    # A channel has a hundred streams at once, so the calls have channels of their own.
    async with (
        grpc.aio.insecure_channel(urlsplit(gateway.url).netloc) as watching,
        grpc.aio.insecure_channel(
            urlsplit(gateway.url).netloc, [("grpc.use_local_subchannel_pool", 1)]
        ) as unfinished,
        grpc.aio.insecure_channel(gateway.services["scheduler"].address) as direct,
    ):
        calls: list[Any] = []
        for _ in range(PLACES):
            calls.append(health_pb2_grpc.HealthStub(watching).Watch(request))
            assert (await calls[-1].read()).status == SERVING
        # The headers of a check, and never its message.
        check: Any = unfinished.stream_unary("/grpc.health.v1.Health/Check")
        calls.extend(check() for _ in range(PLACES))
        stub = health_pb2_grpc.HealthStub(direct)

        async def watch_is_refused() -> bool:
            call = stub.Watch(request)
            try:
                return (await call.read()) is grpc.aio.EOF
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            finally:
                call.cancel()

        # The test's own calls come from the peer that the gateway is: places of one are used up.
        await eventually(watch_is_refused)
        for _ in range(20):
            assert (await stub.Check(request, timeout=PATIENCE)).status == SERVING
        for call in calls:
            call.cancel()
