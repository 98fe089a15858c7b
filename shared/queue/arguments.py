"""The arguments of the scripts: records as the maps and texts that the scripts describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

import msgpack

from outbox_server.shared.queue.keys import JobRef, member_of
from outbox_server.shared.queue.records import (
    ActiveLease,
    Contact,
    Head,
    PastEnd,
    Settlement,
    UserHead,
)

_MILLISECOND = timedelta(milliseconds=1)
# The reason of a circuit is the server's reply, cut to this many characters.
_MAX_REASON = 200


def _contact(settlement: Settlement) -> str:
    if settlement.contact in (Contact.FAILED, Contact.AUTH_FAILED):
        return settlement.contact + settlement.connection_error[:_MAX_REASON]
    return settlement.contact


def _cooldown(settlement: Settlement) -> int | None:
    """Return the ms to the next probe, as settle.lua reads them; 1 for a time in the past."""
    if settlement.cooldown is None:
        return None
    return max(1, ms(settlement.cooldown)) if settlement.cooldown else 0


def settlement_arg(settlement: Settlement) -> bytes:
    """Return the map that settle.lua describes."""
    next_job = settlement.next_job
    fields = {
        "sender": str(settlement.sender_id),
        "member": member_of(settlement.job),
        "user": settlement.user,
        "kind": settlement.use.value,
        "age": ms(settlement.age),
        "lease": settlement.lease_ms,
        "next_member": None if next_job is None else member_of(next_job),
        "next_due": settlement.next_due_ms,
        "contact": _contact(settlement),
        "before_mail": settlement.before_mail,
        "cooldown": _cooldown(settlement),
    }
    return pack(fields)


def head_arg(head: Head) -> bytes:
    """Return the map that load_head.lua describes."""
    opens, closes = head.opening or (0, "inf")
    fields = {
        "sender": str(head.sender_id),
        "limit": head.hourly_limit,
        "gap": ms(head.gap),
        "flight": head.max_in_flight,
        "state": 1 if head.active else 2,
        "horizon": head.jobs[-1][1] if head.more and head.jobs else "inf",
        "user": head.user,
        "limited": head.user_limited,
        "endpoint": head.endpoint,
        "revision": str(head.revision),
        "jobs": due_arg(head.jobs),
        "ends": _ends(head.ends),
        "leases": _leases(head.leases),
        "opens": opens,
        "closes": closes,
        "cooldown": None if head.cooldown is None else max(1, ms(head.cooldown)),
        "paused": head.paused_until_ms,
        "wake": None if head.wake is None else max(1, ms(head.wake)),
    }
    return pack(fields)


def due_arg(jobs: Iterable[tuple[JobRef, int]]) -> str:
    """Return jobs with their due times, as the scripts read them."""
    return " ".join([f"{member_of(job)} {due_ms}" for job, due_ms in jobs])


def load_cost(head: Head) -> int:
    """Return about how many us Redis needs to load a head."""
    return 80 + len(head.jobs) + len(head.ends)


def _ends(ends: Iterable[PastEnd]) -> str:
    return " ".join([f"{member_of(end.job)} {ms(end.age)} {end.counted:d}" for end in ends])


def _leases(leases: Iterable[ActiveLease]) -> str:
    return " ".join([f"{member_of(one.job)} {ms(one.left)}" for one in leases])


def user_arg(head: UserHead) -> bytes:
    """Return the map that load_user.lua describes."""
    fields = {
        "user": head.user,
        "limit": "" if head.hourly_limit is None else head.hourly_limit,
        "gap": "" if head.gap is None else ms(head.gap),
        "ends": _ends(head.ends),
        "leases": _leases(head.leases),
    }
    return pack(fields)


def pack(fields: Mapping[str, object]) -> bytes:
    """Return a map that `cmsgpack.unpack` of a script reads."""
    packed: bytes = msgpack.packb(fields)
    return packed


def ms(duration: timedelta) -> int:
    """Return whole milliseconds, at least 0."""
    return max(0, duration // _MILLISECOND)
