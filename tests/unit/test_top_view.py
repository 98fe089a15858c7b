"""What `outbox top` draws, in terminals of any size."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import email_job_service_pb2 as jobs
from outbox.v1.dispatcher_pb2 import DispatcherStatus, EndpointStatus
from outbox.v1.sender_pb2 import SENDER_STATE_PAUSED, Sender
from outbox.v1.stats_pb2 import SenderStats
from rich.console import Console

from cli.top_view import SenderView, View, draw, why

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
    )
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, markup=False, force_terminal=False)
    console.print(draw(view, selected, MESSAGE, console))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(60, 30), (80, 24), (140, 40), (60, 14)])
@pytest.mark.parametrize("selected", [0, 13, 29])
def test_a_screen_of_any_size_has_what_matters(width: int, height: int, selected: int) -> None:
    lines = screen(width, height, senders=30, selected=selected)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    [chosen] = [line for line in lines if line.startswith(f"news-{selected}@")]
    assert "endpoint till 12:00:05" in chosen
    assert f" {selected}/200" in chosen
    bottom = " ".join(" ".join(lines[-6:]).split())
    assert "ends here." in bottom
    assert bottom.endswith("e: explain q: quit")


@pytest.mark.parametrize(("width", "height"), [(60, 30), (80, 24), (140, 40)])
def test_an_endpoints_error_takes_one_line(width: int, height: int) -> None:
    lines = screen(width, height, senders=3)
    assert len([line for line in lines if line.startswith("smtp")]) == 2
    assert "Errno" in "".join(lines)
    assert "The end." not in "".join(lines)


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
def test_what_a_sender_waits_for_is_what_its_mail_waits_for(
    reason: jobs.WaitReason.ValueType, text: str
) -> None:
    assert why(sender(1, reason), NOW) == text
    assert why(sender(1, reason), NOW - timedelta(days=1)).endswith("till 11-24 12:00")


def test_a_sender_without_waiting_mail_waits_for_nothing() -> None:
    assert why(SenderView(Sender(), SenderStats()), NOW) == "nothing waits"
    paused = Sender(state=SENDER_STATE_PAUSED)
    assert why(SenderView(paused, SenderStats()), NOW) == "paused"


def test_every_reason_has_words_of_its_own() -> None:
    reasons = set(jobs.WaitReason.values()) - {jobs.WAIT_REASON_UNSPECIFIED}
    words = {why(sender(1, reason), NOW) for reason in reasons}
    assert len(words) == len(reasons)
    assert not any("being sent" in text for text in words)
