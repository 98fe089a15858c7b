"""Which calls may be repeated, when, and how often. Knows no channel and no clock but its own."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Any, Final

import grpc

from outbox_client.errors import CallError

# The reasons after which every call may be repeated: it was refused before it began, or completely
# rolled back.
_NOTHING_HAPPENED: Final = frozenset(
    {
        "TOO_MANY_CALLS",
        "USER_CALLS_EXCEEDED",
        "USER_UPLOADS_EXCEEDED",
        "USER_WATCHES_EXCEEDED",
        "CONFLICT",
    }
)
# The deadline of a call that has no time left: gRPC takes 0 for no deadline.
_LEAST_S: Final = 0.001


def _published() -> dict[str, dict[str, Any]]:
    """Return what the published service config says about each method."""
    text = files("outbox.v1").joinpath("service_config.json").read_text(encoding="utf-8")
    return {
        f"/{name['service']}/{name['method']}": config
        for config in json.loads(text)["methodConfig"]
        for name in config["name"]
    }


_PUBLISHED: Final = _published()
# Repeats of these change nothing more.
RETRIED: Final = frozenset(each for each in _PUBLISHED if "retryPolicy" in _PUBLISHED[each])
# The deadlines of calls whose caller sets none, in seconds.
TIMEOUTS: Final = {
    method: float(config["timeout"].removesuffix("s"))
    for method, config in _PUBLISHED.items()
    if "timeout" in config
}
# Counts once by its `options.request_id`, which the client fills in. UploadBatch does too, but
# only AsyncClient.upload knows whether its source can be read again.
BY_REQUEST_ID: Final = frozenset(
    {"/outbox.v1.BatchService/ScheduleBatch", "/outbox.v1.BatchService/SendTestEmail"}
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a safe call is tried, and how long it waits in between.

    The pauses grow from `first` by `factor` to `longest`, each a fifth shorter or longer by chance;
    a longer delay that the server asks for is kept. By default 7 tries within 6.3 s.
    """

    tries: int = 7
    first: timedelta = timedelta(milliseconds=100)
    factor: float = 2.0
    longest: timedelta = timedelta(seconds=5)


NO_RETRIES: Final = RetryPolicy(tries=1)


class Attempts:
    """The tries of one call, and the time that they share."""

    def __init__(self, policy: RetryPolicy, timeout: float | None, *, safe: bool) -> None:
        """`timeout` is for all tries together, in seconds; None: no end."""
        self._policy = policy
        self._safe = safe
        self._end = None if timeout is None else time.monotonic() + timeout
        self._failed = 0

    def remaining(self) -> float | None:
        """Return the seconds that are left; None: no end."""
        return None if self._end is None else max(self._end - time.monotonic(), _LEAST_S)

    def pause_after(self, error: CallError) -> float:
        """Return the seconds to wait before the next try.

        Raises:
            CallError: `error` itself: it would not help, is not safe, or there is no time left.
        """
        self._failed += 1
        safe = self._safe or error.reason in _NOTHING_HAPPENED
        if not safe or self._failed >= self._policy.tries or not may_pass(error):
            raise error
        policy = self._policy
        grown = policy.first.total_seconds() * policy.factor ** (self._failed - 1)
        pause = min(grown, policy.longest.total_seconds()) * random.uniform(0.8, 1.2)  # noqa: S311
        if error.retry_delay is not None:
            pause = max(pause, error.retry_delay.total_seconds())
        if self._end is not None and time.monotonic() + pause >= self._end:
            raise error
        return pause


def may_pass(error: CallError) -> bool:
    """Return whether the same call may succeed a little later."""
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not error.reason:
        # The error of a busy proxy, or of gRPC itself, whose limit the message will always exceed.
        return "larger than max" not in error.message
    if error.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED):
        return error.retry_delay is not None
    return False
