"""Turns a marked job into an envelope and an endpoint; what a batch shares is built once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from services.dispatcher.message import MessageBuilder, MessageError
from services.dispatcher.slots import Route
from services.dispatcher.smtp import Envelope
from services.dispatcher.storage import BatchContent, MarkedJob
from shared.errors import InvalidInput, OutboxError
from shared.message_ids import message_id_for
from shared.secrets import SecretBox
from shared.settings import Settings
from shared.smtp.endpoint import Endpoint, relay_of, resolve_endpoint
from shared.templates import BatchTemplate, RenderError, decode_variables

# The number of batches whose parsed templates are kept, unless the concurrency is higher.
_KEPT_BATCHES = 500
# The route of jobs for which no mail can be built. They use no server, but they take their turn.
NO_ROUTE = Route(("", 0), "")


class CompositionError(Exception):
    """No mail can be built for this job, now or later; the text says why."""


@dataclass(frozen=True, slots=True)
class _BatchMail:
    content: BatchContent
    endpoint: Endpoint
    route: Route
    builder: MessageBuilder


ReadBatches = Callable[[Sequence[int]], Awaitable[dict[int, BatchContent]]]


class Composer:
    """Builds mails; reads each batch once, and again after its sender has changed."""

    def __init__(
        self, settings: Settings, secrets: SecretBox, read: ReadBatches, installation_id: str
    ) -> None:
        # An invalid OUTBOX_SMTP_URL stops the start of the dispatcher.
        relay_of(settings.smtp_url, plaintext=settings.plaintext)
        self._settings = settings
        self._secrets = secrets
        self._read = read
        self._kept = max(_KEPT_BATCHES, settings.dispatcher_concurrency)
        self._installation_id = installation_id
        self._batches: OrderedDict[int, _BatchMail | CompositionError] = OrderedDict()
        self._revisions: dict[int, int] = {}

    async def prepare(self, jobs: Iterable[MarkedJob]) -> None:
        """Make sure that the batches of these jobs are known, with their senders as of now."""
        revisions = {job.batch_id: job.sender_revision for job in jobs}
        missing = sorted(
            batch_id
            for batch_id, revision in revisions.items()
            if self._revisions.get(batch_id, 0) < revision
        )
        if missing:
            for batch_id, content in (await self._read(missing)).items():
                # Two groups may read at once, and the older reading may be the later one.
                if content.sender_revision > self._revisions.get(batch_id, 0):
                    self._batches[batch_id] = self._batch_mail(content)
                    self._revisions[batch_id] = content.sender_revision
        # Those of this group are the last to be forgotten: their mails are built next.
        for batch_id in revisions:
            if batch_id in self._batches:
                self._batches.move_to_end(batch_id)
        while len(self._batches) > self._kept:
            forgotten, _ = self._batches.popitem(last=False)
            del self._revisions[forgotten]

    def _batch_mail(self, content: BatchContent) -> _BatchMail | CompositionError:
        try:
            template = BatchTemplate.compile(content.subject, content.body, content.html)
            builder = MessageBuilder(
                content.email,
                content.display_name,
                template,
                max_bytes=self._settings.max_message_bytes,
            )
            endpoint = resolve_endpoint(content.endpoint, self._settings, self._secrets)
            route = Route((endpoint.host, endpoint.port), content.user_id)
            return _BatchMail(content, endpoint, route, builder)
        except MessageError as error:
            return CompositionError(f"{error.reason}: {error.message}")
        except (InvalidInput, OutboxError) as error:
            return CompositionError(str(error))

    def route_of(self, job: MarkedJob) -> Route:
        """Return the route of a job's mail, or `NO_ROUTE` if no mail can be built.

        `prepare` must have been called for the job.
        """
        batch = self._batches.get(job.batch_id)
        return batch.route if isinstance(batch, _BatchMail) else NO_ROUTE

    def compose(self, job: MarkedJob) -> tuple[Endpoint, Envelope]:
        """Return where the mail goes and what it is; `prepare` came before.

        Raises:
            CompositionError: no mail can be built.
        """
        batch = self._batches.get(job.batch_id)
        if batch is None:
            raise CompositionError(f"batch {job.batch_id} is gone")
        if isinstance(batch, CompositionError):
            raise batch
        content = batch.content
        values = decode_variables(content.variable_names, job.variables)
        try:
            message = batch.builder.build(
                job.recipient,
                values,
                message_id_for(job.job.job_id, content.message_id_address, self._installation_id),
                datetime.now(UTC),
            )
        except (MessageError, RenderError) as error:
            raise CompositionError(f"{error.reason}: {error.message}") from None
        envelope = Envelope(
            batch.builder.sender, message.recipient, message.data, message.needs_smtputf8
        )
        return batch.endpoint, envelope
