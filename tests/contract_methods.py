"""All methods of the contract, found by walking its generated modules."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import outbox.v1
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor


def contract_files() -> Iterator[FileDescriptor]:
    """Yield the descriptor of each proto of `outbox.v1`."""
    for module in pkgutil.iter_modules(outbox.v1.__path__, "outbox.v1."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name).DESCRIPTOR


def contract_methods() -> Iterator[MethodDescriptor]:
    """Yield each method of each service."""
    for file in contract_files():
        for service in file.services_by_name.values():
            yield from service.methods
