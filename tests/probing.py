"""A probe of a server's health."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def serving(channel: grpc.aio.Channel, service: str = "") -> bool:
    """Return whether the health of a service is SERVING, or that of the whole server.

    A server that does not answer is not serving: a service that started before it could read the
    stored settings binds its port anew when it knows them.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(request)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
