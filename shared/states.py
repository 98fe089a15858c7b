"""The enumerations that protos, tables and code share, with the numbers of `outbox.v1`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, TypeVar

from outbox_server.shared.errors import InvalidInput, Violations

E = TypeVar("E", bound=IntEnum)
# The enumerations that have another name in the proto.
_PROTO_NAMES: Final = {"JobState": "EmailJobState"}


def enum_or_none(kind: type[E], number: int | None) -> E | None:
    """Return the member with a number; None for None and for 0, which means unset.

    Raises:
        ValueError: no member has the number.
    """
    return kind(number) if number else None


def requested_enum(
    kind: type[E], number: int, field: str, *, reason: str | None = None
) -> E | None:
    """Return the value of a request's enum field; None if it is unset.

    Raises:
        InvalidInput: no member has the number.
    """
    try:
        return enum_or_none(kind, number)
    except ValueError:
        *others, last = (f"{_proto_prefix(kind)}{member.name}" for member in kind)
        description = f"must be {', '.join(others)} or {last} (got {number})"
        raise InvalidInput.field(field, description, reason=reason) from None


def _proto_prefix(kind: type[IntEnum]) -> str:
    """Return the prefix of the names in the proto: that of BatchMode is `BATCH_MODE_`."""
    name = _PROTO_NAMES.get(kind.__name__, kind.__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper() + "_"


class JobState(IntEnum):
    """The states of an e-mail job (docs/states.md has the diagram)."""

    SCHEDULED = 1
    SENDING = 2
    SENT = 3
    FAILED = 4
    UNCERTAIN = 5
    CANCELLED = 6
    SUPPRESSED = 7
    EXPIRED = 8


def requested_states(numbers: Iterable[int], field: str) -> frozenset[JobState]:
    """Return the states of a request's list. Unset values are left out.

    Raises:
        InvalidInput: some numbers belong to no state; the error names each of them.
    """
    wrong = Violations()
    states: set[JobState] = set()
    for index, number in enumerate(numbers):
        with wrong:
            state = requested_enum(JobState, number, f"{field}[{index}]")
            if state is not None:
                states.add(state)
    wrong.raise_any()
    return frozenset(states)


class HoldReason(IntEnum):
    """Why an installation is held; numbered as in the proto."""

    # PostgreSQL is not the one that mail was last sent with, as after the restore of a dump.
    RESTORED = 1
    # PostgreSQL has lost more than OUTBOX_HOLD_AFTER, as after a recovery to a point in time.
    STEPPED_BACK = 2
    # An operator asked for it.
    REQUESTED = 3


FINAL_STATES = frozenset(
    {
        JobState.SENT,
        JobState.FAILED,
        JobState.UNCERTAIN,
        JobState.CANCELLED,
        JobState.SUPPRESSED,
        JobState.EXPIRED,
    }
)

# The final states whose jobs are removed after OUTBOX_RETENTION, as numbers. UNCERTAIN jobs are
# kept: they wait for a caller's decision. The index of finished jobs has this condition.
PURGEABLE = tuple(sorted(int(state) for state in FINAL_STATES - {JobState.UNCERTAIN}))


class SenderState(IntEnum):
    """The states of a sender."""

    ACTIVE = 1
    PAUSED = 2


class BatchState(IntEnum):
    """The stored states of a batch. Whether its jobs are finished is counted, not stored."""

    ACTIVE = 1
    CANCELLED = 2


class JobChangeKind(IntEnum):
    """What a change of many jobs does with them (stored only)."""

    CANCEL = 1
    RESCHEDULE = 2
    RETRY = 3


class SmtpSecurity(IntEnum):
    """How the connection to an SMTP endpoint is protected."""

    NONE = 1
    STARTTLS = 2
    TLS = 3


class DuplicatePolicy(IntEnum):
    """What happens to further rows with the same address."""

    KEEP_FIRST = 1
    KEEP_ALL = 2


class BatchMode(IntEnum):
    """The effect of a bad row on its batch."""

    PERMISSIVE = 1
    STRICT = 2


class SuppressionForm(IntEnum):
    """The addresses that a suppression covers. Older releases write none."""

    # The address itself, in lower case.
    EXACT = 1
    # No address. Processes of older releases, which compare by case folding, find an EXACT
    # suppression by it.
    FOR_OLDER_RELEASES = 2


class AttemptOutcome(IntEnum):
    """How one try to hand a job to SMTP ended."""

    SENT = 1
    # 4xx: may succeed later.
    TEMPORARY_FAILURE = 2
    # 5xx, or a mail that cannot be built: will never succeed.
    PERMANENT_FAILURE = 3
    # Refused, time-out, TLS, 421, AUTH: a failure of the endpoint, not of the mail.
    CONNECTION_FAILURE = 4
    # The connection ended between the end of the body and the reply.
    IN_DOUBT = 5
    # The dispatcher died, or its lease expired, before it recorded an outcome.
    LEASE_EXPIRED = 6


class ReplyClass(IntEnum):
    """What an SMTP reply means, as shared/smtp/replies.py decides; numbered as in the proto.

    The comments say what happens to the mail.
    """

    # Accepted.
    SENT = 1
    # The server ends this connection: the mail is tried again at once over a new one.
    SESSION = 2
    # The sender's account is refused (quota, block): the sender cools down.
    ACCOUNT = 3
    # Too many connections at once: fewer are kept open.
    CONNECTIONS = 4
    # Mail comes too fast: the sender's gap doubles.
    RATE = 5
    # The server asks for this mail later: only this mail waits, with the long back-off.
    DEFERRED = 6
    # Any other 4xx: tried again after the waits of OUTBOX_RETRY_BACKOFF.
    TEMPORARY = 7
    # Authentication failed or is missing: counts for the circuit.
    AUTH = 8
    # This recipient is permanently refused: FAILED.
    RECIPIENT = 9
    # This message is permanently refused: FAILED.
    CONTENT = 10
    # A permanent refusal that no rule knows: FAILED. Many in a row make the sender cool down.
    REFUSED = 11


# Refusals that say nothing about the mail. An attempt that ends with one of them does not count as
# a failure: the job keeps its position in the waits of OUTBOX_RETRY_BACKOFF.
NOT_COUNTED = frozenset(
    {ReplyClass.ACCOUNT, ReplyClass.CONNECTIONS, ReplyClass.RATE, ReplyClass.AUTH}
)
# The outcomes that count as failures of an endpoint; a time-out after the body does as well.
CONNECTION_TROUBLE = frozenset({AttemptOutcome.CONNECTION_FAILURE, AttemptOutcome.IN_DOUBT})
