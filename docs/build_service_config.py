"""Writes protos/outbox/v1/service_config.json from the protos' descriptor set: `make docs`.

It is a gRPC service config: clients of every language take deadlines and retries from it. A method
is retried if its `idempotency_level` in the protos says that a repeated call changes nothing more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto, MethodOptions

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "client" / "src" / "outbox" / "v1" / "outbox.binpb"
TARGET: Final = ROOT / "protos" / "outbox" / "v1" / "service_config.json"
PACKAGE: Final = "outbox.v1"

_TIMEOUT: Final = "30s"
_UPLOAD_TIMEOUT: Final = "3600s"
# Calls that wait for sends in flight, or change very many rows.
_LONG_TIMEOUT: Final = "300s"
_LONG: Final = frozenset(
    {
        "BeginHold",
        "CancelHeldJobs",
        "DrainDispatcher",
        "GetHold",
        "ReleaseHeldJobs",
        "RetryEmailJobs",
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


def _policy(method: MethodDescriptorProto) -> dict[str, Any]:
    policy: dict[str, Any] = {}
    if not method.server_streaming:
        timeout = _LONG_TIMEOUT if method.name in _LONG else _TIMEOUT
        policy["timeout"] = _UPLOAD_TIMEOUT if method.client_streaming else timeout
        # Until there is a connection nothing was sent, so every call may wait for one. A watch has
        # no deadline, and would wait for ever.
        policy["waitForReady"] = True
    if method.options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN:
        policy["retryPolicy"] = _RETRY
    return policy


if __name__ == "__main__":
    TARGET.write_text(build(FileDescriptorSet.FromString(SOURCE.read_bytes())), encoding="utf-8")
    sys.stderr.write(f"{TARGET} written\n")
