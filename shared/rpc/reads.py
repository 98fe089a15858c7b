"""The methods that change nothing, and the keys that may call no others.

A method reads if its `idempotency_level` in the protos is NO_SIDE_EFFECTS. Every GET has it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Final

import outbox.v1
from google.protobuf.descriptor_pb2 import MethodOptions

from outbox_server.shared.callers import Caller
from outbox_server.shared.errors import PermissionDenied


def _reads() -> Iterator[str]:
    for module in pkgutil.iter_modules(outbox.v1.__path__, "outbox.v1."):
        if not module.name.endswith("_service_pb2"):
            continue
        services = importlib.import_module(module.name).DESCRIPTOR.services_by_name
        for service in services.values():
            for method in service.methods:
                if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
                    yield f"/{service.full_name}/{method.name}"


READS: Final = frozenset(_reads())


def check_may_change(caller: Caller, method: str) -> None:
    """Check that `caller` may call `method` (`/outbox.v1.SenderService/CreateSender`).

    Raises:
        PermissionDenied: READ_ONLY_KEY: the caller's key may only read, and the method does more.
    """
    if caller.read_only and method not in READS:
        raise PermissionDenied(
            "this API key may only read; use a key that may make changes",
            reason="READ_ONLY_KEY",
            metadata={"method": method},
        )
