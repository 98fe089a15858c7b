"""Shows progress on stderr: bars on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from outbox_client import UploadProgress
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from outbox_server.cli.output import stderr
from outbox_server.cli.terminal import note

_LINE_EVERY_S: Final = 5.0


class UploadBar:
    """The progress bar of an upload, updated by the client."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.rows = 0
        self._progress = progress
        self._task = task

    def __call__(self, now: UploadProgress) -> None:
        """Show the progress of the upload."""
        self.rows = now.rows
        self._progress.update(
            self._task, completed=now.sent_bytes, total=now.total_bytes, rows=now.rows
        )


@contextmanager
def upload_progress(title: str) -> Iterator[UploadBar]:
    """Show how many bytes and rows of an upload have been read."""
    console = stderr()
    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[rows]} rows"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield UploadBar(progress, progress.add_task(title, total=None, rows=0))


class JobProgress:
    """Shows how many jobs of each batch have ended, by title."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        console = stderr()
        self._totals = dict(totals)
        self._plain = not console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=console,
            disable=self._plain,
        )
        self._tasks = {
            title: self._progress.add_task(title, total=total, remark="")
            for title, total in totals.items()
        }
        self._printed: dict[str, tuple[int, float]] = {}

    def update(self, title: str, ended: int, remark: str = "") -> None:
        """Show that `ended` jobs of a batch have ended, with a remark."""
        self._progress.update(self._tasks[title], completed=ended, remark=remark)
        if not self._plain:
            return
        now = time.monotonic()
        before, at = self._printed.get(title, (-1, 0.0))
        total = self._totals[title]
        if ended != before and (ended >= total or now - at >= _LINE_EVERY_S):
            self._printed[title] = (ended, now)
            note(f"{title}: {ended} of {total}{f', {remark}' if remark else ''}")

    def __enter__(self) -> Self:
        """Start the display."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the display, and leave its last state on the screen."""
        self._progress.stop()
