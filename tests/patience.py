"""Long limits inside schedulers of this process.

If PostgreSQL or Redis is slow, a scheduler answers with less than it could: without a forecast, or
after some parts of a change. If many calls wait for a place, it refuses them after a time. On a
busy machine, these limits would decide about the answers that tests expect. Tests of such an answer
make a store fail, or set a limit themselves.
"""

from __future__ import annotations

from datetime import timedelta
from types import ModuleType
from typing import Final

from outbox_server.services.scheduler import explainer, forecasts, job_sets, respreading
from outbox_server.services.scheduler.servicers import batch_control, batches, senders
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.heads import loader
from outbox_server.shared.metrics import endpoint
from tests.eventually import PATIENCE

_LONG: Final = timedelta(seconds=PATIENCE)
_SECONDS: Final[tuple[tuple[ModuleType, str], ...]] = (
    (explainer, "_QUEUE_LIMIT_S"),
    (job_sets, "_TIME_S"),
    (respreading, "_CALL_LIMIT_S"),
    (senders, "_PACE_LIMIT_S"),
)
_DURATIONS: Final[tuple[tuple[ModuleType, str], ...]] = (
    (batch_control, "_LOAD_LIMIT"),
    (batches, "_LOAD_LIMIT"),
    (endpoint, "_REFRESH_LIMIT"),
    (forecasts, "_READ_LIMIT"),
    (job_sets, "_LOAD_LIMIT"),
)


def be_patient() -> None:
    """Set the limits for all schedulers of this process."""
    for limits, value in ((_SECONDS, PATIENCE), (_DURATIONS, _LONG)):
        for module, name in limits:
            assert type(getattr(module, name)) is type(value), name
            setattr(module, name, value)
    for function, name in (
        (loader.load_soon, "limit"),
        (loader.load_user_soon, "limit"),
        (FairShares.__init__, "patience"),
    ):
        assert function.__kwdefaults__ is not None
        assert name in function.__kwdefaults__
        function.__kwdefaults__[name] = _LONG
    loader.soon.__defaults__ = (_LONG,)
