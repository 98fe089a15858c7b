"""What goes wrong in a drill, and when: pure, so that the same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault."""

    text: str
    # What it strikes: two faults never strike the same thing at once. A service's name stands for
    # one of its processes.
    strikes: str
    # How long it lasts, in seconds: from, to. Zeros: it is over at once.
    lasts: tuple[float, float] = (0.0, 0.0)


# Longer than the lease of a drill, LEASE_S.
LEASE_S: Final = 3.0
_PAUSE: Final = (LEASE_S * 1.2, LEASE_S * 1.8)
_SHORT: Final = (0.5, 4.0)

KINDS: Final[Mapping[str, Kind]] = {
    "dispatcher_kill": Kind("kill -9 of a dispatcher", "dispatcher"),
    "dispatcher_pause": Kind("SIGSTOP beyond the lease, then SIGCONT", "dispatcher", _PAUSE),
    "dispatcher_term": Kind("SIGTERM of a dispatcher in full flight", "dispatcher"),
    "scheduler_kill": Kind("kill -9 of a scheduler", "scheduler"),
    "scheduler_pause": Kind("SIGSTOP, then SIGCONT, of a scheduler", "scheduler", _PAUSE),
    "stats_kill": Kind("kill -9 of a stats service", "stats"),
    "stats_pause": Kind("SIGSTOP, then SIGCONT, of a stats service", "stats", _PAUSE),
    "redis_flush": Kind("FLUSHALL", "redis"),
    "redis_kill": Kind("kill -9; starts empty", "redis"),
    "redis_snapshot": Kind(
        "kill -9; starts with a snapshot that is seconds old", "redis", (1.0, 6.0)
    ),
    "redis_keys": Kind("half of all keys are deleted", "redis"),
    "redis_full": Kind("out of memory, and evicts nothing", "redis", _SHORT),
    "redis_refuse": Kind("connections cut and refused", "redis", _SHORT),
    "redis_hang": Kind("not a byte passes; then all that was held back does", "redis", _SHORT),
    "postgres_kill": Kind("kill -9 of the server", "postgres"),
    "postgres_restart": Kind("immediate shutdown, then recovery", "postgres"),
    "postgres_cut": Kind("pg_terminate_backend of every connection", "postgres"),
    "postgres_refuse": Kind("connections cut and refused", "postgres", _SHORT),
    "postgres_hang": Kind(
        "not a byte passes; then all that was held back does", "postgres", _SHORT
    ),
    "smtp_refuse": Kind("connections cut and refused", "smtp", _SHORT),
    "smtp_hang": Kind("not a byte passes; then every connection is cut", "smtp", _SHORT),
    "smtp_silent": Kind("takes each body and closes without an answer", "smtp", (0.2, 1.0)),
    "smtp_421": Kind("421 at MAIL, and closes", "smtp", _SHORT),
    "smtp_450": Kind("450 at RCPT", "smtp", _SHORT),
}

# From one fault to the next, so that they come alone and in mixtures.
_PAUSES_S: Final = (0.3, 4.0)
_FIRST_S: Final = 2.0
# So long before the end nothing begins any more.
_QUIET_S: Final = 2.0
# After a fault its own target is left alone, or it would never be seen to recover.
_REST_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: seconds since the load began, and which process of a service (from 1)."""

    at: float
    name: str
    lasts: float = 0.0
    number: int = 1


def plan(
    seed: int, duration_s: float, names: Sequence[str], processes: Mapping[str, int]
) -> list[Fault]:
    """Return the faults of a drill in their order.

    `processes` says how many of each service there are. Kinds are dealt like cards: each comes
    about as often as every other.
    """
    chance = random.Random(seed)  # noqa: S311 - a plan, no secret
    hand: list[str] = []
    free_at: dict[tuple[str, int], float] = {}
    faults = []
    now = _FIRST_S
    while names and now < duration_s - _QUIET_S:
        if not hand:
            hand = chance.sample(sorted(names), len(names))
        # Drawn for every card and moment, struck or not: nothing else may decide what comes next.
        number = chance.randint(1, 1_000_000)
        share, pause = chance.random(), chance.uniform(*_PAUSES_S)
        for name in hand:
            kind = KINDS[name]
            target = (kind.strikes, number % processes.get(kind.strikes, 1) + 1)
            if free_at.get(target, 0.0) > now:
                continue
            hand.remove(name)
            lasts = kind.lasts[0] + share * (kind.lasts[1] - kind.lasts[0])
            free_at[target] = now + lasts + _REST_S
            faults.append(Fault(round(now, 3), name, round(lasts, 3), target[1]))
            break
        now += pause
    return faults
