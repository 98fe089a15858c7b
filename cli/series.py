"""`outbox stats series`: shows QuerySenderSeries as a table, a plot or an SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from outbox.v1 import stats_service_pb2 as pb
from outbox.v1.stats_pb2 import SeriesPoint

from outbox_server.cli.client import Server, connection
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import (
    EndTime,
    User,
    duration_option,
    time_option,
    to_duration,
    to_timestamp,
)
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json,
    print_rows,
    stdout,
    to_document,
    value_at,
)
from outbox_server.cli.terminal import note

_COLUMNS: Final = (
    "start_time",
    "sent_count",
    "failed_count",
    "retried_count",
    "late_count",
    "lateness_p50",
    "lateness_p95",
    "lateness_p99",
)
_COUNTS: Final = ("sent", "failed", "retried", "late")
_COLORS: Final = {"sent": "green", "failed": "red", "retried": "orange", "late": "blue"}
_HEIGHT: Final = 20
_MAX_WIDTH: Final = 120


def series(
    sender_id: Annotated[
        str, typer.Argument(metavar="SENDER_ID", help="Id from `outbox senders list`.")
    ],
    *,
    start_time: Annotated[
        datetime | None,
        time_option("--start-time", "Start (default: a day before the end)."),
    ] = None,
    end_time: EndTime = None,
    bucket: Annotated[
        timedelta | None,
        duration_option(
            "--bucket", "Length of an interval: 1m to 24h, a divisor of a day (default: 1h)."
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw a chart in the terminal.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a chart to this SVG file.")
    ] = None,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show a sender's sent, failed, retried and late mails over time, with their lateness.

    $ outbox stats series $SENDER --bucket 5m --plot
    """
    request = pb.QuerySenderSeriesRequest(
        sender_id=sender_id,
        user_id=user,
        start_time=to_timestamp(start_time),
        end_time=to_timestamp(end_time),
        bucket=to_duration(bucket),
    )
    with connection("stats", server) as client:
        found = client.stats.QuerySenderSeries(request)
    if svg is not None:
        write_picture(svg, sender_id, found.points)
        note(f"wrote {svg}")
    if output is OutputFormat.JSON:
        print_json(to_document(found))
    elif plot:
        draw(sender_id, found.points)
    elif svg is None:
        print_rows(
            _COLUMNS, ([value_at(point, path) for path in _COLUMNS] for point in found.points)
        )


def _labels(points: Sequence[SeriesPoint]) -> list[str]:
    starts = [point.start_time.ToDatetime(UTC) for point in points]
    same_day = len({start.date() for start in starts}) == 1
    return [f"{start:%H:%M}" if same_day else f"{start:%m-%d %H:%M}" for start in starts]


def _values(points: Sequence[SeriesPoint]) -> dict[str, list[int]]:
    return {name: [getattr(point, f"{name}_count") for point in points] for name in _COUNTS}


def draw(sender_id: str, points: Sequence[SeriesPoint]) -> None:
    """Draw a series in the terminal."""
    # Imported here, as no other command needs it.
    import plotext

    places = list(range(len(points)))
    labels = _labels(points)
    plotext.clear_figure()
    plotext.plotsize(min(stdout().width, _MAX_WIDTH), _HEIGHT)
    plotext.theme("clear")
    for name, values in _values(points).items():
        if any(values):
            plotext.plot(places, values, label=name, color=_COLORS[name])
    every = max(1, len(points) // 8)
    plotext.xticks(places[::every], labels[::every])
    plotext.ylim(0)
    plotext.title(f"sender {sender_id}, mails by end time (UTC)")
    text: Any = plotext.build()
    console = stdout()
    console.file.write((text if console.is_terminal else plotext.uncolorize(text)) + "\n")


def write_picture(path: Path, sender_id: str, points: Sequence[SeriesPoint]) -> None:
    """Write a series as an SVG.

    Raises:
        CommandFailed: the file cannot be written.
    """
    import pygal

    # The picture loads no script from elsewhere.
    chart = pygal.Line(
        title=f"Sender {sender_id}: mails by end time (UTC)",
        js=[],
        x_label_rotation=40,
        show_minor_x_labels=False,
        x_labels_major_count=12,
        dots_size=2,
        range=(0, None),
    )
    chart.x_labels = _labels(points)
    for name, values in _values(points).items():
        chart.add(name, values)
    try:
        path.write_bytes(chart.render())
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}") from None
