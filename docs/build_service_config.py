"""Writes protos/outbox/v1/service_config.json from the protos' descriptor set: `make docs`.

It is a gRPC service config: clients of every language take deadlines and retries from it. A method
is retried if its `idempotency_level` in the protos says that a repeated call changes nothing more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto, MethodOptions

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "client" / "src" / "outbox" / "v1" / "outbox.binpb"
TARGET: Final = ROOT / "protos" / "outbox" / "v1" / "service_config.json"
PACKAGE: Final = "outbox.v1"


class MethodKind(Enum):
    """What a method does, as far as its deadline is concerned."""

    READ = "reads a page, or what the caller names"
    CHANGE = "changes one thing"
    BULK = "changes or counts any number of rows, or waits for sends in flight"
    UPLOAD = "takes a stream of the caller"
    STREAM = "streams to the caller, for any time"


TIMEOUTS: Final = {
    MethodKind.READ: "30s",
    MethodKind.CHANGE: "30s",
    MethodKind.BULK: "300s",
    MethodKind.UPLOAD: "3600s",
}
BULK: Final = frozenset(
    {
        "BeginHold",
        "CancelBatch",
        "CancelEmailJobs",
        "CancelHeldJobs",
        "CreateSuppression",
        "DeleteSender",
        "DrainDispatcher",
        "EraseRecipient",
        "GetHold",
        "RedeliverWebhook",
        "ReleaseHeldJobs",
        "RescheduleEmailJobs",
        "RetryEmailJobs",
        "UpdateBatch",
    }
)
# gRPC counts at most five attempts. Their pauses cover the restart of a server.
_RETRY: Final = {
    "maxAttempts": 5,
    "initialBackoff": "0.5s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# Retries stop while most calls fail, and return with the first that succeed.
_THROTTLING: Final = {"maxTokens": 100, "tokenRatio": 0.5}


def build(contract: FileDescriptorSet) -> str:
    """Return the text of the file."""
    groups: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {}
    for service, method in _methods(contract):
        policy = _policy(method)
        key = json.dumps(policy)
        groups.setdefault(key, (policy, []))[1].append({"service": service, "method": method.name})
    document = {
        "methodConfig": [
            {"name": sorted(names, key=lambda name: (name["service"], name["method"])), **policy}
            for policy, names in (groups[key] for key in sorted(groups))
            if policy
        ],
        "retryThrottling": _THROTTLING,
    }
    return json.dumps(document, indent=2) + "\n"


def _methods(contract: FileDescriptorSet) -> Iterator[tuple[str, MethodDescriptorProto]]:
    for file in contract.file:
        if file.package == PACKAGE:
            for service in file.service:
                for method in service.method:
                    yield f"{PACKAGE}.{service.name}", method


def kind_of(method: MethodDescriptorProto) -> MethodKind:
    """Return the kind of a method, which decides its deadline."""
    if method.server_streaming:
        return MethodKind.STREAM
    if method.client_streaming:
        return MethodKind.UPLOAD
    if method.name in BULK:
        return MethodKind.BULK
    reads = method.options.idempotency_level == MethodOptions.NO_SIDE_EFFECTS
    return MethodKind.READ if reads else MethodKind.CHANGE


def _policy(method: MethodDescriptorProto) -> dict[str, Any]:
    policy: dict[str, Any] = {}
    timeout = TIMEOUTS.get(kind_of(method))
    if timeout is not None:
        policy["timeout"] = timeout
        # Until there is a connection nothing was sent, so every call may wait for one. A watch has
        # no deadline, and would wait for ever.
        policy["waitForReady"] = True
    if method.options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN:
        policy["retryPolicy"] = _RETRY
    return policy


if __name__ == "__main__":
    TARGET.write_text(build(FileDescriptorSet.FromString(SOURCE.read_bytes())), encoding="utf-8")
    sys.stderr.write(f"{TARGET} written\n")
