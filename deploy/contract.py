"""The parts of the contract that the gateway needs, read from its descriptor set."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from google.api.annotations_pb2 import http
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto

PACKAGE: Final = "outbox.v1"
# The processes that serve a service. All others are served by the scheduler.
_PROCESSES: Final = {"StatsService": "stats", "DispatcherService": "dispatcher"}
_SCHEDULER: Final = "scheduler"


class CallKind(Enum):
    """Kinds of methods, which differ in how long a call may take."""

    UNARY = auto()
    UPLOAD = auto()
    WATCH = auto()


@dataclass(frozen=True, slots=True)
class GatewayMethod:
    """A method: its path over gRPC, and the URL templates of its HTTP rules."""

    path: str
    kind: CallKind
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GatewayService:
    """A service: its full name, the process that serves it, and its methods."""

    name: str
    process: str
    methods: tuple[GatewayMethod, ...]


def read_descriptors() -> bytes:
    """Return the descriptor set that the build makes: the whole contract, with its comments."""
    return importlib.resources.files("outbox.v1").joinpath("outbox.binpb").read_bytes()


def services_of(descriptors: bytes) -> list[GatewayService]:
    """Return the services of the contract."""
    return [
        GatewayService(
            f"{PACKAGE}.{service.name}",
            _PROCESSES.get(service.name, _SCHEDULER),
            tuple(
                GatewayMethod(
                    f"/{PACKAGE}.{service.name}/{method.name}",
                    _kind(method),
                    tuple(url for _, url, _ in rules_of(method)),
                )
                for method in service.method
            ),
        )
        for file in FileDescriptorSet.FromString(descriptors).file
        if file.package == PACKAGE
        for service in file.service
    ]


def rules_of(method: MethodDescriptorProto) -> Iterator[tuple[str, str, HttpRule]]:
    """Yield the verb, the URL template and the rule of each HTTP binding of a method."""
    first = method.options.Extensions[http]
    for rule in (first, *first.additional_bindings):
        verb = rule.WhichOneof("pattern")
        if verb is not None and verb != "custom":
            yield verb, getattr(rule, verb), rule


def _kind(method: MethodDescriptorProto) -> CallKind:
    if method.server_streaming:
        return CallKind.WATCH
    return CallKind.UPLOAD if method.client_streaming else CallKind.UNARY
