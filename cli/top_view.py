"""What `outbox top` shows, drawn from one look at the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from outbox.v1.dispatcher_pb2 import DispatcherStatus
from outbox.v1.sender_pb2 import SENDER_STATE_PAUSED, Sender
from outbox.v1.stats_pb2 import SenderStats
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.sending_hours import SendingHours

_SENDER_COLUMNS = (
    "sender",
    "id",
    "used",
    "sending",
    "waiting",
    "sent",
    "failed",
    "next",
    "waits for",
)
_KEYS = "up/down: select   p: pause   r: resume   e: explain   q: quit"


@dataclass(frozen=True, slots=True)
class SenderView:
    """One sender, as the scheduler and the stats service see it."""

    sender: Sender
    stats: SenderStats


@dataclass(frozen=True, slots=True)
class View:
    """One look."""

    at: datetime
    senders: Sequence[SenderView] = ()
    dispatchers: Sequence[DispatcherStatus] = ()
    # What could not be asked, and why.
    troubles: Sequence[str] = field(default=())
    # Of the senders' pages, the first is 1; and whether another follows.
    page: int = 1
    more: bool = False


def why(view: SenderView, now: datetime) -> str:
    """Return what keeps the first waiting mail of a sender."""
    stats = view.stats
    if not stats.waiting_count:
        return "nothing waits"
    if view.sender.state == SENDER_STATE_PAUSED:
        return "paused"
    due = stats.next_send_time.ToDatetime(UTC)
    if due > now:
        return f"due at {due:%m-%d %H:%M:%S}"
    opens = _next_opening(view.sender, now)
    if opens and opens > now:
        return f"hours from {opens:%m-%d %H:%M}"
    if stats.window_used_count >= stats.hourly_limit:
        return "limit used up"
    return "gap" if stats.counts.sending_count or stats.window_used_count else "dispatcher"


def _next_opening(sender: Sender, now: datetime) -> datetime | None:
    """Return when its sending hours have begun or begin; None: it has none."""
    if not sender.HasField("sending_hours"):
        return None
    asked = sender.sending_hours
    hours = SendingHours(
        frozenset(asked.weekdays),
        # `from` is a word of Python's.
        _minutes(getattr(asked, "from")),
        _minutes(asked.to),
        asked.time_zone,
    )
    opens = hours.opens(int(now.timestamp() * 1_000))
    return None if opens is None else datetime.fromtimestamp(opens / 1_000, UTC)


def _minutes(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return int(hours) * 60 + int(minutes)


def draw(view: View, selected: int, message: str) -> RenderableType:
    """Return the screen; `selected` is the place of a sender."""
    parts: list[RenderableType] = [Text(f"outbox top  {view.at:%Y-%m-%d %H:%M:%S} UTC", "bold")]
    parts.append(_senders(view, selected))
    if view.more or view.page > 1:
        turns = "   n: next" * view.more + "   b: back" * (view.page > 1)
        parts.append(Text(f"page {view.page}{turns}", "dim"))
    if view.dispatchers:
        parts += [Text(), _dispatchers(view.dispatchers), _endpoints(view.dispatchers)]
    parts += [Text(trouble, "red") for trouble in view.troubles]
    parts += [Text(), Text(message, "yellow"), Text(_KEYS, "dim")]
    return Group(*parts)


def _senders(view: View, selected: int) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    for name in _SENDER_COLUMNS:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for place, each in enumerate(view.senders):
        stats = each.stats
        due = stats.next_send_time
        table.add_row(
            Text(each.sender.email),
            each.sender.sender_id,
            f"{stats.window_used_count}/{stats.hourly_limit}",
            str(stats.counts.sending_count),
            str(stats.waiting_count),
            str(stats.counts.sent_count),
            str(stats.counts.failed_count),
            f"{due.ToDatetime(UTC):%H:%M:%S}" if stats.HasField("next_send_time") else "",
            why(each, view.at),
            style="reverse" if place == selected else None,
        )
    return table


def _dispatchers(dispatchers: Sequence[DispatcherStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("dispatcher", "in flight", "sent/s", "attempts/s"):
        table.add_column(name)
    for each in dispatchers:
        table.add_row(
            each.dispatcher_id,
            f"{each.in_flight_count}/{each.concurrency}",
            f"{each.rates.sent_per_second:.1f}",
            f"{each.rates.attempts_per_second:.1f}",
        )
    return table


def _endpoints(dispatchers: Sequence[DispatcherStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("endpoint", "connections", "circuit", "last error"):
        table.add_column(name)
    for each in dispatchers:
        for endpoint in each.endpoints:
            opened = endpoint.circuit_open_time
            since = f"open since {opened.ToDatetime(UTC):%H:%M:%S}"
            table.add_row(
                f"{endpoint.host}:{endpoint.port}",
                str(endpoint.connection_count),
                since if endpoint.HasField("circuit_open_time") else "closed",
                Text(endpoint.last_error),
            )
    return table
