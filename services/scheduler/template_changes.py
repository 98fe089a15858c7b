"""Checks that new templates and headers of a batch fit its rows that may still be sent.

Most templates only insert columns that each row has: then the size of the longest row decides.
Otherwise the rows are read in parts, and those for which nothing proves that they can be rendered
are rendered in worker processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage import unsent_rows as storage
from outbox_server.services.scheduler.storage.unsent_rows import StoredTemplates, UnsentRow
from outbox_server.shared import bounds
from outbox_server.shared.errors import FailedPrecondition, InvalidInput
from outbox_server.shared.intake.batch_options import (
    check_header_names,
    check_no_nul,
    under_options,
)
from outbox_server.shared.templates.batch import RenderError, decode_variables, missing_column
from outbox_server.shared.templates.checking import RowFailure, is_proven
from outbox_server.shared.templates.head import NO_HEAD, HeadTexts
from outbox_server.shared.templates.remote import RemoteTemplate, TemplateParser

# Names and templates.
Headers: TypeAlias = tuple[tuple[str, str], ...]

_AT_ONCE: Final = 2_500
# The maximum number of bytes that one byte of a row can become in a mail, by escaping and encoding.
_MOST_GROWTH: Final = 24


class TemplateChanges:
    """Checks new templates. It stores nothing."""

    def __init__(
        self, engine: AsyncEngine, templates: TemplateParser, *, max_message_bytes: int
    ) -> None:
        """`max_message_bytes` is OUTBOX_MAX_MESSAGE_BYTES."""
        self._engine = engine
        self._templates = templates
        self._max_bytes = max_message_bytes

    async def check(
        self,
        batch_id: int,
        stored: StoredTemplates,
        new: Mapping[str, str | None],
        headers: Headers | None,
    ) -> None:
        """Check the new texts of `subject`, `body` and `html`; those not in `new` stay.

        None for `headers` means that they stay, too.

        Raises:
            InvalidInput: a template or a header is wrong, or one needs a column that the rows
                do not have (COLUMN_MISSING).
            FailedPrecondition: ROWS_NOT_RENDERABLE, BATCH_TOO_LARGE_TO_CHECK.
            ResourceExhausted, Unavailable: see `TemplateParser.parse`.
        """
        texts = {"subject": stored.subject, "body": stored.body, "html": stored.html}
        _check_nul(new)
        # Headers that stay fit all rows, and need not be tried again.
        head = NO_HEAD if headers is None else stored.head._replace(headers=_checked(headers))
        try:
            template = await self._parse(stored.user_id, {**texts, **new}, head)
            before = await self._parse(stored.user_id, texts, NO_HEAD)
        except InvalidInput as error:
            raise under_options(error, "batch") from None
        _check_columns(template, stored.variable_names)
        same_subject = texts["subject"] == new.get("subject", texts["subject"])
        if _is_uniform(template, before, same_subject=same_subject):
            async with self._engine.connect() as connection:
                longest = await storage.longest_row(connection, batch_id)
            if longest * _MOST_GROWTH * template.most_uses + _size(template) <= self._max_bytes:
                return
        await self._check_rows(batch_id, template, stored.variable_names)

    async def _parse(
        self, user: str, texts: Mapping[str, str | None], head: HeadTexts
    ) -> RemoteTemplate:
        return await self._templates.parse(
            user, texts["subject"], texts["body"], texts["html"], head
        )

    async def _check_rows(
        self, batch_id: int, template: RemoteTemplate, names: Sequence[str]
    ) -> None:
        most = bounds.MAX_CHECKED_JOBS
        async with self._engine.connect() as connection:
            if await storage.count_unsent(connection, batch_id, most + 1) > most:
                raise FailedPrecondition(
                    f"these templates must be tried with each unsent mail, and this batch has more "
                    f"than {most:,}; use templates that only insert columns which the present ones "
                    "need, or cancel the batch and schedule it again",
                    reason="BATCH_TOO_LARGE_TO_CHECK",
                    metadata={"most": str(most)},
                )
        found: list[tuple[UnsentRow, RowFailure]] = []
        after = 0
        try:
            while len(found) < bounds.MAX_SHOWN_FAILURES:
                async with self._engine.connect() as connection:
                    rows = await storage.read_unsent(connection, batch_id, after, _AT_ONCE)
                if not rows:
                    break
                after = rows[-1].job_id
                check = asyncio.to_thread(_failures, template, names, rows, self._max_bytes)
                failures = await check
                found += [(rows[index], failures[index]) for index in sorted(failures)]
        except InvalidInput as error:
            # TEMPLATE_TOO_COSTLY names a field of the options of a batch.
            raise InvalidInput(
                error.message.replace("options.", "batch."), reason=error.reason
            ) from None
        finally:
            template.renderer.close()
        if found:
            raise _refused(found[: bounds.MAX_SHOWN_FAILURES])


def _check_nul(new: Mapping[str, str | None]) -> None:
    for name, text in new.items():
        check_no_nul(f"batch.{name}", text or "")


def _checked(headers: Headers) -> Headers:
    check_header_names(headers, "batch")
    for place, (_, text) in enumerate(headers):
        # PostgreSQL cannot store it. Any other control character is found in the rendered value.
        if "\0" in text:
            raise InvalidInput.field(
                f"batch.headers[{place}].value", "must not contain a NUL", reason="HEADER_INVALID"
            )
    return headers


def _check_columns(template: RemoteTemplate, names: Sequence[str]) -> None:
    """Check that the rows have the columns that the template needs.

    Only the columns that the templates of the accepted batch used are stored.
    """
    for name in sorted(template.required.difference(names)):
        what = missing_column(name, names)
        if name == "subject" and template.subject_from_row:
            what = "the rows have no column `subject`, so the batch needs a subject"
        raise InvalidInput.field(
            "batch.subject" if name in template.subject_names else "batch",
            f"{what}; only columns that the templates used when the batch was accepted are stored"
            f" ({', '.join(names[:20]) or 'none'})",
            reason="COLUMN_MISSING",
            metadata={"column": name[:100]},
        )
    if template.content_from_row and not {"body", "html"} & set(names):
        raise InvalidInput.field(
            "batch.body", "must be set, unless `html` is", reason="COLUMN_MISSING"
        )


def _is_uniform(template: RemoteTemplate, before: RemoteTemplate, *, same_subject: bool) -> bool:
    """Return whether it fits every row that the previous template fits, except for the size."""
    return (
        not template.may_fail
        and not template.checks_head
        and not template.content_from_row
        and template.required <= before.required
        and (same_subject or not template.subject_names)
    )


def _size(template: RemoteTemplate) -> int:
    return sum(source.own_bytes for source in template.plain_sources)


def _failures(
    template: RemoteTemplate, names: Sequence[str], rows: Sequence[UnsentRow], most: int
) -> dict[int, RowFailure]:
    """Return the failures by the index of the row. It runs in a thread."""
    found: dict[int, RowFailure] = {}
    doubtful = []
    for index, row in enumerate(rows):
        failure = _plain_failure(template, names, row.variables, most)
        if failure is not None:
            found[index] = failure
        elif template.may_fail and not is_proven(template, names, row.variables, most):
            doubtful.append(index)
    if doubtful:
        values = [rows[index].variables for index in doubtful]
        failures = template.renderer.failures(names, values, most)
        found |= {doubtful[place]: failure for place, failure in failures.items()}
    return found


def _plain_failure(
    template: RemoteTemplate, names: Sequence[str], variables: str | None, most: int
) -> RowFailure | None:
    values = decode_variables(names, variables)
    for name in sorted(template.required - values.keys()):
        return RowFailure(name, "COLUMN_MISSING", missing_column(name, values))
    if not template.subject_is_liquid:
        try:
            template.render_subject(values)
        except RenderError as error:
            return RowFailure("subject", error.reason, error.message)
    if template.checks_head:
        try:
            template.render_head(values)
        except RenderError as error:
            return RowFailure(error.column, error.reason, error.message)
    if template.content_from_row and not (values.get("body") or values.get("html")):
        return RowFailure("", "NO_CONTENT", "the row has neither `body` nor `html`")
    if template.least_size(values) > most:
        return RowFailure("", "MESSAGE_TOO_LARGE", "the mail would be larger than the limit")
    return None


def _refused(found: Sequence[tuple[UnsentRow, RowFailure]]) -> FailedPrecondition:
    shown = [
        f"row {row.row_number} (job {row.job_id}): {failure.reason}, {failure.message[:200]}"
        for row, failure in found
    ]
    return FailedPrecondition(
        f"the new templates do not fit these rows, of which at most {bounds.MAX_SHOWN_FAILURES} "
        "are named; nothing was changed. " + "; ".join(shown),
        reason="ROWS_NOT_RENDERABLE",
        metadata={"email_job_ids": ",".join(str(row.job_id) for row, _ in found)},
    )
