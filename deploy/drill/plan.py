"""Plans the faults of a drill. Pure, so that the same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from outbox_server.deploy.embedded.trouble import PHASES


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault."""

    text: str
    # The target. Two faults never hit the same target at once. The name of a service means one of
    # its processes.
    strikes: str
    # The shortest and the longest duration, in seconds. Zeros mean that it is over at once.
    lasts: tuple[float, float] = (0.0, 0.0)
    # The seed picks one of them. Empty means that there are no variants.
    variants: tuple[str, ...] = ()


# The lease of a drill. A paused process sleeps for longer.
LEASE_S: Final = 3.0
_PAUSE: Final = (LEASE_S * 1.2, LEASE_S * 1.8)
_SHORT: Final = (0.5, 4.0)
# The duration of a fault that imitates a provider, so that a mail meets the limit more than once.
_HABIT: Final = (2.0, 5.0)
SMTP_TIMEOUT_S: Final = 2.0
# The limit of the reply to a body, and the delay of a reply that is longer than a lease.
SMTP_END_TIMEOUT_S: Final = 8.0
SLOW_REPLY_S: Final = LEASE_S * 1.5
# The delay of each of the seven replies to a mail on a new connection; in sum below the lease.
LAG_S: Final = 0.1
OUTAGE_S: Final = 30.0
_OUTAGE_TEXT: Final = f"unreachable for {OUTAGE_S:.0f} s: connections cut and refused"
# The time from the start of one outage to the next. At least half of it has no outage.
_OUTAGE_PAUSES_S: Final = (60.0, 90.0)
# The minimum time from the end of the last outage to the end of the drill.
_OUTAGE_CALM_S: Final = 20.0
# A drill of this length always has an outage.
OUTAGE_DRILL_S: Final = _OUTAGE_PAUSES_S[1] + OUTAGE_S + _OUTAGE_CALM_S

# The faults that are dealt like cards: each comes about as often as every other.
CARDS: Final[Mapping[str, Kind]] = {
    "dispatcher_kill": Kind("kill -9 of a dispatcher", "dispatcher"),
    "dispatcher_pause": Kind("SIGSTOP beyond the lease, then SIGCONT", "dispatcher", _PAUSE),
    "dispatcher_term": Kind("SIGTERM of a dispatcher that is sending", "dispatcher"),
    "dispatcher_clock": Kind(
        "runs with a wall clock an hour off", "dispatcher", (2.0, 6.0), ("ahead", "behind")
    ),
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
    "redis_full": Kind("out of memory, without eviction", "redis", _SHORT),
    "redis_clock": Kind(
        "its clock steps back; then kill -9, starts empty with the right clock",
        "redis",
        _SHORT,
        ("0.5s", "2s", "8s"),
    ),
    "redis_refuse": Kind("connections cut and refused", "redis", _SHORT),
    "redis_hang": Kind("no byte passes; then the held-back bytes do", "redis", _SHORT),
    "postgres_kill": Kind("kill -9 of the server", "postgres"),
    "postgres_restart": Kind("immediate shutdown, then recovery", "postgres"),
    "postgres_cut": Kind("pg_terminate_backend of every connection", "postgres"),
    "postgres_refuse": Kind("connections cut and refused", "postgres", _SHORT),
    "postgres_hang": Kind("no byte passes; then the held-back bytes do", "postgres", _SHORT),
    "postgres_full": Kind("every write fails: disk full (53100)", "postgres", _SHORT),
    "postgres_conflict": Kind(
        "every third write fails: deadlock (40P01), serialisation (40001)",
        "postgres",
        _SHORT,
        ("40P01", "40001"),
    ),
    "smtp_refuse": Kind("connections cut and refused", "smtp", _SHORT),
    "smtp_hang": Kind("no byte passes; then every connection is cut", "smtp", _SHORT),
    "smtp_stall": Kind(
        "does not reply in one phase of a session; then every connection is cut",
        "smtp",
        # Longer than the time limit of a phase, SMTP_TIMEOUT_S.
        (SMTP_TIMEOUT_S * 1.1, SMTP_TIMEOUT_S * 2),
        PHASES,
    ),
    "smtp_silent": Kind("accepts each body and closes without a reply", "smtp", (0.2, 1.0)),
    "smtp_421": Kind("421, and closes", "smtp", _SHORT, ("greeting", "mail", "rcpt", "data")),
    "smtp_450": Kind("450", "smtp", _SHORT, ("mail", "rcpt", "reply")),
    "smtp_552": Kind("552: refuses permanently", "smtp", (0.2, 0.6), ("mail", "rcpt", "reply")),
    "smtp_auth": Kind("535: user name and password are wrong", "smtp", _SHORT),
    "smtp_bytes": Kind("replies in pieces of one byte", "smtp", _SHORT),
    "smtp_line": Kind("a reply is a line of 1 MB", "smtp", (0.2, 1.0), ("mail", "rcpt", "reply")),
    "smtp_daily_quota": Kind(
        "the daily quota of an account is used up: all its mail is refused",
        "smtp",
        _HABIT,
        ("gmail", "exchange", "ses", "workspace"),
    ),
    "smtp_hourly_quota": Kind(
        "the hourly quota of an account is used up", "smtp", _HABIT, ("cpanel", "ionos")
    ),
    "smtp_mails_per_connection": Kind(
        "accepts two mails per connection", "smtp", _HABIT, ("421", "451", "452", "503")
    ),
    "smtp_too_many_connections": Kind(
        "accepts mail on two connections per account", "smtp", _HABIT, ("exim", "exchange")
    ),
    "smtp_rate": Kind(
        "accepts two mails per second of an account",
        "smtp",
        _HABIT,
        ("gmail", "exchange", "ses", "workspace"),
    ),
    "smtp_greylist": Kind(
        "refuses a sender and recipient until it has known them for 1.5 s",
        "smtp",
        _HABIT,
        ("rcpt", "reply"),
    ),
    "smtp_slow_reply": Kind(
        f"replies to each body after {SLOW_REPLY_S} s, longer than a lease", "smtp", _HABIT
    ),
    "smtp_account_blocked": Kind(
        "refuses every mail of an account", "smtp", _HABIT, ("exchange", "gmail")
    ),
    "smtp_helo": Kind("504, unless EHLO has a fully qualified name", "smtp", _HABIT),
    "smtp_mailbox_full": Kind("452 at RCPT: every mailbox is full", "smtp", _HABIT),
    "smtp_unknown_recipient": Kind("550 5.1.1 at RCPT: refuses permanently", "smtp", (0.2, 0.6)),
    "smtp_content": Kind("554 5.7.1 after the body: refuses permanently", "smtp", (0.2, 0.6)),
    "endpoint_slow": Kind(
        f"one of two endpoints: all bytes arrive {LAG_S} s later, both ways", "endpoint", _SHORT
    ),
    "endpoint_refuse": Kind(
        "one of two endpoints: connections cut and refused", "endpoint", _SHORT
    ),
    "endpoint_hang": Kind(
        "one of two endpoints: no byte passes; then every connection is cut",
        "endpoint",
        _SHORT,
    ),
    "endpoint_certificate": Kind(
        "one of two endpoints: connections cut; its certificate is not trusted",
        "endpoint",
        _SHORT,
    ),
    "user_hostile": Kind(
        "another user sends by 12 senders to servers that never reply, or without TLS to the "
        "server of others",
        "users",
        _HABIT,
        ("silent", "same_server"),
    ),
}

# Long faults. They come now and then, beside the others, in a drill of minutes.
OUTAGES: Final[Mapping[str, Kind]] = {
    f"{server}_outage": Kind(_OUTAGE_TEXT, server, (OUTAGE_S, OUTAGE_S))
    for server in ("redis", "postgres", "smtp")
}
# Faults that need the production configuration. Their duration depends on the processes.
ROLLOUTS: Final[Mapping[str, Kind]] = {
    "rolling_restart": Kind(
        "each process of each service: a new one starts, and when it is ready, an old one gets "
        "SIGTERM",
        "services",
    )
}
# Faults of the stores of a production system, which the usual stack does not have.
STORES: Final[Mapping[str, Kind]] = {
    "cluster_takeover": Kind(
        "kill -9 of a primary of the cluster; its replica takes over; it comes back as a replica",
        "cluster",
    ),
    "cluster_move": Kind("the slot of a shard is moved to another node", "cluster"),
    "postgres_takeover": Kind(
        "kill -9 of the primary; its synchronous replica takes over, and gets a new replica",
        "primary",
    ),
    "pooler_kill": Kind("kill -9 of PgBouncer; starts again", "pooler"),
}
# What operators do while mail is sent. Planned apart, with time between them.
OPERATIONS: Final[Mapping[str, Kind]] = {
    "user_limits": Kind(
        "the limits that a user has for all its senders together become tighter",
        "limits",
        (10.0, 15.0),
        ("drill-window", "drill-gap"),
    ),
    "postgres_restore": Kind(
        "restored from a dump, after a kill -9 of all dispatchers: nothing is sent until an "
        "operator releases it",
        "database",
        (2.0, 4.0),
    ),
    "redis_split": Kind(
        "a replica is promoted while its primary lives on, with a dispatcher on each; then the "
        "primary copies the data of the other",
        "split",
        (3.0, 6.0),
    ),
}
KINDS: Final[Mapping[str, Kind]] = {**CARDS, **OUTAGES, **ROLLOUTS, **STORES, **OPERATIONS}
# The faults of the single Redis, which a stack with a cluster does not have.
SINGLE_REDIS: Final = frozenset(
    name for name, kind in KINDS.items() if kind.strikes in ("redis", "split")
)

# No mail can be sent while such a fault lasts, however long the machine takes for it.
SUSPENSIONS: Final = frozenset({*OUTAGES, "postgres_restore", "redis_split"})

# The kinds that need libfaketime.
CLOCK_KINDS: Final = frozenset({"dispatcher_clock", "redis_clock"})

# When the first rolling restart starts, and the time from one to the next. Some overlap with
# outages.
_FIRST_ROLLOUT_S: Final = (2.0, 5.0)
_ROLLOUT_PAUSES_S: Final = (60.0, 100.0)
# The minimum time from the start of a later one to the end of the drill.
_ROLLOUT_CALM_S: Final = 60.0

# When the first fault of the stores comes, and the time from one to the next: a node that was
# killed must be back before the next one is.
_FIRST_STORE_S: Final = (3.0, 6.0)
_STORE_PAUSES_S: Final = (14.0, 22.0)

_FIRST_OPERATION_S: Final = (5.0, 15.0)
_OPERATION_PAUSES_S: Final = (25.0, 40.0)
# The minimum time from the start of an operation to the end of the drill.
_OPERATION_CALM_S: Final = 20.0

# The time from one fault to the next, so that faults come both alone and overlapping.
_PAUSES_S: Final = (0.3, 4.0)
_FIRST_S: Final = 2.0
# No fault begins in this time before the end.
_QUIET_S: Final = 2.0
# The time after a fault in which its target is spared, so that its recovery can be seen.
_REST_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its start in seconds since the load began, and its process (from 1)."""

    at: float
    name: str
    lasts: float = 0.0
    number: int = 1
    # One of the variants of its kind.
    variant: str = ""


def plan(
    seed: int, duration_s: float, names: Sequence[str], processes: Mapping[str, int]
) -> list[Fault]:
    """Return the faults of a drill, ordered by time.

    `processes` has the number of processes per service. Kinds are dealt like cards: each comes
    about as often as every other. Outages, rolling restarts, the faults of the stores and what
    operators do are planned separately.
    """
    outages = _outages(seed, duration_s, sorted(set(names) & set(OUTAGES)))
    chance = random.Random(seed)
    cards = sorted(set(names) & set(CARDS))
    hand: list[str] = []
    free_at: dict[tuple[str, int], float] = {}
    faults = []
    now = _FIRST_S
    while cards and now < duration_s - _QUIET_S:
        if not hand:
            hand = chance.sample(cards, len(cards))
        # Draw these at every step, used or not, so that only the seed decides what comes next.
        number = chance.randint(1, 1_000_000)
        share, pause = chance.random(), chance.uniform(*_PAUSES_S)
        for name in hand:
            kind = CARDS[name]
            several = processes.get(kind.strikes, 1)
            target = (kind.strikes, number % several + 1)
            lasts = kind.lasts[0] + share * (kind.lasts[1] - kind.lasts[0])
            if free_at.get(target, 0.0) > now or _meets(outages, kind.strikes, now, now + lasts):
                continue
            hand.remove(name)
            free_at[target] = now + lasts + _REST_S
            ways = kind.variants
            variant = ways[number // several % len(ways)] if ways else ""
            faults.append(Fault(round(now, 3), name, round(lasts, 3), target[1], variant))
            break
        now += pause
    rollouts = _rollouts(seed, duration_s, sorted(set(names) & set(ROLLOUTS)))
    stores = _stores(seed, duration_s, sorted(set(names) & set(STORES)))
    operations = _operations(seed, duration_s, sorted(set(names) & set(OPERATIONS)))
    return sorted((*faults, *outages, *rollouts, *stores, *operations), key=lambda one: one.at)


def _outages(seed: int, duration_s: float, names: Sequence[str]) -> list[Fault]:
    chance = random.Random(f"outages of {seed}")
    hand: list[str] = []
    found = []
    now = chance.uniform(*_OUTAGE_PAUSES_S)
    while names and now + OUTAGE_S + _OUTAGE_CALM_S <= duration_s:
        hand = hand or chance.sample(names, len(names))
        found.append(Fault(round(now, 3), hand.pop(), OUTAGE_S))
        now += chance.uniform(*_OUTAGE_PAUSES_S)
    return found


def _rollouts(seed: int, duration_s: float, names: Sequence[str]) -> list[Fault]:
    chance = random.Random(f"rollouts of {seed}")
    found: list[Fault] = []
    for name in names:
        now = chance.uniform(*_FIRST_ROLLOUT_S)
        while not found or now + _ROLLOUT_CALM_S <= duration_s:
            found.append(Fault(round(now, 3), name))
            now += chance.uniform(*_ROLLOUT_PAUSES_S)
    return found


def _stores(seed: int, duration_s: float, names: Sequence[str]) -> list[Fault]:
    chance = random.Random(f"stores of {seed}")
    hand: list[str] = []
    found = []
    now = chance.uniform(*_FIRST_STORE_S)
    while names and now < duration_s - _QUIET_S:
        hand = hand or chance.sample(names, len(names))
        found.append(Fault(round(now, 3), hand.pop()))
        now += chance.uniform(*_STORE_PAUSES_S)
    return found


def _operations(seed: int, duration_s: float, names: Sequence[str]) -> list[Fault]:
    chance = random.Random(f"operations of {seed}")
    hand: list[tuple[str, str]] = []
    all_ = [(name, variant) for name in names for variant in OPERATIONS[name].variants or ("",)]
    found = []
    now = chance.uniform(*_FIRST_OPERATION_S)
    while names and now + _OPERATION_CALM_S <= duration_s:
        hand = hand or chance.sample(all_, len(all_))
        name, variant = hand.pop()
        lasts = chance.uniform(*OPERATIONS[name].lasts)
        found.append(Fault(round(now, 3), name, round(lasts, 3), variant=variant))
        now += chance.uniform(*_OPERATION_PAUSES_S)
    return found


def _meets(outages: Sequence[Fault], target: str, start: float, end: float) -> bool:
    return any(
        OUTAGES[one.name].strikes == target
        and start < one.at + one.lasts + _REST_S
        and one.at < end + _REST_S
        for one in outages
    )
