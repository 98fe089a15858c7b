"""Requests to the servers of callers: hostile answers."""

from __future__ import annotations

import asyncio

from outbox_server.services.scheduler.webhook_posts import WebhookMessage, WebhookPoster
from outbox_server.shared.egress import Egress
from outbox_server.shared.tls import TlsContexts

_SENT = b"HTTP/1.1 100 C\r\n\r\n" * 4_000


async def test_an_answer_of_informational_responses_without_an_end_is_given_up() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(_SENT)
                await writer.drain()
        except OSError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    poster = WebhookPoster(Egress(["127.0.0.1"]), TlsContexts())
    message = WebhookMessage(
        f"http://127.0.0.1:{port}/", "msg_1", "webhook.test", {}, "a", ("whsec_AAAA",)
    )
    result = await poster.post(message)
    server.close()
    await poster.close()
    assert result.error.endswith("does not speak HTTP"), result
