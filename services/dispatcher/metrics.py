"""The metrics of a dispatcher. Every label has few values, which are looked up once."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from enum import StrEnum
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from outbox_server.services.dispatcher.cooling import Signal
from outbox_server.services.dispatcher.smtp import SendResult
from outbox_server.shared.heads.loader import RebuildResult
from outbox_server.shared.queue.circuits import CircuitChange
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import AttemptOutcome, ReplyClass

LATENESS_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    *(30, 60, 300, 900, 3600, 7200, 14400),
)
_SMTP: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
_NO_REPLY: Final = "none"
_OVER: Final = timedelta(0)


class WaitCause(StrEnum):
    """What made a job wait after it was due, by the names of WaitReason."""

    MIN_GAP = "MIN_GAP"
    HOURLY_LIMIT = "HOURLY_LIMIT"
    USER_HOURLY_LIMIT = "USER_HOURLY_LIMIT"
    USER_GAP = "USER_GAP"
    SENDER_PAUSED = "SENDER_PAUSED"
    SENDING_HOURS = "SENDING_HOURS"
    ENDPOINT_DOWN = "ENDPOINT_DOWN"
    COOLDOWN = "COOLDOWN"
    RETRY = "RETRY"
    DEFERRED = "DEFERRED"
    # It waited in a dispatcher, because its endpoint or its user had its full share of the slots.
    DISPATCHER = "DISPATCHER"


class CooldownCause(StrEnum):
    """Why a sender began to cool down."""

    ACCOUNT = "account"
    DAILY_QUOTA = "daily_quota"
    REFUSALS_IN_A_ROW = "refusals_in_a_row"


class LostLease(StrEnum):
    """How the lease of a job was lost."""

    # Redis no longer had it when the send was to begin.
    BEFORE_SEND = "before_send"
    # PostgreSQL no longer had it when it was to be renewed.
    RENEWAL = "renewal"
    # Its dispatcher recorded no outcome in time.
    EXPIRED = "expired"


class DispatcherMetrics:
    """Counts what a dispatcher does."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Register the metrics. Without a registry they are counted, but not shown."""
        registry = registry or CollectorRegistry()
        self._claims = Counter(
            "outbox_claims", "Jobs that this dispatcher claimed.", registry=registry
        )
        waits = Counter(
            "outbox_waits",
            "Jobs that a limit, a retry or the dispatcher made wait, by cause.",
            ["cause"],
            registry=registry,
        )
        self._waits = {cause.value: waits.labels(cause.value.lower()) for cause in WaitCause}
        self._lateness = Histogram(
            "outbox_lateness_seconds",
            "Start of a send minus the earliest instant at which the limits allowed it.",
            buckets=LATENESS_BUCKETS,
            registry=registry,
        )
        self._delay = Histogram(
            "outbox_delay_seconds",
            "Start of a send minus the time at which it was due, waits for limits included.",
            buckets=LATENESS_BUCKETS,
            registry=registry,
        )
        endpoint = Histogram(
            "outbox_endpoint_seconds",
            "Durations of sends by SMTP, without the wait for a connection.",
            ["route"],
            buckets=_SMTP,
            registry=registry,
        )
        self._endpoint = {True: endpoint.labels("relay"), False: endpoint.labels("own")}
        attempts = Counter(
            "outbox_attempts", "Attempts that ended, by outcome.", ["outcome"], registry=registry
        )
        self._attempts = {each: attempts.labels(each.name.lower()) for each in AttemptOutcome}
        self._replies = Counter(
            "outbox_replies",
            "Attempts that ended, by the code and the class of the server's reply.",
            ["code", "reply_class"],
            registry=registry,
        )
        self._known_replies: dict[tuple[int, ReplyClass | None], Counter] = {}
        self.in_flight = Gauge(
            "outbox_in_flight", "Jobs that are claimed and not yet recorded.", registry=registry
        )
        self.concurrency = Gauge(
            "outbox_concurrency", "OUTBOX_DISPATCHER_CONCURRENCY.", registry=registry
        )
        self.open_circuits = Gauge(
            "outbox_open_circuits",
            "Open circuits of endpoints that this dispatcher has used lately.",
            registry=registry,
        )
        self.held = Gauge(
            "outbox_held",
            "1 while the installation is held, so that only released mail is sent; else 0.",
            registry=registry,
        )
        self._cooldowns = Counter(
            "outbox_cooldowns",
            "Refusals that began or prolonged the cooldown of a sender, by cause.",
            ["cause"],
            registry=registry,
        )
        for cause in CooldownCause:
            self._cooldowns.labels(cause.value)
        self._cooldowns_ended = Counter(
            "outbox_cooldowns_ended",
            "Cooldowns that an accepted mail ended.",
            registry=registry,
        )
        circuits = Counter(
            "outbox_circuit_changes",
            "Circuits that this dispatcher opened or closed.",
            ["change"],
            registry=registry,
        )
        self._circuits = {True: circuits.labels("opened"), False: circuits.labels("closed")}
        rebuilds = Counter(
            "outbox_rebuilds",
            "Rebuilds of a shard that Redis had lost, completely or in part.",
            ["result"],
            registry=registry,
        )
        self._rebuilds = {result: rebuilds.labels(result.value) for result in RebuildResult}
        lost = Counter(
            "outbox_lost_leases",
            "Leases that were lost, by how that was noticed.",
            ["found"],
            registry=registry,
        )
        self._lost = {found: lost.labels(found.value) for found in LostLease}

    def claimed(self, claims: Collection[Claim]) -> None:
        """Count claims, and the limits that had delayed them."""
        self._claims.inc(len(claims))
        for claim in claims:
            if claim.delayed_by:
                self.waited(claim.delayed_by)

    def waited(self, cause: str, jobs: int = 1) -> None:
        """Count jobs that wait, or have waited, for a cause (a WaitCause)."""
        self._waits[cause].inc(jobs)

    def sent(
        self, result: SendResult, *, relay: bool | None, late: timedelta, delay: float
    ) -> None:
        """Count an attempt that ended.

        `relay` is True for OUTBOX_SMTP_URL, False for a sender's own endpoint, None if no mail
        could be built.
        """
        self._lateness.observe(late.total_seconds())
        self._delay.observe(delay)
        if relay is not None:
            self._endpoint[relay].observe(result.ended - result.started)
        self._attempts[result.outcome].inc()
        hundreds = (result.smtp_code or 0) // 100
        key = hundreds, result.reply_class
        reply = self._known_replies.get(key)
        if reply is None:
            code = f"{hundreds}xx" if hundreds else _NO_REPLY
            name = result.reply_class.name.lower() if result.reply_class else _NO_REPLY
            reply = self._known_replies[key] = self._replies.labels(code, name)
        reply.inc()

    def cooled(self, signal: Signal, wait: timedelta) -> None:
        """Count a change of a cooldown: `wait` to the next probe, or zero if it is over."""
        if wait == _OVER:
            self._cooldowns_ended.inc()
            return
        cause = CooldownCause.REFUSALS_IN_A_ROW
        if signal.refused:
            cause = CooldownCause.DAILY_QUOTA if signal.daily else CooldownCause.ACCOUNT
        self._cooldowns.labels(cause.value).inc()

    def circuit_changed(self, change: CircuitChange) -> None:
        """Count a circuit that has opened or closed."""
        self._circuits[change.opened].inc()

    def rebuilt(self, result: RebuildResult) -> None:
        """Count a rebuild."""
        self._rebuilds[result].inc()

    def lost_leases(self, found: LostLease, number: int = 1) -> None:
        """Count leases that were lost."""
        self._lost[found].inc(number)
