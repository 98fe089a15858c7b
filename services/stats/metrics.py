"""The metrics of the stats service, read from PostgreSQL at each scrape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

NOT_KNOWN = float("nan")


class StatsMetrics:
    """Shows how far folding is behind, and how many senders cool down."""

    def __init__(
        self,
        registry: CollectorRegistry,
        read: Callable[[], Awaitable[tuple[int, int]]],
        errors: tuple[type[Exception], ...],
    ) -> None:
        """`read` returns the unfolded deltas and the cooling senders, or raises one of `errors`."""
        self._read = read
        self._errors = errors
        self._unfolded = Gauge(
            "outbox_unfolded_deltas",
            "Changes of counts that are not folded yet, counted up to 100,000.",
            registry=registry,
        )
        self._cooling = Gauge(
            "outbox_cooling_senders",
            "Senders that cool down because their account was refused.",
            registry=registry,
        )
        self.folded = Counter(
            "outbox_folded_deltas", "Changes of counts that were folded.", registry=registry
        )

    async def refresh(self) -> None:
        """Read the gauges. Their value is NaN while PostgreSQL does not answer."""
        unfolded, cooling = NOT_KNOWN, NOT_KNOWN
        try:
            unfolded, cooling = await self._read()
        except self._errors:
            pass
        finally:
            self._unfolded.set(unfolded)
            self._cooling.set(cooling)
