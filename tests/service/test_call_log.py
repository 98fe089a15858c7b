"""The line that a server logs for each call."""

from __future__ import annotations

from typing import Any

import structlog
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.sender_service_pb2 import GetSenderRequest
from structlog.testing import capture_logs

from outbox_server.shared.rpc.call_log import loggable
from tests.eventually import eventually
from tests.scheduler_stack import options_for, refusal_of
from tests.two_users import rivals


async def test_the_line_of_a_call_names_user_key_and_request(
    database_url: str, redis_url: str
) -> None:
    async with rivals(database_url, redis_url) as both:
        sender = await both.sender(both.ann)
        get = GetSenderRequest(sender_id=sender.sender_id, user_id="ann")
        own = (("x-request-id", "r-1"),)
        keys = dict(
            both.scheduler.rows("SELECT coalesce(user_id, kind::text), key_id FROM api_keys")
        )
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:

            async def line_of(call: Any) -> Any:
                lines.clear()
                await call
                await eventually(lambda: [each for each in lines if each["event"] == "call"])
                return next(each for each in lines if each["event"] == "call")

            line = await line_of(both.scheduler.senders.GetSender(get, metadata=both.ann + own))
            assert (line["user_id"], line["key_id"]) == ("ann", keys["ann"])
            assert line["x_request_id"] == "r-1"
            # The service has no user; the request names the one that it acts for.
            long = (("x-request-id", "x" * 500),)
            line = await line_of(
                both.scheduler.senders.GetSender(get, metadata=both.service + long)
            )
            assert (line["user_id"], line["key_id"]) == ("ann", keys["2"])
            assert line["x_request_id"] == "x" * 128 + "..."
            call = both.scheduler.senders.GetSender(get, metadata=both.eve)
            line = await line_of(refusal_of(call))
            assert (line["user_id"], line["key_id"]) == ("eve", keys["eve"])
            assert (line["reason"], "x_request_id" in line) == ("USER_MISMATCH", False)
            line = await line_of(
                both.scheduler.batches.ScheduleBatch(
                    request_of(sender, request_id="batch 7"), metadata=both.ann
                )
            )
            assert line["request_id"] == "batch 7"
            line = await line_of(refusal_of(both.scheduler.senders.GetSender(get)))
            assert not {"user_id", "key_id"} & line.keys()


def request_of(sender: Any, **options: Any) -> Any:
    return ScheduleBatchRequest(options=options_for(sender, **options), csv=b"email\na@b.org\n")


def test_control_characters_of_callers_are_escaped() -> None:
    assert loggable("a\x1b]0;x\x07\r\nb\u009b\u2028") == "a\\x1b]0;x\\x07\\r\\nb\\x9b\\u2028"
    assert loggable("zoë@example.com") == "zoë@example.com"
