"""Parses templates and checks rows in worker processes, for a process that accepts batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Final, TypeVar

from cachetools import LRUCache
from prometheus_client import CollectorRegistry

from outbox_server.shared.errors import InvalidInput, ResourceExhausted, Unavailable, Violations
from outbox_server.shared.reading_turns import given_back
from outbox_server.shared.settings import Settings
from outbox_server.shared.templates.batch import BatchTemplate, check_sizes, longest_of
from outbox_server.shared.templates.checking import RowFailure
from outbox_server.shared.templates.head import NO_HEAD, HeadTexts
from outbox_server.shared.templates.plain import plain_source
from outbox_server.shared.templates.source import SourceSummary, TemplateSource
from outbox_server.shared.templates.worker import STEPS_BEFORE_ROWS, RowsRequest
from outbox_server.shared.templates.workers import TooCostlyError, WorkerLostError, WorkerPool

T = TypeVar("T")

_MODULE: Final = "outbox_server.shared.mail.worker"
# The maximum number of templates with mistakes that one error names.
_MOST_FAULTS: Final = 5
# The longest wait for a worker and its answer.
_PATIENCE: Final = timedelta(seconds=30)
_RETRY_AFTER: Final = timedelta(seconds=2)
# The CPU time that the rendering of one row may take on average, beyond the budgets below. A usual
# mail takes 0.1 ms.
_SECONDS_PER_ROW: Final = 0.02
# How many further budgets all rows of a batch may use together.
_SPARE_BUDGETS: Final = 3
# A job that renders rows ends after this time, so that other users' jobs do not wait for a whole
# batch.
_SECONDS_PER_JOB: Final = 0.1
# The maximum number of rows and characters of a job. They are sent again if the job ends before its
# last row.
_ROWS_PER_JOB: Final = 2_500
_CHARACTERS_PER_JOB: Final = 1024 * 1024
# A template with a shorter source is built in the event loop, which takes a millisecond.
_SHORT: Final = 4 * 1024
# The size of the templates and of the summaries that are kept, in characters, and what each needs
# besides its texts. A longer template is not kept.
_KEPT_CHARACTERS: Final = 8 * 1024 * 1024
_LEAST_KEPT: Final = 16 * 1024
_KEPT_TEMPLATE: Final = 64 * 1024


class TemplateParser:
    """Parses templates. One that only inserts columns is read at once, without a worker."""

    def __init__(self, settings: Settings, registry: CollectorRegistry | None = None) -> None:
        """Show the metrics of the workers in `registry`."""
        self._pool = WorkerPool(_MODULE, settings, registry)
        self._budget = settings.template_budget.total_seconds()
        # What workers found out about the templates that were used last, by field, text and length
        # of the longest template.
        self._summaries: LRUCache[tuple[str, str, int], tuple[SourceSummary, int]] = LRUCache(
            _KEPT_CHARACTERS, lambda kept: kept[1]
        )
        # The templates that `known` returned last. Only the event loop uses them.
        self._templates: LRUCache[tuple[object, ...], tuple[BatchTemplate, int]] = LRUCache(
            _KEPT_CHARACTERS, lambda kept: kept[1]
        )

    def known(
        self, subject: str | None, body: str | None, html: str | None, head: HeadTexts = NO_HEAD
    ) -> BatchTemplate | None:
        """Return the template if no worker is needed for that; None for any other.

        It is read in milliseconds. Its `render` is only for templates without Liquid.
        """
        key = subject, body, html, head
        kept = self._templates.get(key)
        if kept is not None:
            return kept[0]
        template = self._read_known(subject, body, html, head)
        if template is not None:
            # The text is counted for the key and for the parts of the template.
            size = 2 * sum(len(text or "") for text in (subject, body, html))
            size += 2 * head.characters
            self._templates[key] = template, _LEAST_KEPT + size
        return template

    def _read_known(
        self, subject: str | None, body: str | None, html: str | None, head: HeadTexts
    ) -> BatchTemplate | None:
        longest = longest_of(subject, body, html, head)
        if longest > _KEPT_TEMPLATE:
            return None
        texts = {"subject": subject, "body": body, "html": html}
        sources: dict[str, TemplateSource] = {}
        for field, text in (texts | head.sources()).items():
            if text is None:
                continue
            summary = plain_source(field, text)
            if summary is None:
                kept = self._summaries.get((field, text, longest))
                if kept is None:
                    return None
                summary = kept[0]
            sources[field] = TemplateSource(summary)
        try:
            return BatchTemplate(
                **{field: sources.get(field) for field in texts},
                head=head.compiled(lambda field, _: sources[field]),
            )
        except InvalidInput:  # which `parse` reports
            return None

    async def close(self) -> None:
        """End the worker processes."""
        await self._pool.close()

    async def parse(
        self,
        user: str,
        subject: str | None,
        body: str | None,
        html: str | None,
        head: HeadTexts = NO_HEAD,
    ) -> RemoteTemplate:
        """Return the template of a batch of a user.

        Its `renderer` may be used in any thread but that of the running event loop. Its `render` is
        only for templates without Liquid.

        Raises:
            InvalidInput: as `BatchTemplate.compile`; TEMPLATE_TOO_COSTLY.
            ResourceExhausted: TOO_MANY_CALLS.
            Unavailable: TEMPLATE_WORKER_UNAVAILABLE.
        """
        longest = longest_of(subject, body, html, head)
        spent = 0.0
        texts = check_sizes(subject, body, html)
        summaries: dict[str, object] = {}
        wrong = Violations()
        faults = 0
        for field, text in (texts | head.sources()).items():
            plain = None if text is None else plain_source(field, text)
            if text is None or plain is not None:
                summaries[field] = plain
            elif (kept := self._summaries.get((field, text, longest))) is not None:
                summaries[field] = kept[0]
            else:
                try:
                    summaries[field], cpu = await self.run(
                        user, field, "parse", field, text, longest, decode=_anything
                    )
                except InvalidInput as error:
                    # The next templates are tried too. What each costs has a limit of its own.
                    with wrong:
                        raise
                    faults += 1
                    if error.reason != "TEMPLATE_INVALID" or faults == _MOST_FAULTS:
                        break
                    continue
                spent += cpu
                self._keep(field, text, longest, summaries[field])
                # A dispatcher parses all of them for its first mail.
                if spent > self._budget:
                    raise too_costly(field, "and those before it need too much processor time")
        wrong.raise_any()
        # A long template may have 50,000 insertions.
        template = (
            _template_of(summaries, head)
            if longest <= _SHORT
            else await asyncio.to_thread(_template_of, summaries, head)
        )
        template.renderer = RemoteRows(self, user, texts, longest, self._budget, head=head)
        return template

    def _keep(self, field: str, text: str, longest: int, wire: object) -> None:
        """Remember what a worker found out about a template that is not long."""
        if longest <= _KEPT_TEMPLATE:
            summary = SourceSummary.from_wire(wire)
            size = len(text) + _size_of(summary)
            if size <= 2 * _KEPT_TEMPLATE:
                self._summaries[field, text, longest] = summary, _LEAST_KEPT + size

    async def run(
        self, user: str, field: str, *job: object, decode: Callable[[object], T]
    ) -> tuple[T, float]:
        """Do a job about one field. Return its result, and the seconds of CPU that it took.

        Raises:
            RenderError, InvalidInput, ResourceExhausted, Unavailable: see `parse`.
        """
        try:
            return await self.try_to_run(user, *job, decode=decode)
        except TooCostlyError as error:
            raise too_costly(field, str(error)) from None

    async def try_to_run(
        self, user: str, *job: object, decode: Callable[[object], T]
    ) -> tuple[T, float]:
        """Do a job like `run`.

        Raises:
            TooCostlyError: it needs too much CPU or memory.
            RenderError, InvalidInput, ResourceExhausted, Unavailable: see `parse`.
        """
        name, *arguments = job
        try:
            return await self._pool.run(
                user, str(name), *arguments, decode=decode, wait=_PATIENCE.total_seconds()
            )
        except TimeoutError:
            raise ResourceExhausted(
                "no worker for templates became free within "
                f"{_PATIENCE.total_seconds():g} s: other templates and rows are in progress; "
                "try again later",
                reason="TOO_MANY_CALLS",
                metadata={"what": "template workers", "limit_of": "server"},
                retry_after=_RETRY_AFTER,
            ) from None
        except WorkerLostError as error:
            raise Unavailable(
                f"the template cannot be parsed now ({error}); try again later",
                reason="TEMPLATE_WORKER_UNAVAILABLE",
            ) from None


def _size_of(summary: SourceSummary) -> int:
    """Return the approximate size of a summary in characters."""
    parts = summary.parts or ()
    texts = (*summary.names, *summary.required, summary.static or "")
    return sum(map(len, texts)) + sum(len(each) if isinstance(each, str) else 64 for each in parts)


def _anything(value: object) -> object:
    return value


class RemoteTemplate(BatchTemplate):
    """A template whose Liquid only worker processes can render. They do it by `renderer`."""

    renderer: RemoteRows


def _template_of(summaries: Mapping[str, object], head: HeadTexts) -> RemoteTemplate:
    """Return a template from the summaries of its fields; some may still be encoded by a worker."""
    sources: dict[str, TemplateSource] = {}
    for field, value in summaries.items():
        if value is not None:
            summary = value if isinstance(value, SourceSummary) else SourceSummary.from_wire(value)
            sources[field] = TemplateSource(summary)
    return RemoteTemplate(
        **{field: sources.get(field) for field in ("subject", "body", "html")},
        head=head.compiled(lambda field, _: sources[field]),
    )


def too_costly(field: str, why: str) -> InvalidInput:
    """Return the error of a template that needs too much CPU or memory."""
    return InvalidInput.field(
        field, f"the template {why}; make it simpler", reason="TEMPLATE_TOO_COSTLY"
    )


class RemoteRows:
    """Renders the rows of a batch in workers, for a thread that reads them.

    All rows of a batch share an allowance, so that no batch keeps its thread for hours. Each job
    takes a fraction of a second, so that users take turns.
    """

    def __init__(
        self,
        parser: TemplateParser,
        user: str,
        sources: Mapping[str, str | None],
        longest: int,
        budget: float,
        *,
        head: HeadTexts = NO_HEAD,
    ) -> None:
        self._head = head
        self._parser = parser
        self._user = user
        self._sources = dict(sources)
        self._longest = longest
        self._budget = budget
        self._allowance = _SPARE_BUDGETS * budget
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: Future[tuple[tuple[int, dict[int, RowFailure]], float]] | None = None

    def close(self) -> None:
        """Make a thread that waits for a worker, now or later, fail."""
        with self._lock:
            self._closed = True
            if self._waiting is not None:
                self._waiting.cancel()

    def failures(
        self, names: Sequence[str], rows: Sequence[str | None], max_bytes: int
    ) -> dict[int, RowFailure]:
        """Render rows. Return the failures by the index of the row.

        Raises:
            InvalidInput: TEMPLATE_TOO_COSTLY: the rows need too much CPU on average.
            ResourceExhausted, Unavailable: see `TemplateParser.parse`.
            concurrent.futures.CancelledError: `close` was called.
        """
        found: dict[int, RowFailure] = {}
        start = 0
        # A row that is too costly ends its job without a result. Then the rows before it are sent
        # again, and it is left out.
        end = len(rows)
        while start < len(rows):
            if start in found:
                start += 1
                continue
            if start >= end:
                end = len(rows)
            some = _first_rows(rows[start:end])
            try:
                (done, failures), cpu = self._run(names, some, max_bytes)
            except TooCostlyError as error:
                self._spend(self._budget)
                culprit = error.step - 1 - STEPS_BEFORE_ROWS
                if not 0 <= culprit < len(some):
                    if len(some) > 1:
                        # The memory or the parsing was the cause, so one row is tried alone.
                        end = start + 1
                        continue
                    culprit = 0
                end = start + culprit
                found[end] = RowFailure(
                    "", "TEMPLATE_TOO_COSTLY", f"rendering the mail of this row {error}"
                )
                continue
            self._spend(cpu - _SECONDS_PER_ROW * done)
            found |= {start + index: failure for index, failure in failures.items()}
            start += done
        return found

    def _run(
        self, names: Sequence[str], rows: Sequence[str | None], max_bytes: int
    ) -> tuple[tuple[int, dict[int, RowFailure]], float]:
        request = RowsRequest(
            self._sources, self._longest, names, rows, max_bytes, _SECONDS_PER_JOB, self._head
        )
        checking = self._parser.try_to_run(self._user, "check", *request, decode=_checked)
        with self._lock:
            # If `close` was called before, it had nothing to cancel.
            waiting = asyncio.run_coroutine_threadsafe(checking, self._loop)
            self._waiting = waiting
            if self._closed:
                waiting.cancel()
        with given_back():
            return waiting.result()

    def _spend(self, seconds: float) -> None:
        self._allowance -= seconds
        if self._allowance < 0:
            fields = self._sources | self._head.sources()
            field = next(field for field, source in fields.items() if source is not None)
            raise too_costly(
                f"options.{field}", "needs too much processor time for the rows of this batch"
            )


def _first_rows(rows: Sequence[str | None]) -> Sequence[str | None]:
    """Return as many rows as one job may have, and at least one."""
    characters = 0
    for count, row in enumerate(rows[:_ROWS_PER_JOB]):
        characters += len(row or "")
        if characters > _CHARACTERS_PER_JOB:
            return rows[: max(count, 1)]
    return rows[:_ROWS_PER_JOB]


def _checked(value: object) -> tuple[int, dict[int, RowFailure]]:
    """Return how many rows were rendered, and the failures by the index of the row.

    Raises:
        ValueError: a worker replied something else.
    """
    match value:
        case [int(done), list(found)] if done > 0:
            return done, dict(map(_failure, found))
    raise ValueError("not a result of rows")


def _failure(value: object) -> tuple[int, RowFailure]:
    match value:
        case [int(index), str(column), str(reason), str(message)]:
            return index, RowFailure(column, reason, message)
    raise ValueError("not a failure of a row")
