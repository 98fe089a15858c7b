"""Builds the mail of a marked job. The parts that a batch shares are built once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cachetools import LRUCache

from outbox_server.services.dispatcher.message import MessageBuilder, MessageError
from outbox_server.services.dispatcher.shares import Route
from outbox_server.services.dispatcher.smtp import Envelope
from outbox_server.services.dispatcher.storage import BatchContent, MarkedJob
from outbox_server.shared.database.message_ids import message_id_for
from outbox_server.shared.errors import InvalidInput, OutboxError
from outbox_server.shared.queue.circuit_keys import relay_key, user_key
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.endpoint import Endpoint, relay_of, resolve_endpoint
from outbox_server.shared.templates.batch import BatchTemplate, RenderError, decode_variables

# The number of batches whose parsed templates are kept, unless the concurrency is higher.
_KEPT_BATCHES = 500
# The route of jobs for which no mail can be built. They use no server, but they need a permit too.
NO_ROUTE = Route("", "")


def route_to(endpoint: Endpoint, user_id: str) -> Route:
    """Return the route of a user's mail to an endpoint."""
    return Route(
        endpoint=relay_key(user_id) if endpoint.operators else endpoint.circuit,
        user=user_key(user_id),
        server=f"{endpoint.host}:{endpoint.port}",
        relay=endpoint.operators,
    )


class CompositionError(Exception):
    """No mail can be built for this job, now or later. The text says why."""


@dataclass(frozen=True, slots=True)
class _BatchMail:
    content: BatchContent
    endpoint: Endpoint
    route: Route
    builder: MessageBuilder


@dataclass(frozen=True, slots=True)
class _KnownBatch:
    sender_revision: int
    mail: _BatchMail | CompositionError


ReadBatches = Callable[[Sequence[int]], Awaitable[dict[int, BatchContent]]]


class Composer:
    """Builds mails. Reads each batch once, and again after its sender has changed."""

    def __init__(
        self,
        settings: Settings,
        secrets: SecretBox,
        read: ReadBatches,
        read_installation_id: Callable[[], Awaitable[str]],
    ) -> None:
        # Raises an error if OUTBOX_SMTP_URL is invalid, so that the dispatcher does not start.
        relay_of(settings.smtp_url, plaintext=settings.plaintext)
        self._settings = settings
        self._secrets = secrets
        self._read = read
        self._read_installation_id = read_installation_id
        self._installation_id = ""
        self._batches: LRUCache[int, _KnownBatch] = LRUCache(
            max(_KEPT_BATCHES, settings.dispatcher_concurrency)
        )

    async def prepare(self, jobs: Iterable[MarkedJob]) -> None:
        """Read the batches of these jobs, unless they are known with the present senders."""
        if not self._installation_id:
            self._installation_id = await self._read_installation_id()
        revisions = {job.batch_id: job.sender_revision for job in jobs}
        # A read marks each batch as used, so the cache evicts none before its mails are built.
        missing = sorted(
            batch_id
            for batch_id, revision in revisions.items()
            if self._known_revision(batch_id) < revision
        )
        found = await self._read(missing) if missing else {}
        for batch_id, content in found.items():
            # Two groups may read at once, and the older data may arrive last.
            if content.sender_revision > self._known_revision(batch_id):
                self._batches[batch_id] = _KnownBatch(
                    content.sender_revision, self._batch_mail(content)
                )

    def _known_revision(self, batch_id: int) -> int:
        known = self._batches.get(batch_id)
        return 0 if known is None else known.sender_revision

    def _mail_of(self, job: MarkedJob) -> _BatchMail | CompositionError | None:
        known = self._batches.get(job.batch_id)
        return None if known is None else known.mail

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
            route = route_to(endpoint, content.user_id)
            return _BatchMail(content, endpoint, route, builder)
        except MessageError as error:
            return CompositionError(f"{error.reason}: {error.message}")
        except (InvalidInput, OutboxError) as error:
            return CompositionError(str(error))

    def route_of(self, job: MarkedJob) -> Route:
        """Return the route of a job's mail, or `NO_ROUTE` if no mail can be built.

        `prepare` must have been called for the job.
        """
        mail = self._mail_of(job)
        return mail.route if isinstance(mail, _BatchMail) else NO_ROUTE

    def trace_parent_of(self, job: MarkedJob) -> str | None:
        """Return the span of the call that brought the job's batch; None without a trace."""
        mail = self._mail_of(job)
        return mail.content.trace_parent if isinstance(mail, _BatchMail) else None

    def compose(self, job: MarkedJob) -> tuple[Endpoint, Envelope]:
        """Return the endpoint and the envelope of a job's mail.

        `prepare` must have been called for the job.

        Raises:
            CompositionError: no mail can be built.
        """
        batch = self._mail_of(job)
        if batch is None:
            raise CompositionError(f"batch {job.batch_id} does not exist")
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
