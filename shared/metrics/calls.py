"""Metrics of gRPC calls, by method."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

# The label of a call of an unknown method. Its name is the caller's text, so it cannot be a label.
UNKNOWN_METHOD = "unknown"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class CallMetrics:
    """Counts calls by method. Only methods of the server are labels, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "outbox_grpc_requests", "Calls that ended.", ["method"], registry=registry
        )
        self._errors = Counter(
            "outbox_grpc_errors",
            "Calls that ended with another code than OK.",
            ["method", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "outbox_grpc_duration_seconds",
            "Durations of calls.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )

    def of(self, method: str) -> MethodMetrics:
        """Return the metrics of one method (`/outbox.v1.BatchService/GetBatch`)."""
        name = method.removeprefix("/")
        return MethodMetrics(
            self._requests.labels(name), self._errors, self._seconds.labels(name), name
        )


class MethodMetrics:
    """The metrics of one method, with their labels already looked up."""

    def __init__(self, requests: Counter, errors: Counter, seconds: Histogram, name: str) -> None:
        self._requests = requests
        self._errors = errors
        self._seconds = seconds
        self._name = name

    def ended(self, code: str, seconds: float) -> None:
        """Count a call that ended with the status `code` (its name) after `seconds`."""
        self._requests.inc()
        self._seconds.observe(seconds)
        if code != "OK":
            self._errors.labels(self._name, code).inc()
