"""Server reflection, v1 and v1alpha: how grpcurl, buf curl and their like find the methods.

The two are the same on the wire, so grpcio-reflection's v1alpha servicer, the only one that it
has, answers both.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_reflection_v1 import reflection_pb2 as reflection_v1_pb2

# Importing v1's module also puts its descriptor into the pool, so that tools can describe it.
V1 = reflection_v1_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
V1_ALPHA = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Let `server` describe `services` (full names; their descriptors are in the default pool)."""
    servicer = ReflectionServicer((*services, V1, V1_ALPHA))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": method}),)
    )
