"""The output of `outbox top` in terminals of any size."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import email_job_service_pb2 as jobs
from outbox.v1.dispatcher_pb2 import DispatcherStatus, EndpointStatus
from outbox.v1.sender_pb2 import SENDER_STATE_PAUSED, Cooldown, Sender
from outbox.v1.stats_pb2 import EndpointStats, SenderStats
from rich.console import Console

from outbox_server.cli.top_view import SenderView, View, draw, help_screen, why

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
ERROR = "[Errno 111] Connect call failed: connection refused. " * 4 + "The end."
MESSAGE = "The endpoint is down: " + "a long explanation " * 8 + "ends here."


def at(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def sender(
    n: int, reason: jobs.WaitReason.ValueType = jobs.WAIT_REASON_ENDPOINT_DOWN
) -> SenderView:
    return SenderView(
        Sender(email=f"news-{n}@a-domain-of-some-length.example.com", sender_id=str(n)),
        SenderStats(window_used_count=n, hourly_limit=200, waiting_count=9),
        jobs.ExplainEmailJobResponse(
            wait_reason=reason, wait_end_time=at(NOW + timedelta(seconds=5))
        ),
    )


def latencies(user: str, p99_ms: int) -> EndpointStats:
    found = EndpointStats(user_id=user, host="smtp1.example.com", port=587)
    found.latency_p50.FromMilliseconds(40)
    found.latency_p99.FromMilliseconds(p99_ms)
    return found


def screen(width: int, height: int, *, senders: int, selected: int = 0) -> list[str]:
    endpoints = [
        EndpointStatus(
            host=f"smtp{n}.example.com", port=587, last_error=ERROR, circuit_open_time=at(NOW)
        )
        for n in range(2)
    ]
    view = View(
        NOW,
        [sender(n) for n in range(senders)],
        [DispatcherStatus(dispatcher_id="one", concurrency=5, endpoints=endpoints)],
        [latencies("ann", 90), latencies("", 2100)],
    )
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, markup=False, force_terminal=False)
    console.print(draw(view, selected, MESSAGE, console))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(60, 30), (80, 24), (140, 40), (60, 14)])
@pytest.mark.parametrize("selected", [0, 13, 29])
def test_a_screen_of_any_size_shows_the_essentials(width: int, height: int, selected: int) -> None:
    lines = screen(width, height, senders=30, selected=selected)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    [chosen] = [line for line in lines if line.startswith(f"news-{selected}@")]
    assert "endpoint till 12:00:05" in chosen
    assert f" {selected}/200" in chosen
    bottom = " ".join(" ".join(lines[-6:]).split())
    assert "ends here." in bottom
    assert bottom.endswith("?: help q: quit")


@pytest.mark.parametrize(("width", "height"), [(60, 30), (80, 24), (140, 40)])
def test_an_endpoints_error_takes_one_line(width: int, height: int) -> None:
    lines = screen(width, height, senders=3)
    assert len([line for line in lines if line.startswith("smtp")]) == 2
    assert "Errno" in "".join(lines)
    assert "The end." not in "".join(lines)


def test_an_endpoint_shows_the_latency_of_the_user_for_whom_it_is_slowest() -> None:
    first, second = (line for line in screen(140, 40, senders=3) if line.startswith("smtp"))
    assert " 40ms 2.1s " in " ".join(second.split())
    assert "ms" not in first.partition("Errno")[0]


def test_a_wide_screen_has_every_column() -> None:
    [names] = [line for line in screen(140, 40, senders=3) if line.startswith("sender ")]
    wanted = "sender id used sending waiting sent failed next waits for"
    assert " ".join(names.split()) == wanted


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (jobs.WAIT_REASON_NOT_DUE, "not due till 12:00:05"),
        (jobs.WAIT_REASON_RETRY, "retry till 12:00:05"),
        (jobs.WAIT_REASON_HOURLY_LIMIT, "limit till 12:00:05"),
        (jobs.WAIT_REASON_ENDPOINT_DOWN, "endpoint till 12:00:05"),
    ],
)
def test_a_sender_shows_the_wait_reason_of_its_mail(
    reason: jobs.WaitReason.ValueType, text: str
) -> None:
    assert why(sender(1, reason), NOW) == text
    assert why(sender(1, reason), NOW - timedelta(days=1)).endswith("till 11-24 12:00")


def test_a_sender_without_waiting_mail_shows_no_wait_reason() -> None:
    assert why(SenderView(Sender(), SenderStats()), NOW) == "nothing waits"
    paused = Sender(state=SENDER_STATE_PAUSED)
    assert why(SenderView(paused, SenderStats()), NOW) == "paused"


def cooling(text: str = "Daily user sending limit exceeded", minutes: float = 4.5) -> SenderView:
    cooldown = Cooldown(
        start_time=at(NOW - timedelta(minutes=3)),
        next_probe_time=at(NOW + timedelta(minutes=minutes)),
        smtp_code=550,
        enhanced_code="5.4.5",
        message=text,
    )
    view = sender(1, jobs.WAIT_REASON_COOLDOWN)
    view.stats.cooldown.CopyFrom(cooldown)
    return view


@pytest.mark.parametrize(
    ("minutes", "probe"),
    [(4.5, "in 4m"), (0.5, "in 30s"), (125, "in 2h05m"), (-1, "now"), (1_439.5, "in 23h59m")],
)
def test_a_cooldown_shows_the_reply_and_the_time_to_the_next_probe(
    minutes: float, probe: str
) -> None:
    short = "Daily limit"
    assert why(cooling(short, minutes), NOW) == (f"cooling down: 550 5.4.5 {short}, probe {probe}")


def test_a_cooldown_is_shown_unless_another_reason_has_priority() -> None:
    view = cooling()
    idle = SenderView(view.sender, view.stats)
    assert why(idle, NOW).startswith("cooling down: 550 5.4.5")
    later = SenderView(view.sender, view.stats, sender(1, jobs.WAIT_REASON_NOT_DUE).waits)
    assert why(later, NOW) == "not due till 12:00:05"
    paused = Sender(state=SENDER_STATE_PAUSED)
    assert why(SenderView(paused, view.stats), NOW) == "paused"


@pytest.mark.parametrize("width", [64, 80, 140])
def test_a_long_reply_is_cut_but_the_time_of_the_probe_is_kept(width: int) -> None:
    view = View(NOW, [cooling("You have exceeded your quota. " * 20), sender(2)])
    out = io.StringIO()
    console = Console(file=out, width=width, height=24, markup=False, force_terminal=False)
    console.print(draw(view, 0, "", console))
    [line] = [line for line in out.getvalue().splitlines() if "cooling down" in line]
    assert "550 5.4.5" in line
    assert line.rstrip().endswith("..., probe in 4m")
    assert "news-1@" in line


def test_text_of_a_foreign_server_cannot_control_the_terminal() -> None:
    steering = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\nanother line"
    endpoint = EndpointStatus(host="smtp.example.com", port=587, last_error=steering)
    dispatcher = DispatcherStatus(dispatcher_id="one", concurrency=5, endpoints=[endpoint])
    view = View(NOW, [cooling(steering)], [dispatcher], troubles=[steering])
    out = io.StringIO()
    console = Console(file=out, width=300, height=40, markup=False, force_terminal=False)
    console.print(draw(view, 0, steering, console))
    shown = out.getvalue()
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert shown.count("\\x1b]0;owned") == 4
    assert not any(line.startswith("another line") for line in shown.splitlines())


def test_an_endpoint_of_two_dispatchers_is_shown_once_with_its_latest_error() -> None:
    old, new = at(NOW - timedelta(minutes=1)), at(NOW)
    where: Any = {"host": "smtp.example.com", "port": 25}
    one = EndpointStatus(connection_count=2, last_error="new error", last_error_time=new, **where)
    two = EndpointStatus(
        connection_count=3,
        last_error="old error",
        last_error_time=old,
        circuit_open_time=new,
        **where,
    )
    statuses = [
        DispatcherStatus(dispatcher_id=name, concurrency=5, endpoints=[endpoint])
        for name, endpoint in (("one", one), ("two", two))
    ]
    for order in (statuses, statuses[::-1]):
        out = io.StringIO()
        console = Console(file=out, width=120, height=30, markup=False)
        console.print(draw(View(NOW, [sender(1)], order), 0, "", console))
        [line] = [line for line in out.getvalue().splitlines() if "smtp.example.com:25" in line]
        assert line.split() == [
            "smtp.example.com:25", "open", "since", "12:00:00", "(5)", "new", "error"
        ]  # fmt: skip
        assert {"one", "two"} <= {line.split(" ")[0] for line in out.getvalue().splitlines()}


def test_an_endpoint_of_a_dispatcher_that_was_not_asked_is_shown_too() -> None:
    known = EndpointStatus(host="smtp0.example.com", port=587, last_error="seen here")
    dispatchers = [
        DispatcherStatus(dispatcher_id="asked", concurrency=5, endpoints=[known]),
        DispatcherStatus(dispatcher_id="another", concurrency=5, in_flight_count=3),
    ]
    elsewhere = EndpointStats(host="smtp9.example.com", port=25, circuit_open_time=at(NOW))
    here = EndpointStats(host="smtp0.example.com", port=587)
    out = io.StringIO()
    console = Console(file=out, width=120, height=30, markup=False)
    view = View(NOW, [sender(1)], dispatchers, [here, elsewhere])
    console.print(draw(view, 0, "", console))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert [line for line in lines if line.startswith("another")] == ["another 3/5 0.0 0.0"]
    first, second = (line for line in lines if line.startswith("smtp"))
    assert first.startswith("smtp0.example.com:587 closed")
    assert first.endswith("seen here")
    assert second.startswith("smtp9.example.com:25 open since 12:00:00")


def test_the_help_names_every_key_and_column() -> None:
    out = io.StringIO()
    Console(file=out, width=80, height=24, markup=False).print(help_screen())
    text = out.getvalue()
    assert len(text.splitlines()) < 24
    shown = screen(140, 40, senders=1)
    keys = shown[-1].replace("up/down:", "up, down:").split("   ")
    for key in (each.partition(":")[0].strip() for each in keys):
        assert key in text
    columns = {
        word for line in shown for word in line.split() if word in ("used", "sending", "next")
    }
    assert len(columns) == 3
    assert all(column in text for column in columns)


def test_every_wait_reason_has_its_own_text() -> None:
    reasons = set(jobs.WaitReason.values()) - {jobs.WAIT_REASON_UNSPECIFIED}
    words = {why(sender(1, reason), NOW) for reason in reasons}
    assert len(words) == len(reasons)
    assert not any("being sent" in text for text in words)
