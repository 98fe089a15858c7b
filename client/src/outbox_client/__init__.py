"""Client of Outbox, the e-mail scheduling backend: `AsyncClient` for asyncio, `Client` for threads.

The messages are generated from the protos: `from outbox.v1.batch_pb2 import BatchOptions`.
"""

from outbox_client._async.client import AsyncClient, is_open
from outbox_client._sync.client import Client
from outbox_client.errors import (
    Aborted,
    AlreadyExists,
    CallError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from outbox_client.retries import NO_RETRIES, RetryPolicy
from outbox_client.settings import Tls
from outbox_client.sources import UploadProgress

__all__ = [
    "NO_RETRIES",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "CallError",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "RetryPolicy",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UploadProgress",
    "is_open",
]
