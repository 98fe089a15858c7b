"""Traces of two processes, collected by a real OTLP collector."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from outbox.v1 import batch_pb2, batch_service_pb2

from outbox_server.deploy.ports import free_port
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings
from outbox_server.shared.traces.endpoint import open_tracer
from tests import dispatchers
from tests.eventually import PATIENCE, eventually
from tests.otlp_collector import CollectedSpan, Collector, collector
from tests.scheduler_stack import Scheduler, options_for, running_scheduler
from tests.smtp_servers import Say, ScriptedServer

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = CALLER.split("-")[1:3]
UNSAMPLED = CALLER[:-2] + "00"
REFUSED = Say("550 5.1.1 <b@b.org>: User unknown")
SCHEDULE = "outbox.v1.BatchService/ScheduleBatch"
UPLOAD = "outbox.v1.BatchService/UploadBatch"


class Traced:
    """A scheduler and a dispatcher as processes, and the collector that both export to."""

    def __init__(
        self, collected: Collector, smtp: ScriptedServer, scheduler: Scheduler, log: Path
    ) -> None:
        self.collected = collected
        self.smtp = smtp
        self.scheduler = scheduler
        self._log = log

    def calls(self) -> list[dict[str, Any]]:
        return _lines_of(self._log, "call")

    def attempts(self) -> list[dict[str, Any]]:
        """Return the dispatcher's log lines of attempts that have ended."""
        return _lines_of(self._log.with_name("dispatcher"), "attempt_ended")

    async def schedule(
        self, *emails: str, traceparent: str | None = CALLER, **options: Any
    ) -> None:
        csv = "email\n" + "".join(f"{email}\n" for email in emails)
        await self.scheduler.batches.ScheduleBatch(
            batch_service_pb2.ScheduleBatchRequest(
                options=await self._options(**options), csv=csv.encode()
            ),
            metadata=() if traceparent is None else (("traceparent", traceparent),),
        )

    async def upload(self, *emails: str) -> None:
        request = batch_service_pb2.UploadBatchRequest
        csv = "email\n" + "".join(f"{email}\n" for email in emails)
        await self.scheduler.batches.UploadBatch(
            iter([request(options=await self._options()), request(chunk=csv.encode())]),
            metadata=(("traceparent", CALLER),),
        )

    async def _options(self, **options: Any) -> batch_pb2.BatchOptions:
        return options_for(await self.scheduler.sender(hourly_limit=1000), **options)

    async def two_sends(self) -> list[CollectedSpan]:
        await eventually(lambda: len(self.collected.named("send")) == 2)
        return self.collected.named("send")

    def parents(self) -> list[str | None]:
        return [row[0] for row in self.scheduler.rows("SELECT trace_parent FROM batches")]


def _lines_of(log: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def traced(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")

    @asynccontextmanager
    async def run(**changes: str) -> AsyncIterator[Traced]:
        async with collector() as collected, ScriptedServer() as smtp:
            usual = {
                "traces_endpoint": collected.address,
                "log_level": "info",
                "defer_backoff": "50ms",
            }
            given = usual | changes
            values = dispatchers.options(database_url, redis_url, smtp.url, **given)
            log = tmp_path / "scheduler"
            async with (
                dispatchers.process(values, log, "scheduler") as scheduler,
                dispatchers.process(values, tmp_path / "dispatcher"),
                grpc.aio.insecure_channel(await scheduler.address()) as channel,
            ):
                async with asyncio.timeout(PATIENCE):
                    await channel.channel_ready()
                client = Scheduler(channel, dispatchers.settings_of(values), scheduler.listen)
                yield Traced(collected, smtp, client, log)

    return run


async def test_one_trace_leads_from_the_caller_to_the_reply_of_the_mail_server(
    traced: Callable[..., Any],
) -> None:
    async with traced(log_addresses="true") as it:
        it.smtp.plan["rcpt"] = [Say("451 4.3.0 try again"), Say("250 ok")]
        await it.schedule("a@b.org")
        sends = await eventually(
            lambda: it.collected.named("send")[1:] and it.collected.named("send")
        )
        (call,) = await eventually(lambda: it.collected.named(SCHEDULE))

        assert (call.trace_id, call.parent_id) == (TRACE, SPAN)
        assert call.service == "outbox-scheduler"
        assert call.attributes["rpc.response.status_code"] == "OK"
        assert {(send.trace_id, send.parent_id, send.service) for send in sends} == {
            (TRACE, call.span_id, "outbox-dispatcher")
        }
        first, second = sorted(sends, key=lambda send: send.attributes["outbox.attempt"])
        assert (first.attributes["outbox.smtp.code"], first.attributes["outbox.outcome"]) == (
            451,
            "TEMPORARY_FAILURE",
        )
        assert first.attributes["outbox.smtp.enhanced_code"] == "4.3.0"
        assert first.attributes["outbox.smtp.reply"] == "4.3.0 try again"
        assert (second.attributes["outbox.smtp.code"], second.attributes["outbox.outcome"]) == (
            250,
            "SENT",
        )
        (job,) = it.scheduler.rows("SELECT id FROM email_jobs")[0]
        assert first.attributes["outbox.job_id"] == str(job)
        assert [line["trace_id"] for line in it.calls() if SCHEDULE in line["method"]] == [TRACE]


async def test_a_span_has_no_text_of_a_reply_unless_addresses_may_be_logged(
    traced: Callable[..., Any],
) -> None:
    async with traced() as it:
        it.smtp.plan["rcpt"] = REFUSED
        await it.upload("b@b.org")
        (send,) = await eventually(lambda: it.collected.named("send"))
        (upload,) = await eventually(lambda: it.collected.named(UPLOAD))
        assert send.parent_id == upload.span_id
        assert send.is_error
        assert "b@b.org" not in str(it.collected.spans)


async def test_a_trace_that_is_not_sampled_or_not_valid_is_not_continued(
    traced: Callable[..., Any],
) -> None:
    async with traced() as it:
        await it.schedule("a@b.org", traceparent=UNSAMPLED)
        assert it.parents() == [None]
        await it.schedule("a@b.org", traceparent="x" * 5000)
        await it.schedule("a@b.org", traceparent=None)
        sends = await eventually(
            lambda: it.collected.named("send")[1:] and it.collected.named("send")
        )
        assert len({send.trace_id for send in sends}) == 2
        assert TRACE not in {span.trace_id for span in it.collected.spans}


async def test_a_mail_on_a_kept_connection_is_not_logged_with_the_trace_of_an_earlier_one(
    traced: Callable[..., Any],
) -> None:
    # Built by a worker process, because a template with a condition may take long.
    body = "{% if email %}Hello{% endif %}"
    async with traced(log_level="debug") as it:
        await it.schedule("a@b.org", body=body)
        await eventually(lambda: len(it.attempts()) == 1)
        await it.schedule("c@b.org", body=body, traceparent=UNSAMPLED)
        await eventually(lambda: len(it.attempts()) == 2)
        assert it.smtp.connections == 1
        first, second = it.attempts()
        assert (first["trace_id"], "trace_id" in second) == (TRACE, False)
        assert first["job_id"] != second["job_id"]


async def test_mail_is_sent_while_the_collector_is_away(traced: Callable[..., Any]) -> None:
    async with traced(traces_endpoint=f"http://127.0.0.1:{free_port()}") as it:
        await it.schedule("a@b.org")
        await eventually(lambda: it.smtp.taken)


async def test_remaining_spans_are_exported_at_the_end() -> None:
    async with collector() as collected:
        tracer = open_tracer(load_settings(traces_endpoint=collected.address), "test")
        assert tracer is not None
        tracer.begin_call("/a.Service/Method", ()).end("UNAVAILABLE")
        await tracer.close()
        (span,) = collected.named("a.Service/Method")
        assert span.is_error


async def test_a_collector_that_never_answers_does_not_delay_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        tracer = open_tracer(load_settings(traces_endpoint=f"http://127.0.0.1:{port}"), "test")
        assert tracer is not None
        tracer.begin_call("/a.Service/Method", ()).end("OK")
        # The promise is 5 s; the SDK itself would continue for longer.
        async with asyncio.timeout(8):
            await tracer.close()


async def test_without_an_endpoint_nothing_of_a_trace_is_stored(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        options = options_for(await scheduler.sender())
        await scheduler.batches.ScheduleBatch(
            batch_service_pb2.ScheduleBatchRequest(options=options, csv=b"email\na@b.org\n"),
            metadata=(("traceparent", CALLER),),
        )
        assert scheduler.rows("SELECT trace_parent FROM batches") == [(None,)]


def test_libraries_that_no_setting_needs_are_not_loaded() -> None:
    unused = ("opentelemetry.exporter", "opentelemetry.sdk.metrics", "rich")
    names = ("scheduler", "dispatcher", "stats")
    imports = "; ".join(f"import outbox_server.services.{name}.server" for name in names)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{imports}; import sys; print([name for name in {unused} if name in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
    assert open_tracer(load_settings(), "test") is None


@pytest.mark.parametrize(
    "endpoint", ["collector:4317", "http://collector", "grpc://c:1", "http://"]
)
def test_an_endpoint_that_is_not_a_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match=r"OUTBOX_TRACES_ENDPOINT: .* write http://host"):
        open_tracer(load_settings(traces_endpoint=endpoint), "test")
