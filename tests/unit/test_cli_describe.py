"""What the command line says of a call that failed."""

from __future__ import annotations

import grpc
import pytest
from outbox_client import CallError, DeadlineExceeded, InvalidArgument, Unavailable

from cli.client import Address, describe

ADDRESS = Address("127.0.0.1:50051", "default")


@pytest.mark.parametrize(
    ("error", "in_doubt"),
    [
        (InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, "no column email"), False),
        (Unavailable(grpc.StatusCode.UNAVAILABLE, "gone", reason="DATABASE_UNAVAILABLE"), True),
        (DeadlineExceeded(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), True),
        (CallError(grpc.StatusCode.INTERNAL, "broken"), True),
    ],
)
def test_a_batch_that_was_refused_is_not_called_doubtful(error: CallError, in_doubt: bool) -> None:
    error.request_id = "once"
    assert ("--request once" in describe(error, ADDRESS)) is in_doubt
