"""Server reflection, v1 and v1alpha, by which grpcurl, buf curl and similar tools find the methods.

The two are the same on the wire, so grpcio-reflection's servicer, which is for v1alpha, serves
both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from google.protobuf.json_format import MessageToJson, Parse
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

V1_ALPHA: Final = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
V1: Final = V1_ALPHA.replace("v1alpha", "v1")


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Let `server` describe `services` (full names; their descriptors are in the default pool)."""
    _describe_v1()
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


def _describe_v1() -> None:
    """Add v1's descriptor, which is v1alpha's renamed, to the pool, so that tools can show it."""
    alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    v1 = Parse(MessageToJson(alpha).replace("v1alpha", "v1"), FileDescriptorProto())
    # Adding the same file a second time has no effect.
    Default().AddSerializedFile(v1.SerializeToString())
