"""The metrics of a scheduler."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class SchedulerMetrics:
    """Counts the accepted batches and jobs."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Register the metrics. Without a registry they are counted, but not shown."""
        registry = registry or CollectorRegistry()
        self._batches = Counter(
            "outbox_accepted_batches", "Batches that were accepted.", registry=registry
        )
        self._jobs = Counter(
            "outbox_accepted_jobs", "E-mail jobs that were accepted.", registry=registry
        )
        self._rejected = Counter(
            "outbox_rejected_rows",
            "Rejected rows of accepted batches.",
            registry=registry,
        )

    def accepted(self, *, jobs: int, rejected: int) -> None:
        """Count a batch that was accepted."""
        self._batches.inc()
        self._jobs.inc(jobs)
        self._rejected.inc(rejected)


class WebhookMetrics:
    """Counts the requests to webhooks."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Register the metrics. Without a registry they are counted, but not shown."""
        self._posts = Counter(
            "outbox_webhook_requests",
            "Requests to webhooks, by whether they were answered with 2xx.",
            ["result"],
            registry=registry or CollectorRegistry(),
        )
        for result in ("succeeded", "failed"):
            self._posts.labels(result)

    def posted(self, *, succeeded: bool) -> None:
        """Count a request."""
        self._posts.labels("succeeded" if succeeded else "failed").inc()
