"""Sends mails over connections that are kept per endpoint and account."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from outbox_server.services.dispatcher.smtp.attempt import SendAttempt
from outbox_server.services.dispatcher.smtp.endpoint_pool import EndpointPool, PoolRules
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.smtp.result import Envelope, SendResult
from outbox_server.services.dispatcher.smtp.session import KeptSession
from outbox_server.shared.egress import Egress
from outbox_server.shared.oauth2.credentials import NO_TOKENS, TokenProvider
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import ReplyRules
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from outbox_server.shared.tls import TlsContexts

# The number of endpoints that are remembered, even if they have no connection.
MOST_ENDPOINTS: Final = 1_000


@dataclass(frozen=True, slots=True)
class EndpointState:
    """The connections to one endpoint, as GetDispatcherStatus shows them.

    `last_error` is empty, and `last_error_at` (Unix time, seconds) is None, before the first error.
    """

    host: str
    port: int
    circuit: str
    connection_count: int
    last_error: str
    last_error_at: float | None
    # The number of connections that may be open at present.
    connection_cap: int
    # The number of mails that the server accepts per connection. None means that it is not known.
    learned_mails_per_connection: int | None


class SmtpPool:
    """Keeps SMTP connections, at most `size` per endpoint and account.

    `idle` and `connection_age` are seconds. `helo` is the name sent in EHLO; if it is empty, each
    connection sends its own address. `clock` returns seconds.
    """

    def __init__(
        self,
        *,
        limits: PhaseLimits,
        rules: ReplyRules,
        size: int,
        idle: float,
        mails_per_connection: int,
        connection_age: float,
        helo: str,
        egress: Egress,
        tls: TlsContexts,
        tokens: TokenProvider = NO_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._rules = rules
        self._pool_rules = PoolRules(size, idle, mails_per_connection, connection_age)
        self._helo = helo
        self._egress = egress
        self._tls = tls
        self._tokens = tokens
        self._clock = clock
        self._pools: dict[Endpoint, EndpointPool] = {}
        # The sends that have not ended.
        self._attempts: set[SendAttempt] = set()
        # Connections that are being opened, and those that are being ended.
        self._openings: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()

    def start(
        self,
        endpoint: Endpoint,
        envelope: Envelope,
        *,
        lease: Lease,
        may_begin: Callable[[], bool],
        done: Callable[[SendResult | Exception], None],
    ) -> SendAttempt:
        """Begin to send one mail to its endpoint. The send stops when `lease` ends.

        `may_begin` is called before the first command and again just before the body. `done` is
        called once, maybe before this returns: with the result, with GivenBackError if `may_begin`
        returned False or the lease ended before the server received a byte of the body, or with
        another error, which is a programming mistake. It must not raise an error.
        """
        pool = self._pools.get(endpoint)
        if pool is None:
            self._make_room()
            pool = self._pools[endpoint] = EndpointPool(
                self._pool_rules, self._clock, lambda work: _spawn(work, self._endings)
            )

        def ended(attempt: SendAttempt, end: SendResult | Exception) -> None:
            if attempt not in self._attempts:
                return  # it was cancelled
            self._attempts.discard(attempt)
            if isinstance(end, SendResult) and (
                end.outcome is AttemptOutcome.CONNECTION_FAILURE
                or end.reply_class is ReplyClass.CONNECTIONS
            ):
                pool.last_error = end.message or ""
                pool.last_error_at = time.time()
            done(end)

        attempt = SendAttempt(
            endpoint,
            envelope,
            pool,
            lambda: self._new_session(endpoint),
            lambda work: _spawn(work, self._openings),
            limits=self._limits,
            rules=self._rules,
            lease=lease,
            may_begin=may_begin,
            ended=ended,
        )
        self._attempts.add(attempt)
        attempt.start()
        return attempt

    def cancel(self, attempt: SendAttempt) -> None:
        """Stop a send now, without calling its `done`. How much of it was sent is not known."""
        if attempt in self._attempts:
            self._attempts.discard(attempt)
            attempt.cancel()

    def _make_room(self) -> None:
        """Forget the endpoint that was unused for the longest time, if there are too many.

        Each change of a sender's endpoint adds one, which may have 64 KiB of certificates.
        """
        if len(self._pools) < MOST_ENDPOINTS:
            return
        unused = [(pool.last_used_at, each) for each, pool in self._pools.items() if pool.unused]
        if unused:
            del self._pools[min(unused, key=lambda found: found[0])[1]]

    def give_up_waiting(self) -> None:
        """End the sends that wait for a connection with GivenBackError. Used while draining."""
        for pool in self._pools.values():
            pool.give_up()

    def close_idle(self) -> None:
        """End the connections that are idle for too long, or too old."""
        for endpoint, pool in list(self._pools.items()):
            pool.close_idle()
            if pool.forgettable:
                del self._pools[endpoint]

    async def close(self) -> None:
        """End every idle connection, and return when all are closed, within about two seconds.

        A mail under way goes on, and its connection ends after it.
        """
        for pool in self._pools.values():
            pool.close()
        while self._endings:
            await asyncio.wait(self._endings)

    async def stop(self) -> None:
        """Cancel every send, and return when their connections are closed."""
        for attempt in tuple(self._attempts):
            self.cancel(attempt)
        while self._openings:
            await asyncio.wait(self._openings)

    def states(self) -> list[EndpointState]:
        """Return the state of each endpoint, sorted by host and port."""
        return sorted(
            (
                EndpointState(
                    endpoint.host,
                    endpoint.port,
                    endpoint.circuit,
                    pool.open_count,
                    pool.last_error,
                    pool.last_error_at,
                    pool.cap,
                    pool.learned_mails,
                )
                for endpoint, pool in self._pools.items()
            ),
            key=lambda state: (state.host, state.port),
        )

    def _new_session(self, endpoint: Endpoint) -> KeptSession:
        return KeptSession(
            endpoint,
            limits=self._limits,
            helo=self._helo,
            egress=self._egress,
            tls=self._tls,
            tokens=self._tokens,
            opened_at=self._clock(),
        )


def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Run `work` as a task, which is in `tasks` until it ends."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
