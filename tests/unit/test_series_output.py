"""The plots of a series: in the terminal, and as a file."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from outbox.v1.stats_pb2 import SeriesPoint

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import to_timestamp
from outbox_server.cli.series import draw, write_picture

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
POINTS = [
    SeriesPoint(
        start_time=to_timestamp(NOON + n * timedelta(hours=1)),
        sent_count=10 * n,
        failed_count=n % 2,
    )
    for n in range(30)
]


def test_a_plot_has_its_lines_its_labels_and_no_colours_in_a_pipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw("7", POINTS)
    text = capsys.readouterr().out
    assert "sender 7" in text
    assert "sent" in text
    assert "failed" in text
    # Outcomes that never happened have no line.
    assert "retried" not in text
    # The labels for which there is room.
    assert len(re.findall(r"11-2[45] \d\d:00", text)) > 3
    assert "\x1b" not in text


def test_a_picture_is_self_contained(tmp_path: Path) -> None:
    file = tmp_path / "series.svg"
    write_picture(file, "7", POINTS)
    picture = ET.parse(file).getroot()
    assert picture.tag.endswith("svg")
    text = file.read_text()
    assert "<script" not in text.replace('<script type="text/javascript">window.pygal', "")
    assert "Sender 7" in text


def test_a_picture_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="No such file"):
        write_picture(tmp_path / "nowhere" / "series.svg", "7", POINTS)
