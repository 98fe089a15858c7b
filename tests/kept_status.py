"""A repair of grpc.aio for the tests: an upload that is refused keeps the server's answer.

When a server ends a call while the client still sends, grpc.aio may replace the status of the
server by INTERNAL with "Internal error from Core" (https://github.com/grpc/grpc/issues/36066). The
blocking API and the gRPC of other languages keep the status. Remove this when a release of grpcio
does so, too.
"""

import asyncio
import contextlib
from typing import Any, Final

from grpc._cython import cygrpc
from grpc.aio import _call

# A status arrives with the end of the call, or never; then grpc.aio reports what it knows.
_PATIENCE_S: Final = 2.0


class _Call:
    """A call of the core that does not replace a status that it has, or is about to have."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def send_serialized_message(self, message: bytes) -> None:
        try:
            await self._call.send_serialized_message(message)
        except cygrpc.InternalError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._call.status()
            raise

    def set_internal_error(self, text: str) -> None:
        if not self._call.done():
            self._call.set_internal_error(text)


def keep_status() -> None:
    """Repair the calls of this process that send streams."""
    write = _call._StreamRequestMixin._write

    async def repaired(self: Any, request: Any) -> None:
        if not isinstance(self._cython_call, _Call):
            self._cython_call = _Call(self._cython_call)
        await write(self, request)

    _call._StreamRequestMixin._write = repaired  # type: ignore[method-assign]
