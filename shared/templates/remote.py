"""Parses the templates of a batch in worker processes, for a process that accepts batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry

from outbox_server.shared.errors import InvalidInput, ResourceExhausted, Unavailable
from outbox_server.shared.settings import Settings
from outbox_server.shared.templates.batch import BatchTemplate, check_sizes, longest_of
from outbox_server.shared.templates.plain import plain_source
from outbox_server.shared.templates.source import LiquidText, Room, SourceSummary, TemplateSource
from outbox_server.shared.templates.workers import TooCostlyError, WorkerLostError, WorkerPool

T = TypeVar("T")

_MODULE: Final = "outbox_server.shared.templates.worker"
# The longest wait for a worker and its answer.
_PATIENCE: Final = timedelta(seconds=30)
# The CPU time that the check of one row's subject may take on average, after the first second. A
# usual subject takes 0.1 ms.
_SECONDS_PER_SUBJECT: Final = 0.002
# The template of a shorter source is put together in the event loop, which takes a millisecond.
_SHORT: Final = 4 * 1024
# The path of the subject in a request, for errors that a row shows.
_SUBJECT: Final = "options.subject"


class TemplateParser:
    """Parses templates. One that only inserts columns is read at once, without a worker."""

    def __init__(self, settings: Settings, registry: CollectorRegistry | None = None) -> None:
        """Show the metrics of the workers in `registry`."""
        self._pool = WorkerPool(_MODULE, settings, registry)
        self._budget = settings.template_budget.total_seconds()

    async def close(self) -> None:
        """End the worker processes."""
        await self._pool.close()

    async def parse(
        self, user: str, subject: str | None, body: str | None, html: str | None
    ) -> BatchTemplate:
        """Return the template of a batch of a user.

        Its `render_subject` may be called in any thread but that of the running event loop. Its
        `render` is only for templates without Liquid.

        Raises:
            InvalidInput: as `BatchTemplate.compile`; TEMPLATE_TOO_COSTLY.
            ResourceExhausted: TOO_MANY_CALLS.
            Unavailable: TEMPLATE_WORKER_UNAVAILABLE.
        """
        longest = longest_of(subject, body, html)
        spent = 0.0
        texts = check_sizes(subject, body, html)
        summaries: dict[str, object] = {}
        liquid: LiquidText | None = None
        for field, text in texts.items():
            plain = None if text is None else plain_source(field, text)
            if text is None or plain is not None:
                summaries[field] = plain
            else:
                summaries[field], cpu = await self.run(
                    user, field, "parse", field, text, longest, decode=_anything
                )
                spent += cpu
                # A dispatcher parses all of them for its first mail.
                if spent > self._budget:
                    raise too_costly(field, "and those before it need too much processor time")
                if field == "subject":
                    liquid = _SubjectInWorker(self, user, text, longest, self._budget)
        if longest <= _SHORT:
            return _template_of(summaries, liquid)
        # A long template may have 50,000 insertions.
        return await asyncio.to_thread(_template_of, summaries, liquid)

    async def run(
        self, user: str, field: str, *job: object, decode: Callable[[object], T]
    ) -> tuple[T, float]:
        """Do a job about one field. Return its result, and the seconds of CPU that it took.

        Raises:
            RenderError, InvalidInput, ResourceExhausted, Unavailable: see `parse`.
        """
        name, *arguments = job
        try:
            return await self._pool.run(
                user, str(name), *arguments, decode=decode, wait=_PATIENCE.total_seconds()
            )
        except TooCostlyError as error:
            raise too_costly(field, str(error)) from None
        except TimeoutError:
            raise ResourceExhausted(
                "other templates of this user are still being parsed; try again later",
                reason="TOO_MANY_CALLS",
            ) from None
        except WorkerLostError as error:
            raise Unavailable(
                f"the template cannot be parsed now ({error}); try again later",
                reason="TEMPLATE_WORKER_UNAVAILABLE",
            ) from None


def _anything(value: object) -> object:
    return value


def _template_of(summaries: Mapping[str, object], subject: LiquidText | None) -> BatchTemplate:
    """Return a template by the summaries of its fields, of which some are as a worker sent them."""
    sources: dict[str, TemplateSource | None] = {}
    for field, value in summaries.items():
        if value is None:
            sources[field] = None
            continue
        summary = value if isinstance(value, SourceSummary) else SourceSummary.from_wire(value)
        sources[field] = TemplateSource(summary, subject if field == "subject" else None)
    return BatchTemplate(**sources)


def too_costly(field: str, why: str) -> InvalidInput:
    """Return the error of a template that needs too much CPU or memory."""
    return InvalidInput.field(
        field, f"the template {why}; make it simpler", reason="TEMPLATE_TOO_COSTLY"
    )


class _SubjectInWorker:
    """Renders a Liquid subject in a worker, for a thread that checks the rows of a batch.

    All checks of a batch share an allowance, so that no batch keeps its thread for hours.
    """

    def __init__(
        self, parser: TemplateParser, user: str, source: str, longest: int, allowance: float
    ) -> None:
        self._parser = parser
        self._user = user
        self._source = source
        self._longest = longest
        self._allowance = allowance
        self._loop = asyncio.get_running_loop()

    def __call__(self, values: Mapping[str, str], room: Room) -> str:
        rendering = self._parser.run(
            self._user,
            _SUBJECT,
            *("render", "subject", self._source, self._longest, dict(values), room.left),
            decode=_text,
        )
        text, cpu = asyncio.run_coroutine_threadsafe(rendering, self._loop).result()
        self._allowance += _SECONDS_PER_SUBJECT - cpu
        if self._allowance < 0:
            raise too_costly(_SUBJECT, "needs too much processor time for the rows of this batch")
        return text


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("not a text")
