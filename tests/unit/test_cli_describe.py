"""The messages of the command line for a failed call."""

from __future__ import annotations

import socket

import grpc
import pytest
from outbox_client import CallError, DeadlineExceeded, InvalidArgument, Unavailable

from outbox_server.cli.addresses import Address
from outbox_server.cli.call_errors import describe, in_brief

ADDRESS = Address("127.0.0.1:50051", "--server", "scheduler")


@pytest.mark.parametrize(
    ("error", "in_doubt"),
    [
        (InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, "no column email"), False),
        (Unavailable(grpc.StatusCode.UNAVAILABLE, "gone", reason="DATABASE_UNAVAILABLE"), True),
        (DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), True),
        (CallError(grpc.StatusCode.INTERNAL, "broken"), True),
    ],
)
def test_a_refused_batch_is_not_reported_as_uncertain(error: CallError, in_doubt: bool) -> None:
    error.request_id = "once"
    assert ("--request-id once" in describe(error, ADDRESS)) is in_doubt


def test_a_server_that_is_too_slow_is_named() -> None:
    late = DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert describe(late, Address(address, "--server", "scheduler")) == (
            f"no answer in time from {address} (--server): the scheduler may be overloaded; "
            "try again"
        )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            Unavailable(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"),
            "no answer from the scheduler",
        ),
        (
            Unavailable(grpc.StatusCode.UNAVAILABLE, "gone", reason="DATABASE_UNAVAILABLE"),
            "gone (DATABASE_UNAVAILABLE)",
        ),
    ],
)
def test_a_live_view_names_briefly_the_server_that_does_not_answer(
    error: CallError, line: str
) -> None:
    assert in_brief(error, "the scheduler") == line
