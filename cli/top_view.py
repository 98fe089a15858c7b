"""Draws the screen of `outbox top` from one snapshot of the system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from outbox.v1 import email_job_service_pb2 as jobs
from outbox.v1.dispatcher_pb2 import DispatcherStatus, EndpointStatus
from outbox.v1.sender_pb2 import SENDER_STATE_PAUSED, Cooldown, Sender
from outbox.v1.stats_pb2 import EndpointStats, SenderStats
from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from outbox_server.cli.output import reply_of
from outbox_server.cli.terminal import printable

# The priority of each column. If not all fit, the lowest is dropped first.
_SENDER_COLUMNS: Final = {
    "sender": 9,
    "id": 3,
    "used": 7,
    "sending": 2,
    "waiting": 6,
    "sent": 5,
    "failed": 4,
    "next": 1,
    "waits for": 8,
}
_MIN_COLUMNS: Final = 2
# An address is shortened to this before a column is dropped.
_MIN_ADDRESS: Final = 20
# The longest and shortest text in the column `waits for`, in characters.
_MAX_REASON: Final = 60
_MIN_REASON: Final = 40
# Room for a code, an enhanced code, and the dots of a shortened text.
_MIN_REPLY: Final = 12
_MINUTE_S: Final = 60
_HOUR_S: Final = 3_600
# The minimum width with which endpoints have their latencies.
_LATENCIES_FROM: Final = 80
# The space between two columns.
_SPACE: Final = 2
_REASONS: Final = {
    jobs.WAIT_REASON_NOT_DUE: "not due",
    jobs.WAIT_REASON_RETRY: "retry",
    jobs.WAIT_REASON_MIN_GAP: "gap",
    jobs.WAIT_REASON_HOURLY_LIMIT: "limit",
    jobs.WAIT_REASON_SENDER_PAUSED: "paused",
    jobs.WAIT_REASON_SENDING_HOURS: "hours",
    jobs.WAIT_REASON_ENDPOINT_DOWN: "endpoint",
    jobs.WAIT_REASON_QUEUE: "queue",
    jobs.WAIT_REASON_DISPATCHER: "dispatcher",
    jobs.WAIT_REASON_COOLDOWN: "cooldown",
    jobs.WAIT_REASON_DEFERRED: "deferred",
    jobs.WAIT_REASON_SHARE: "share",
    jobs.WAIT_REASON_USER_HOURLY_LIMIT: "user limit",
    jobs.WAIT_REASON_USER_GAP: "user gap",
    jobs.WAIT_REASON_HELD: "held",
    jobs.WAIT_REASON_BATCH_PAUSED: "batch paused",
}
_KEYS: Final = "up/down: select   p: pause   r: resume   e: explain   ?: help   q: quit"
_HELP: Final = (
    ("", "Keys"),
    ("up, down (k, j)", "select a sender"),
    ("page up, page down (b, n)", "turn the page, if there are more than 30 senders"),
    ("p", "pause the selected sender: it begins no more sends"),
    ("r", "resume it, and end its cooldown"),
    ("e", "explain why its first mail waits"),
    ("?", "show or leave this help"),
    ("q", "quit"),
    ("", "Columns of senders"),
    ("used", "sends of the last hour, and the hourly limit"),
    ("sending, waiting", "mails that are being sent, and that wait"),
    ("sent, failed", "counts since the sender was created"),
    ("next", "when the first waiting mail is due"),
    ("waits for", "why it is not being sent, and until when"),
    ("", "Columns of dispatchers and endpoints"),
    ("in flight", "mails that are being sent, and how many may be"),
    ("sent/s, attempts/s", "averages of the last minute"),
    ("circuit", "open: connections fail, mail waits; in parentheses, open connections"),
    ("p50, p99", "the time that half, and 99 of 100, of the last attempts took at most"),
)
# The number of senders shown even on a small screen.
_MIN_SENDERS: Final = 3


@dataclass(frozen=True, slots=True)
class SenderView:
    """One sender, as the scheduler and the stats service see it."""

    sender: Sender
    stats: SenderStats
    # Why its first waiting mail waits. None if no mail waits.
    waits: jobs.ExplainEmailJobResponse | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One snapshot of the system."""

    at: datetime
    senders: Sequence[SenderView] = ()
    dispatchers: Sequence[DispatcherStatus] = ()
    # What happened lately at the endpoints, by user.
    endpoints: Sequence[EndpointStats] = ()
    # Which services could not be reached, and why.
    troubles: Sequence[str] = field(default=())
    # The number of the page of senders, from 1, and whether another one follows.
    page: int = 1
    more: bool = False


def why(view: SenderView, now: datetime, most: int = _MAX_REASON) -> str:
    """Return why the first waiting mail of a sender waits, in about `most` characters."""
    cooldown = _cooldown_of(view)
    if cooldown is not None:
        return _cooling(cooldown, now, most)
    if view.waits is None:
        return "paused" if view.sender.state == SENDER_STATE_PAUSED else "nothing waits"
    text = _REASONS.get(view.waits.wait_reason, "being sent")
    if not view.waits.HasField("wait_end_time"):
        return text
    until = view.waits.wait_end_time.ToDatetime(UTC)
    return f"{text} till {until:{'%H:%M:%S' if until.date() == now.date() else '%m-%d %H:%M'}}"


def _cooldown_of(view: SenderView) -> Cooldown | None:
    """Return the sender's cooldown if its first mail waits for that, otherwise None."""
    if view.sender.state == SENDER_STATE_PAUSED or not view.stats.HasField("cooldown"):
        return None
    cools = view.waits is None or view.waits.wait_reason == jobs.WAIT_REASON_COOLDOWN
    return view.stats.cooldown if cools else None


def _cooling(cooldown: Cooldown, now: datetime, most: int) -> str:
    """Return the reply, shortened if it is too long, and the time to the next probe."""
    left = cooldown.next_probe_time.ToDatetime(UTC) - now
    before, after = "cooling down: ", f", probe {_in(left)}"
    reply = reply_of(cooldown)
    room = max(most - len(before) - len(after), _MIN_REPLY)
    if len(reply) > room:
        reply = f"{reply[: room - 3].rstrip()}..."
    return f"{before}{reply}{after}"


def _in(left: timedelta) -> str:
    seconds = int(left.total_seconds())
    if seconds <= 0:
        return "now"
    if seconds < _MINUTE_S:
        return f"in {seconds}s"
    if seconds < _HOUR_S:
        return f"in {seconds // _MINUTE_S}m"
    return f"in {seconds // _HOUR_S}h{seconds % _HOUR_S // _MINUTE_S:02}m"


def draw(view: View, selected: int, message: str, console: Console) -> RenderableType:
    """Return the screen. `selected` is the index of the selected sender.

    If not everything fits, senders far from the selected one are left out first, then the ends of
    the tables, but never the last lines.
    """
    bottom = Group(Text(), Text(_line(message), "yellow"), Text(_KEYS, "dim"))
    below: list[RenderableType] = []
    if view.more or view.page > 1:
        turns = "   n: next" * view.more + "   b: back" * (view.page > 1)
        below.append(Text(f"page {view.page}{turns}", "dim"))
    if view.dispatchers:
        below += [
            Text(),
            _dispatchers(view.dispatchers),
            _endpoints(view, console.width),
        ]
    below += [Text(_line(trouble), "red") for trouble in view.troubles]
    under = _height(bottom, console)
    # Two lines are the title and the column names.
    room = console.height - under - _height(Group(*below), console) - 2
    body = Group(
        Text(f"outbox top  {view.at:%Y-%m-%d %H:%M:%S} UTC", "bold"),
        _senders(view, selected, max(room, _MIN_SENDERS), console.width),
        *below,
    )
    layout = Layout()
    layout.split_column(Layout(body), Layout(bottom, size=min(under, console.height // 2)))
    return layout


def help_screen() -> RenderableType:
    """Return the screen that explains the keys and the columns."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, meaning in _HELP:
        table.add_row(Text(name), Text(meaning, "" if name else "bold"))
    return Group(Text("outbox top", "bold"), table)


def _line(text: str) -> str:
    """Return a text, which may quote a server, in one line without control characters."""
    return printable(" ".join(text.split()))


def _height(part: RenderableType, console: Console) -> int:
    return len(console.render_lines(part, console.options.update(height=None), pad=False))


def _senders(view: View, selected: int, room: int, width: int) -> Table:
    rows = {place: _cells(each, view.at) for place, each in enumerate(view.senders)}
    natural = {
        name: max([len(name), *(len(cells[name]) for cells in rows.values())])
        for name in _SENDER_COLUMNS
    }
    names = list(_SENDER_COLUMNS)
    least = natural | {
        "sender": min(natural["sender"], _MIN_ADDRESS),
        "waits for": min(natural["waits for"], _MIN_REASON),
    }
    while _width(least, names) > width and len(names) > _MIN_COLUMNS:
        names.remove(min(names, key=lambda name: _SENDER_COLUMNS[name]))
    if _width(natural, names) > width and "id" in names:
        # An id has up to 19 digits, and a reason says more.
        names.remove("id")
    over = max(_width(natural, names) - width, 0)
    natural["waits for"] = max(natural["waits for"] - over, least["waits for"])
    natural["sender"] -= max(_width(natural, names) - width, 0)
    table = Table(box=None, pad_edge=False)
    for name in names:
        size = max(natural[name], 1)
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=size)
    first = min(max(selected - room // 2, 0), max(len(rows) - room, 0))
    for place in range(first, min(first + room, len(rows))):
        style = "reverse" if place == selected else None
        # `why` shortens the text, so that the time of the next probe stays visible.
        cells = rows[place] | {"waits for": why(view.senders[place], view.at, natural["waits for"])}
        table.add_row(*(Text(printable(cells[name])) for name in names), style=style)
    return table


def _width(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(sizes[name] + _SPACE for name in names) - _SPACE


def _cells(view: SenderView, now: datetime) -> dict[str, str]:
    stats = view.stats
    due = stats.next_schedule_time
    return {
        "sender": view.sender.email,
        "id": view.sender.sender_id,
        "used": f"{stats.window_used_count}/{stats.hourly_limit}",
        "sending": str(stats.counts.sending_count),
        "waiting": str(stats.waiting_count),
        "sent": str(stats.counts.sent_count),
        "failed": str(stats.counts.failed_count),
        "next": f"{due.ToDatetime(UTC):%H:%M:%S}" if stats.HasField("next_schedule_time") else "",
        "waits for": why(view, now),
    }


def _dispatchers(dispatchers: Sequence[DispatcherStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("dispatcher", "in flight", "sent/s", "attempts/s"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for each in dispatchers:
        table.add_row(
            each.dispatcher_id,
            f"{each.in_flight_count}/{each.concurrency}",
            f"{each.rates.sent_per_second:.1f}",
            f"{each.rates.attempts_per_second:.1f}",
        )
    return table


def _endpoints(view: View, width: int) -> Table:
    with_latencies = width >= _LATENCIES_FROM
    rows = [
        (
            f"{each.host}:{each.port}",
            _circuit(each),
            *(_latencies(view.endpoints, each) if with_latencies else ()),
            _line(each.last_error),
        )
        for each in _joined(view)
    ]
    table = Table(box=None, pad_edge=False)
    latencies = ("p50", "p99") if with_latencies else ()
    for place, name in enumerate(("endpoint", "circuit", *latencies, "last error")):
        size = max([len(name), *(len(row[place]) for row in rows)])
        # Only errors and server names can be long.
        size = min(size, width if name == "last error" else width // 2)
        width -= size + _SPACE
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=max(size, 1))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _latencies(found: Sequence[EndpointStats], endpoint: EndpointStatus) -> tuple[str, str]:
    """Return the latencies of an endpoint for the user for whom it is slowest."""
    of_users = [each for each in found if (each.host, each.port) == (endpoint.host, endpoint.port)]
    if not of_users:
        return "", ""
    slowest = max(of_users, key=lambda each: each.latency_p99.ToMicroseconds())
    return _short(slowest.latency_p50), _short(slowest.latency_p99)


def _short(latency: Duration) -> str:
    seconds = latency.ToMicroseconds() / 1_000_000
    return f"{seconds:.1f}s" if seconds >= 1 else f"{seconds * 1000:.0f}ms"


def _joined(view: View) -> list[EndpointStatus]:
    """Return each endpoint once, as all dispatchers together see it."""
    found: dict[tuple[str, int], EndpointStatus] = {}
    for endpoint in (each for dispatcher in view.dispatchers for each in dispatcher.endpoints):
        known = found.setdefault((endpoint.host, endpoint.port), EndpointStatus())
        connections = known.connection_count + endpoint.connection_count
        users = max(known.stopped_user_count, endpoint.stopped_user_count)
        # Fields that the later one lacks, such as an open circuit, stay.
        later = known.last_error_time.ToNanoseconds() > endpoint.last_error_time.ToNanoseconds()
        first, second = (endpoint, known) if later else (known, endpoint)
        joined = EndpointStatus()
        joined.MergeFrom(first)
        joined.MergeFrom(second)
        joined.connection_count, joined.stopped_user_count = connections, users
        found[endpoint.host, endpoint.port] = joined
    # Those that only dispatchers use which were not asked themselves.
    for stats in view.endpoints:
        other = EndpointStatus(host=stats.host, port=stats.port)
        if stats.HasField("circuit_open_time"):
            other.circuit_open_time.CopyFrom(stats.circuit_open_time)
        found.setdefault((stats.host, stats.port), other)
    return list(found.values())


def _circuit(endpoint: EndpointStatus) -> str:
    connections = f" ({endpoint.connection_count})" if endpoint.connection_count else ""
    if not endpoint.HasField("circuit_open_time"):
        return f"closed{connections}"
    users = endpoint.stopped_user_count
    whose = f" for {users} user{'s' * (users > 1)}" if users else ""
    return f"open{whose} since {endpoint.circuit_open_time.ToDatetime(UTC):%H:%M:%S}{connections}"
