"""What uploads of a CSV have in common: errors of their order, and the pieces of a file."""

from __future__ import annotations

from collections.abc import AsyncIterator

from outbox.v1 import batch_service_pb2, suppression_service_pb2

from outbox_server.shared.errors import InvalidInput


def out_of_order(field: str, message: str) -> InvalidInput:
    """Return the error of an upload with a message that lacks what it must have."""
    return InvalidInput.field(field, message, reason="UPLOAD_OUT_OF_ORDER")


async def file_pieces(
    opening: bytes,
    others: AsyncIterator[
        batch_service_pb2.UploadBatchFileRequest
        | suppression_service_pb2.ImportSuppressionsFileRequest
    ],
) -> AsyncIterator[bytes]:
    """Yield the bytes of a file that is the body of an HTTP request. `opening` are the first."""
    yield opening
    async for message in others:
        yield message.file.data
