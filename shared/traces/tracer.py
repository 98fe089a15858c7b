"""Makes the spans of calls and sends, and exports them by OTLP.

The SDK reads its usual variables, such as OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES,
OTEL_BSP_MAX_QUEUE_SIZE and OTEL_EXPORTER_OTLP_HEADERS. It exports in a thread of its own, and drops
spans if its queue is full, so that a collector that is away delays nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Final

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.contextvars import bind_contextvars

from outbox_server.shared.bounds import MAX_METADATA_VALUE

# W3C's `traceparent`, version 00.
TRACE_PARENT_LENGTH: Final = 55
_HEADERS: Final = ("traceparent", "tracestate")
_CLOSE_LIMIT: Final = timedelta(seconds=5)
# Codes that are errors of the server, by OpenTelemetry's conventions for gRPC.
_SERVER_ERRORS: Final = frozenset(
    code.name
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
# The span of the call that the current task works for, as `traceparent`.
_current: ContextVar[str | None] = ContextVar("outbox_trace_parent", default=None)


class Tracer:
    """Makes the spans of one process."""

    def __init__(self, endpoint: str, service: str, *, server_texts: bool) -> None:
        """Export to `endpoint`. With `server_texts`, spans have replies of mail servers in full."""
        self.server_texts = server_texts
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: f"outbox-{service}"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("outbox")
        self._propagator = TraceContextTextMapPropagator()

    async def close(self) -> None:
        """Export the remaining spans, for at most a few seconds."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.force_flush(int(_CLOSE_LIMIT.total_seconds() * 1000))
            # If this takes too long, the loop may be closed by then.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        # The thread is a daemon, because a collector that does not answer must not delay the end of
        # the process.
        threading.Thread(target=flush, name="traces-flush", daemon=True).start()
        try:
            async with asyncio.timeout(_CLOSE_LIMIT.total_seconds()):
                await done.wait()
        except TimeoutError:
            return
        self._provider.shutdown()

    def begin_call(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> CallSpan:
        """Begin the span of a call, below the span that its metadata names.

        The log lines of the task have its `trace_id` from now on.
        """
        headers = {
            key: value
            for key, value in metadata
            if key in _HEADERS and isinstance(value, str) and len(value) <= MAX_METADATA_VALUE
        }
        service, _, name = method.removeprefix("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{name}",
            self._parent(headers),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        _current.set(_text_of(span))
        bind_contextvars(trace_id=_trace_id(span))
        return CallSpan(span)

    def current_parent(self) -> str | None:
        """Return the current call's span as `traceparent`; None if its trace is not sampled."""
        return _current.get()

    def begin_send(self, parent: str, ids: Mapping[str, int | str]) -> SendSpan | None:
        """Begin the span of a send, below the span of the call that accepted its batch.

        Return None if `parent` is not a `traceparent`.
        """
        context = self._parent({"traceparent": parent})
        if not trace.get_current_span(context).get_span_context().is_valid:
            return None
        span = self._tracer.start_span(
            "send",
            context,
            kind=SpanKind.CLIENT,
            attributes={f"outbox.{name}": value for name, value in ids.items()},
        )
        return SendSpan(span, server_texts=self.server_texts)

    def _parent(self, headers: Mapping[str, str]) -> Context:
        return self._propagator.extract(headers, Context())


class CallSpan:
    """The span of a call."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def end(self, code: str) -> None:
        """End it with the name of the call's status."""
        self._span.set_attribute("rpc.response.status_code", code)
        if code in _SERVER_ERRORS:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class SendSpan:
    """The span of a send."""

    def __init__(self, span: Span, *, server_texts: bool) -> None:
        self._span = span
        self._server_texts = server_texts
        # The same ids as in the log lines of the send.
        self.trace_id = _trace_id(span)

    def ended(
        self,
        outcome: str,
        *,
        server: str,
        smtp_code: int | None,
        enhanced_code: str | None,
        reply_class: str | None,
        reply: str | None,
        failed: bool,
    ) -> None:
        """End it with the reply of the mail server."""
        values = {
            "outbox.outcome": outcome,
            "server.address": server,
            "outbox.smtp.code": smtp_code,
            "outbox.smtp.enhanced_code": enhanced_code,
            "outbox.smtp.reply_class": reply_class,
            "outbox.smtp.reply": reply if self._server_texts else None,
        }
        for name, value in values.items():
            if value is not None:
                self._span.set_attribute(name, value)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def given_back(self) -> None:
        """End the span of a send that did not begin: the job returns to the queue."""
        self._span.set_attribute("outbox.given_back", True)
        self._span.end()


def _text_of(span: Span) -> str | None:
    found = span.get_span_context()
    if not (found.is_valid and found.trace_flags.sampled):
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def _trace_id(span: Span) -> str:
    return f"{span.get_span_context().trace_id:032x}"
