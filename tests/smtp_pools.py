"""SMTP pools for tests: short limits, and endpoints on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher.smtp import Envelope, SendResult, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.egress import Egress
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import ReplyRules
from outbox_server.shared.states import SmtpSecurity
from outbox_server.shared.tls import TlsContexts
from tests.eventually import PATIENCE, eventually
from tests.smtp_servers import ScriptedServer

# The limit for a reply of a server that hangs. Servers that answer get a long one.
LIMIT: Final = 0.2
MAIL: Final = Envelope("a@x.test", "b@y.test", b"Subject: s\r\n\r\nHello\r\n", needs_smtputf8=False)


def pool_of(*, timeout: float = PATIENCE, **settings: Any) -> SmtpPool:
    defaults: dict[str, Any] = {
        "limits": PhaseLimits.of(timeout),
        "rules": ReplyRules.load(""),
        "size": 5,
        "idle": 30.0,
        "mails_per_connection": 100,
        "connection_age": 600.0,
        "helo": "client.test",
        "egress": Egress(["127.0.0.0/8"]),
        "tls": TlsContexts(),
    }
    return SmtpPool(**(defaults | settings))


class ListeningServer(Protocol):
    """A server on loopback."""

    @property
    def port(self) -> int:
        """Return the port of the server."""


def endpoint_of(server: ListeningServer, **changes: Any) -> Endpoint:
    return replace(Endpoint("127.0.0.1", server.port, SmtpSecurity.NONE), **changes)


def relay_at(server: ScriptedServer, **changes: Any) -> Endpoint:
    """An endpoint of the operator: its password is also sent without TLS."""
    return endpoint_of(server, operators=True, **changes)


async def send(
    pool: SmtpPool,
    server: ScriptedServer | Inbox | Endpoint,
    mail: Envelope = MAIL,
    *,
    within: float = 30.0,
    may_begin: Callable[[], bool] = lambda: True,
) -> SendResult:
    endpoint = server if isinstance(server, Endpoint) else endpoint_of(server)
    lease = Lease(time.monotonic() + within)
    return await send_leased(pool, endpoint, mail, lease=lease, may_begin=may_begin)


async def send_leased(
    pool: SmtpPool,
    endpoint: Endpoint,
    mail: Envelope = MAIL,
    *,
    lease: Lease,
    may_begin: Callable[[], bool] = lambda: True,
) -> SendResult:
    """Send one mail, and wait for its result, or raise the error."""
    ended: asyncio.Future[SendResult] = asyncio.get_running_loop().create_future()

    def done(end: SendResult | Exception) -> None:
        if isinstance(end, SendResult):
            ended.set_result(end)
        else:
            ended.set_exception(end)

    attempt = pool.start(endpoint, mail, lease=lease, may_begin=may_begin, done=done)
    try:
        return await ended
    finally:
        pool.cancel(attempt)


def open_connections(pool: SmtpPool) -> int:
    return sum(state.connection_count for state in pool.states())


async def all_closed(pool: SmtpPool) -> None:
    """Wait until all connections have ended with QUIT."""
    await eventually(lambda: open_connections(pool) == 0)
