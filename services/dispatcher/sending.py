"""Sends marked jobs: builds each mail, gives it to the SMTP pool, and returns the outcome.

A mail that is built in this process needs no task: the events of its connection drive it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from structlog.contextvars import bound_contextvars

from outbox_server.services.dispatcher.composer import Composer, CompositionError
from outbox_server.services.dispatcher.ended_claims import ClaimOutcome, UnsentJob
from outbox_server.services.dispatcher.endpoint_meter import EndpointMeter
from outbox_server.services.dispatcher.metrics import DispatcherMetrics, WaitCause
from outbox_server.services.dispatcher.outcomes import OutcomeRules, result_without_smtp
from outbox_server.services.dispatcher.progress import Progress
from outbox_server.services.dispatcher.renewer import LeasedJob, Renewer
from outbox_server.services.dispatcher.shares import Permit
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.smtp import GivenBackError, SendResult, SmtpPool
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.services.dispatcher.traced import begin_span, end_span
from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.queue.circuit_keys import RELAY
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import AttemptOutcome, JobState
from outbox_server.shared.templates.workers import WorkerLostError

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import SendSpan, Tracer

_NOTHING_BOUND: Final = nullcontext()
_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class ReadyMail:
    """A marked job that may be sent now. `claimed_at` is a value of `time.monotonic`."""

    claim: Claim
    claimed_at: float
    job: MarkedJob
    permit: Permit


@dataclass(eq=False, slots=True)
class _Send:
    """A mail on its way, from the time that its turn to be built has come."""

    mail: ReadyMail
    span: SendSpan | None
    started: float = field(default_factory=time.monotonic)
    # Whether it goes to the operator's relay. None until the mail is built.
    relay: bool | None = None
    endpoint: Endpoint | None = None
    leased: LeasedJob | None = None

    @property
    def ids(self) -> dict[str, int | str]:
        """What its log lines name."""
        job = self.mail.job
        ids: dict[str, int | str] = {"job_id": job.job.job_id, "batch_id": job.batch_id}
        if self.span is not None:
            ids["trace_id"] = self.span.trace_id
        return ids


class SendStep:
    """Builds and sends mails. `settle` gets the outcome of each, once.

    `spawn` runs a coroutine in the task group of the dispatcher, whose run an error ends.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        composer: Composer,
        pool: SmtpPool,
        renewer: Renewer,
        slots: Slots,
        progress: Progress,
        metrics: DispatcherMetrics,
        meter: EndpointMeter,
        tracer: Tracer | None,
        settle: Callable[[ClaimOutcome], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._lease = settings.lease
        self._composer = composer
        self._pool = pool
        self._renewer = renewer
        self._slots = slots
        self._progress = progress
        self._metrics = metrics
        self._meter = meter
        self._tracer = tracer
        self._outcomes = OutcomeRules(settings)
        self._settle = settle
        self._spawn = spawn

    async def begin(self, mails: Sequence[ReadyMail]) -> None:
        """Begin to send mails, one after the other. Return once each is built or being built.

        A mail that a worker process builds gets a task, because that may take long.
        """
        here: list[ReadyMail] = []
        for mail in mails:
            # The time that it takes to build a mail says nothing about its endpoint.
            mail.permit.since = math.inf
            if self._composer.builds_here(mail.job):
                here.append(mail)
            else:
                self._spawn(self._begin_elsewhere(mail))
        for mail in here:
            await self._begin(_Send(mail, self._span_of(mail)))

    async def _begin_elsewhere(self, mail: ReadyMail) -> None:
        send = _Send(mail, self._span_of(mail))
        # Log lines get the ids of the mail only while it is built: then this task works for one job
        # alone. A connection keeps what is bound when it is opened, and later carries other mails.
        await self._begin(send, bound_contextvars(**send.ids))

    def _span_of(self, mail: ReadyMail) -> SendSpan | None:
        if self._tracer is None:
            return None
        return begin_span(self._tracer, self._composer.trace_parent_of(mail.job), mail.job)

    async def _begin(
        self, send: _Send, building: AbstractContextManager[None] = _NOTHING_BOUND
    ) -> None:
        """Build a mail and give it to the pool. An error of one mail does not affect the others."""
        mail = send.mail
        # The build may take half of the lease, as may a wait for a permit. The rest is for the
        # send.
        wait = mail.claimed_at + self._lease.total_seconds() / 2 - send.started
        try:
            with building:
                endpoint, envelope = await self._composer.compose(mail.job, wait)
            mail.permit.since = time.monotonic()
            send.relay = endpoint.operators
            send.endpoint = endpoint
            send.leased = self._renewer.begin(mail.claim, mail.job, mail.claimed_at)
            self._pool.start(
                endpoint,
                envelope,
                lease=send.leased.lease,
                may_begin=self._may_begin,
                done=partial(self._ended, send),
            )
        except Exception as error:  # noqa: BLE001 - `_ended` distinguishes them
            self._ended(send, error)

    def _may_begin(self) -> bool:
        return not self._slots.closed

    # How a send ends -------------------------------------------------------------------------

    def _ended(self, send: _Send, end: SendResult | Exception) -> None:
        """Settle a send that has ended. Called by the connection, so it raises nothing."""
        try:
            outcome = self._outcome_of(send, end)
            if send.span is not None:
                end_span(send.span, outcome)
            self._settle(outcome)
        except Exception as error:  # noqa: BLE001 - it ends the run of the dispatcher
            with suppress(RuntimeError):  # the run is ending already
                self._spawn(_raise(error))

    def _outcome_of(self, send: _Send, end: SendResult | Exception) -> ClaimOutcome:
        mail = send.mail
        result = end if isinstance(end, SendResult) else self._result_of(send, end)
        if send.leased is not None:
            self._renewer.end(send.leased)
        # A mail that could not be built says nothing about its endpoint.
        sent = result is not None and send.relay is not None
        answered = result is not None and result.smtp_code is not None
        self._slots.end(mail.permit, sent=sent, answered=answered)
        if result is not None:
            return self._record(send, result)
        if send.leased is not None:
            return self._outcomes.given_back(send.leased, send.started)
        # Workers were busy with other mails, or the dispatcher stops. Nothing was sent.
        if not self._slots.closed:
            self._metrics.waited(WaitCause.DISPATCHER)
        return UnsentJob(mail.claim, mail.job)

    def _result_of(self, send: _Send, error: Exception) -> SendResult | None:
        """Return the result of a send that ended without SMTP. None: the job is given back."""
        if isinstance(error, GivenBackError | TimeoutError | ResourceExhausted):
            return None
        outcome = AttemptOutcome.TEMPORARY_FAILURE
        if isinstance(error, CompositionError):
            outcome, text = AttemptOutcome.PERMANENT_FAILURE, str(error)[:500].replace("\x00", "")
        elif isinstance(error, WorkerLostError):
            text = f"the mail could not be built: {error}"
        else:
            # An internal error must not keep the job for ever, and the mail is not to blame.
            _log.error("send_failed", exc_info=error, **send.ids)
            text = "internal error of the dispatcher"
        return result_without_smtp(outcome, text, send.started)

    def _record(self, send: _Send, result: SendResult) -> ClaimOutcome:
        mail = send.mail
        route = mail.permit.route
        if result.outcome is AttemptOutcome.CONNECTION_FAILURE:
            # The circuit may be open now. Redis knows whether the waiting claims may try.
            self._slots.give_up(route.endpoint)
        self._progress.count(sent=result.outcome is AttemptOutcome.SENT)
        since_claim = result.started - mail.claimed_at
        late = mail.claim.waited + timedelta(seconds=since_claim)
        endpoint = None
        if send.relay is not None:
            # The operator's relay is not shown to users.
            endpoint = RELAY if send.relay else route.server
        ended = self._outcomes.ended(
            mail.claim, mail.job, result, late=late, server=route.server, endpoint=endpoint
        )
        delay = mail.claim.seconds_since_due(self._lease) + since_claim
        _log.debug(
            "attempt_ended",
            attempt=mail.job.job.attempt,
            outcome=result.outcome.name,
            smtp_code=result.smtp_code,
            enhanced_code=result.enhanced_code,
            reply=result.message,
            **send.ids,
        )
        if send.endpoint is not None:
            self._meter.count(send.endpoint, result.reply_class, result.ended - result.started)
        self._metrics.sent(result, relay=send.relay, late=late, delay=delay)
        if ended.record.state is JobState.SCHEDULED:
            self._metrics.waited(WaitCause.DEFERRED if ended.record.deferred else WaitCause.RETRY)
        return ended


async def _raise(error: Exception) -> None:
    raise error
