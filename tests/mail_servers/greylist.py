"""A greylisting policy daemon, for Postfix (SMTPD_POLICY_README) and for Exim's readsocket."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final, Self

from outbox_server.deploy.ports import LOOPBACK

# postgrey's answer. Postfix replies `450 4.2.0 <address>: Recipient address rejected: ...`.
_LATER: Final = "DEFER_IF_PERMIT Greylisted, see http://postgrey.schweikert.ch/help/y.test.html"
_REQUEST_LIMIT: Final = 100  # lines


class GreylistDaemon:
    """Refuses each pair of sender and recipient until `delay` seconds after its first attempt."""

    def __init__(self, delay: float = 0.5) -> None:
        self._delay = delay
        self._first_seen: dict[tuple[str, str], float] = {}
        # The number of refusals and of acceptances of each recipient.
        self.refused: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, LOOPBACK, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read_request(reader):
                writer.write(f"action={self._decide(request)}\n\n".encode())
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _decide(self, request: dict[str, str]) -> str:
        recipient = request["recipient"]
        now = time.monotonic()
        seen = self._first_seen.setdefault((request["sender"], recipient), now)
        if now - seen < self._delay:
            self.refused[recipient] += 1
            return _LATER
        self.accepted[recipient] += 1
        return "DUNNO"


async def _read_request(reader: asyncio.StreamReader) -> dict[str, str]:
    """Return the attributes of a request, which ends with an empty line; empty at end of input."""
    request = {}
    for _ in range(_REQUEST_LIMIT):
        line = (await reader.readline()).decode().rstrip("\n")
        if not line:
            break
        name, _, value = line.partition("=")
        request[name] = value
    return request
