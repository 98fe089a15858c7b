"""The jobs that wait for a dispatcher, read from Redis at each scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import timedelta

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import ReadyJobs

_SILENT = ReadyJobs(complete=False, count=0, age=timedelta(0))


class ReadyJobsCollector(Collector):
    """Shows the ready jobs of all shards. If Redis does not answer, there are no samples.

    A shard that does not answer while others do counts as incomplete, without jobs.
    """

    def __init__(self, registry: CollectorRegistry, queues: Sequence[Queue]) -> None:
        self._queues = queues
        self._found: list[ReadyJobs] | None = None
        registry.register(self)

    async def refresh(self) -> None:
        """Ask Redis, in one call per shard."""
        found = await asyncio.gather(*(_count(queue) for queue in self._queues))
        # If none answers, `outbox_dependency_up` says so.
        answers = any(shard is not None for shard in found)
        self._found = [shard or _SILENT for shard in found] if answers else None

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return the families without samples."""
        return self._families(None, None, None)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the results of the last `refresh`."""
        found = self._found
        if found is None:
            return self.describe()
        return self._families(
            sum(shard.count for shard in found),
            max((shard.age for shard in found), default=timedelta(0)).total_seconds(),
            sum(not shard.complete for shard in found),
        )

    def _families(
        self, count: float | None, age: float | None, incomplete: float | None
    ) -> Iterable[GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "outbox_due_jobs",
                "Jobs that are due, that all limits allow, and that wait for a dispatcher.",
                count,
            ),
            GaugeMetricFamily(
                "outbox_oldest_due_age_seconds",
                "Time since the limits allowed the oldest of the due jobs.",
                age,
            ),
            GaugeMetricFamily(
                "outbox_incomplete_shards",
                "Shards of the queue that Redis does not have completely.",
                incomplete,
            ),
        )


async def _count(queue: Queue) -> ReadyJobs | None:
    try:
        return await queue.count_ready_jobs()
    except QUEUE_ERRORS:
        return None
