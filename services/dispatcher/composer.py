"""Builds the mail of a marked job. The parts that a batch shares are built once.

A short mail whose template only inserts columns is built at once. Any other mail is built in a
worker process, because that may take long, and the event loop has other mails to send.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cachetools import LRUCache

from outbox_server.services.dispatcher.prepared import MOST_PREPARED, PreparedBatches
from outbox_server.services.dispatcher.shares import Route
from outbox_server.services.dispatcher.smtp import Envelope
from outbox_server.services.dispatcher.storage import MarkedJob, UpcomingBatch
from outbox_server.shared.database.message_ids import message_id_for
from outbox_server.shared.errors import InvalidInput, OutboxError
from outbox_server.shared.mail.content import BatchContent, request_of
from outbox_server.shared.mail.message import (
    Message,
    MessageBuilder,
    MessageError,
    wire_address,
)
from outbox_server.shared.mail.worker import message_of
from outbox_server.shared.queue.circuit_keys import relay_key, user_key
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.endpoint import Endpoint, relay_of, resolve_endpoint
from outbox_server.shared.templates.batch import BatchTemplate, RenderError, decode_variables
from outbox_server.shared.templates.workers import TooCostlyError, WorkerPool

# The size of the batches that are kept, in characters, unless the concurrency needs more.
_KEPT_CHARACTERS = 64 * 1024 * 1024
# What a batch needs besides its texts, and the most that it needs with three templates of 256 KiB,
# 21 of headers of 4 KiB, and 1,000 names of 256 characters.
_LEAST_OF_A_BATCH = 16 * 1024
_MOST_OF_A_BATCH = 1408 * 1024
# The revisions of a batch that is not known.
_UNKNOWN = (0, 0)
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
    # What builds a mail in this process, for templates that only insert columns.
    template: BatchTemplate | None
    builder: MessageBuilder | None


@dataclass(frozen=True, slots=True)
class _KnownBatch:
    revisions: tuple[int, int]
    mail: _BatchMail | CompositionError

    @property
    def size(self) -> int:
        """The approximate size in characters."""
        if isinstance(self.mail, CompositionError):
            return _LEAST_OF_A_BATCH
        content = self.mail.content
        ca = content.endpoint.ca
        texts = (content.subject, content.body, content.html, ca, *content.variable_names)
        size = _LEAST_OF_A_BATCH + sum(len(text or "") for text in texts) + content.head.characters
        return min(size, _MOST_OF_A_BATCH)


ReadBatches = Callable[[Sequence[int]], Awaitable[dict[int, BatchContent]]]


class Composer:
    """Builds mails. Reads each batch once, and again after it or its sender has changed."""

    def __init__(
        self,
        settings: Settings,
        secrets: SecretBox,
        read: ReadBatches,
        read_installation_id: Callable[[], Awaitable[str]],
        workers: WorkerPool,
    ) -> None:
        # Raises an error if OUTBOX_SMTP_URL is invalid, so that the dispatcher does not start.
        relay_of(settings.smtp_url, plaintext=settings.plaintext)
        self._settings = settings
        self._secrets = secrets
        self._read = read
        self._read_installation_id = read_installation_id
        self._workers = workers
        self._installation_id = ""
        # Held while a mail is built in this process.
        self._turn = asyncio.Lock()
        # Ends the building of a mail in a worker.
        self._building: set[asyncio.Timeout] = set()
        self._closed = False
        in_use = settings.dispatcher_concurrency * _MOST_OF_A_BATCH
        self._batches: LRUCache[int, _KnownBatch] = LRUCache(
            max(_KEPT_CHARACTERS, in_use + MOST_PREPARED), lambda batch: batch.size
        )
        self._prepared = PreparedBatches(lambda batch_id: self._batches.pop(batch_id, None))

    async def prepare(self, jobs: Iterable[MarkedJob]) -> None:
        """Read the batches of these jobs, except those that are known in their present revision."""
        if not self._installation_id:
            self._installation_id = await self._read_installation_id()
        revisions: dict[int, tuple[int, int]] = {}
        for job in jobs:
            revisions[job.batch_id] = max(job.revisions, revisions.get(job.batch_id, _UNKNOWN))
        for batch_id in revisions:
            self._prepared.use(batch_id)
        # A read marks each batch as used, so the cache evicts none before its mails are built.
        known = {batch_id: self._known_revisions(batch_id) for batch_id in revisions}
        missing = sorted(
            batch_id for batch_id, revision in revisions.items() if known[batch_id] != revision
        )
        found = await self._read(missing) if missing else {}
        for batch_id, content in found.items():
            # Two groups may read at once, and the older data may arrive last. If nothing arrived
            # meanwhile, a lower revision means that a failover has lost the change.
            present = self._known_revisions(batch_id)
            if content.revisions > present or known[batch_id] == present:
                self._batches[batch_id] = _KnownBatch(content.revisions, self._batch_mail(content))
        for batch_id in revisions:
            # A batch in use must not be forgotten, even if it was prepared ahead meanwhile.
            self._prepared.use(batch_id)

    async def prepare_ahead(self, batches: Mapping[int, UpcomingBatch]) -> None:
        """Read batches whose mail may be sent soon, unless they are known.

        `prepare` reads a batch again if it or its sender has changed when a job is marked. It also
        reads those that find no room here.
        """
        if not self._installation_id:
            self._installation_id = await self._read_installation_id()
        now = time.monotonic()
        self._prepared.expire(now)
        # The room is reserved before the read, so that no user can make the read long.
        missing = [
            batch_id
            for batch_id, each in batches.items()
            if batch_id not in self._batches
            and self._prepared.add(batch_id, each.user_id, _LEAST_OF_A_BATCH + each.size, now)
        ]
        contents = await self._read(missing) if missing else {}
        for batch_id, content in contents.items():
            # If a claim came meanwhile, `prepare` has read the batch, maybe in a later revision.
            if batch_id in self._prepared and batch_id not in self._batches:
                known = _KnownBatch(content.revisions, self._batch_mail(content))
                if self._prepared.add(batch_id, content.user_id, known.size, now):
                    self._batches[batch_id] = known
                    if isinstance(known.mail, _BatchMail) and known.mail.template is None:
                        self._workers.begin_start()
            # Let the event loop do other work between two batches.
            await asyncio.sleep(0)

    def _known_revisions(self, batch_id: int) -> tuple[int, int]:
        known = self._batches.get(batch_id)
        return _UNKNOWN if known is None else known.revisions

    def _mail_of(self, job: MarkedJob) -> _BatchMail | CompositionError | None:
        known = self._batches.get(job.batch_id)
        return None if known is None else known.mail

    def _batch_mail(self, content: BatchContent) -> _BatchMail | CompositionError:
        try:
            template = BatchTemplate.plain(
                content.subject, content.body, content.html, content.head
            )
            builder = None
            if template is not None:
                builder = MessageBuilder(
                    content.email,
                    content.display_name,
                    template,
                    max_bytes=self._settings.max_message_bytes,
                    test=content.test,
                )
            endpoint = resolve_endpoint(content.endpoint, self._settings, self._secrets)
            route = route_to(endpoint, content.user_id)
            return _BatchMail(content, endpoint, route, template, builder)
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

    def builds_here(self, job: MarkedJob) -> bool:
        """Return whether `compose` needs no worker process: the mail is short, or has an error."""
        mail = self._mail_of(job)
        return not isinstance(mail, _BatchMail) or _quick(mail, job) is not None

    async def compose(self, job: MarkedJob, wait: float) -> tuple[Endpoint, Envelope]:
        """Return the endpoint and the envelope of a job's mail.

        `prepare` must have been called for the job.

        Raises:
            CompositionError: no mail can be built.
            TimeoutError: no worker was free for `wait` seconds, the dispatcher stops, or the batch
                must be read again.
            WorkerLostError: the mail can be built later.
        """
        batch = self._mail_of(job)
        if batch is None:
            # Other batches took its place in the cache, or it was deleted with its jobs.
            raise TimeoutError
        if isinstance(batch, CompositionError):
            raise batch
        content = batch.content
        message_id = message_id_for(
            job.job.job_id, content.message_id_address, self._installation_id
        )
        try:
            if (builder := _quick(batch, job)) is not None:
                async with self._turn:
                    values = decode_variables(content.variable_names, job.variables)
                    now = datetime.now(UTC)
                    message = builder.build(job.recipient, values, message_id, now)
                    # Let the event loop do other work between two mails.
                    await asyncio.sleep(0)
            else:
                message = await self._build_elsewhere(content, job, message_id, wait)
        except (MessageError, RenderError) as error:
            raise CompositionError(f"{error.reason}: {error.message}") from None
        except InvalidInput as error:
            raise CompositionError(str(error)) from None
        except TooCostlyError as error:
            raise CompositionError(f"TEMPLATE_TOO_COSTLY: building this mail {error}") from None
        envelope = Envelope(
            wire_address(content.email), message.recipient, message.data, message.needs_smtputf8
        )
        return batch.endpoint, envelope

    async def _build_elsewhere(
        self, content: BatchContent, job: MarkedJob, message_id: str, wait: float
    ) -> Message:
        request = request_of(
            content,
            recipient=job.recipient,
            variables=job.variables,
            message_id=message_id,
            max_bytes=self._settings.max_message_bytes,
        )
        async with asyncio.timeout(0 if self._closed else None) as limit:
            self._building.add(limit)
            try:
                message, _ = await self._workers.run(
                    content.user_id, "build", *request, decode=message_of, wait=wait
                )
            finally:
                self._building.discard(limit)
        return message

    def give_up_building(self) -> None:
        """Make `compose` raise TimeoutError for the mails that workers build, now and later."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for limit in self._building:
            if limit.when() is None:
                limit.reschedule(now)


def _quick(batch: _BatchMail, job: MarkedJob) -> MessageBuilder | None:
    """Return what builds the mail of a job in this process. None if a worker must build it."""
    if batch.template is None or not batch.template.is_quick(len(job.variables or "")):
        return None
    return batch.builder
