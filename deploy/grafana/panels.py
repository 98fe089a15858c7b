"""The panels of the Grafana dashboard: what each of them asks Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Grafana's own variable: at least four scrapes.
_RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A graph: its queries, each with the legend of its lines."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True)
class PanelRow:
    """Some panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


def _quantiles(histogram: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """Return the queries of the median and of the 99th percentile of a histogram."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket{_RATE})))",
            name + legend,
        )
        for q, name in ((0.5, "p50"), (0.99, "p99"))
    )


def _rate(counter: str, by: str = "", where: str = "") -> str:
    head = f"sum by ({by})" if by else "sum"
    return f"{head} (rate({counter}{where}{_RATE}))"


ROWS: Final = (
    PanelRow(
        "Now",
        (
            Panel(
                "Processes that serve",
                "By service. None is an outage.",
                (("sum by (service) (outbox_serving)", "{{service}}"),),
                width=5,
                kind="stat",
            ),
            Panel(
                "Late sends",
                "The share of sends that began more than 5 s too late. The objective is 1 %.",
                (
                    (
                        (
                            '1 - sum(rate(outbox_lateness_seconds_bucket{le="5.0"}[1h]))'
                            " / sum(rate(outbox_lateness_seconds_count[1h]))"
                        ),
                        "last hour",
                    ),
                ),
                unit="percentunit",
                width=5,
                kind="stat",
            ),
            Panel(
                "Oldest due job",
                "How long a mail that all limits allow has waited for a dispatcher.",
                (("max(outbox_oldest_due_age_seconds)", "age"),),
                unit="s",
                width=5,
                kind="stat",
            ),
            Panel(
                "Open circuits",
                "Mail servers that fail. Their mail waits.",
                (("max(outbox_open_circuits)", "circuits"),),
                width=5,
                kind="stat",
            ),
            Panel(
                "Held",
                "1 while only mail that an operator releases is sent, as after a restore.",
                (("max(outbox_held)", "held"),),
                width=4,
                kind="stat",
            ),
        ),
    ),
    PanelRow(
        "Mail",
        (
            Panel(
                "Accepted and sent",
                "Jobs per second.",
                (
                    (_rate("outbox_accepted_jobs_total"), "accepted"),
                    (_rate("outbox_webhook_requests_total"), "requests to webhooks"),
                    (_rate("outbox_attempts_total", where='{outcome="sent"}'), "sent"),
                    (_rate("outbox_claims_total"), "claimed"),
                ),
                unit="cps",
            ),
            Panel(
                "Lateness",
                "Start of a send minus the earliest instant at which the limits allowed it.",
                _quantiles("outbox_lateness_seconds"),
                unit="s",
            ),
            Panel(
                "Delay",
                "Start of a send minus the time at which it was due, waits for limits included.",
                _quantiles("outbox_delay_seconds"),
                unit="s",
            ),
            Panel(
                "Attempts by outcome",
                "Per second.",
                ((_rate("outbox_attempts_total", "outcome"), "{{outcome}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Replies",
                "Per second, by code and class.",
                ((_rate("outbox_replies_total", "code, reply_class"), "{{code}} {{reply_class}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "What made jobs wait",
                "Jobs per second, by cause.",
                ((_rate("outbox_waits_total", "cause"), "{{cause}}"),),
                unit="cps",
                stacked=True,
            ),
        ),
    ),
    PanelRow(
        "Dispatchers",
        (
            Panel(
                "Slots",
                "Jobs in flight, and how many may be.",
                (
                    ("sum(outbox_in_flight)", "in flight"),
                    ("sum(outbox_concurrency)", "concurrency"),
                    ("max(outbox_due_jobs)", "due jobs"),
                ),
            ),
            Panel(
                "Mail servers",
                "Durations of sends by SMTP.",
                _quantiles("outbox_endpoint_seconds", "route"),
                unit="s",
            ),
            Panel(
                "Cooldowns and circuits",
                "Changes per hour, and senders that cool down.",
                (
                    ("sum by (cause) (increase(outbox_cooldowns_total[1h]))", "refused: {{cause}}"),
                    ("sum(increase(outbox_cooldowns_ended_total[1h]))", "cooldowns ended"),
                    (
                        "sum by (change) (increase(outbox_circuit_changes_total[1h]))",
                        "circuits {{change}}",
                    ),
                    ("max(outbox_cooling_senders)", "senders that cool down"),
                ),
            ),
        ),
    ),
    PanelRow(
        "Calls",
        (
            Panel(
                "Calls",
                "Per second, by method.",
                ((_rate("outbox_grpc_requests_total", "method"), "{{method}}"),),
                unit="reqps",
                width=12,
            ),
            Panel(
                "Errors",
                "Per second, by method and code. Errors of callers are included.",
                ((_rate("outbox_grpc_errors_total", "method, code"), "{{method}} {{code}}"),),
                unit="reqps",
                width=12,
            ),
            Panel(
                "Durations",
                "The 99th percentile, without watches.",
                (
                    (
                        (
                            "histogram_quantile(0.99, sum by (le, method) (rate("
                            f'outbox_grpc_duration_seconds_bucket{{method!~".*/Watch.*"}}{_RATE})))'
                        ),
                        "{{method}}",
                    ),
                ),
                unit="s",
                width=12,
            ),
            Panel(
                "Rejected rows",
                "Per second, of accepted batches, and accepted batches.",
                (
                    (_rate("outbox_rejected_rows_total"), "rows"),
                    (_rate("outbox_accepted_batches_total"), "batches"),
                ),
                unit="cps",
                width=12,
            ),
        ),
    ),
    PanelRow(
        "Stores and processes",
        (
            Panel(
                "Stores that answer",
                "1 while all processes reach the store.",
                (("min by (dependency) (outbox_dependency_up)", "{{dependency}}"),),
            ),
            Panel(
                "Rebuilds and lost leases",
                "Per hour, and shards that Redis does not have completely.",
                (
                    (
                        "sum by (result) (increase(outbox_rebuilds_total[1h]))",
                        "rebuilds: {{result}}",
                    ),
                    (
                        "sum by (found) (increase(outbox_lost_leases_total[1h]))",
                        "leases: {{found}}",
                    ),
                    ("max(outbox_incomplete_shards)", "incomplete shards"),
                ),
            ),
            Panel(
                "Counts",
                "Changes of counts that are not folded, and that are folded per second.",
                (
                    ("max(outbox_unfolded_deltas)", "not folded"),
                    (_rate("outbox_folded_deltas_total"), "folded per second"),
                ),
            ),
            Panel(
                "Longest stall of an event loop",
                "In the last one to two minutes. A stall delays every call and send.",
                (
                    (
                        "max by (job, instance) (outbox_event_loop_longest_stall_seconds)",
                        "{{job}} {{instance}}",
                    ),
                ),
                unit="s",
                width=5,
            ),
            Panel(
                "Stalls",
                "How much too late event loops run a timer.",
                _quantiles("outbox_event_loop_stall_seconds", "job"),
                unit="s",
                width=5,
            ),
            Panel(
                "Templates in worker processes",
                "What was parsed or rendered per second, by result, and what waits for a worker.",
                (
                    (_rate("outbox_template_jobs_total", "result"), "{{result}}"),
                    ("sum(outbox_template_jobs_waiting)", "waiting"),
                ),
                width=5,
            ),
            Panel(
                "CPU",
                "Cores in use.",
                (
                    (
                        f"sum by (job, instance) (rate(process_cpu_seconds_total{_RATE}))",
                        "{{job}} {{instance}}",
                    ),
                ),
                width=5,
            ),
            Panel(
                "Memory",
                "Resident.",
                (
                    (
                        "sum by (job, instance) (process_resident_memory_bytes)",
                        "{{job}} {{instance}}",
                    ),
                ),
                unit="bytes",
                width=4,
            ),
        ),
    ),
)
