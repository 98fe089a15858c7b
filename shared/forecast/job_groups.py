"""Brings groups of waiting mail into the order of sending. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from outbox_server.shared.forecast.simulation import JobGroup

# The largest number of overlapping groups that are merged exactly. The work is this number times
# the number of all groups. If more overlap, the mails of each of the smallest groups are assumed
# to be due at once.
_MOST_OVERLAPPING: Final = 300
# The largest product of both numbers. Merging then takes about 0.2 s.
_MOST_MERGING: Final = 300_000


def joined(groups: Iterable[tuple[int, JobGroup]]) -> Iterator[JobGroup]:
    """Join neighbours of one batch that have equal expiries and evenly spaced due times.

    Each group comes with the id of its batch.
    """
    last: JobGroup | None = None
    last_batch = 0
    for batch, group in groups:
        alike = last and batch == last_batch and group.expire_after == last.expire_after
        if last and alike and group.count == 1 and (last.count == 1 or last.step):
            step = group.due - last.last_due
            if step and step == (last.step or step):
                last = replace(last, count=last.count + 1, step=step, mine=last.mine + group.mine)
                continue
        if last:
            yield last
        last, last_batch = group, batch
    if last:
        yield last


def in_order(groups: Iterable[JobGroup]) -> list[JobGroup]:
    """Return groups ordered by due time; groups with equal due times keep their order.

    If groups overlap, their mails between two of their ends become one group with even spacing, so
    the position of a mail is exact to within one spacing.
    """
    waiting = deque(sorted(_few_overlapping(list(groups)), key=lambda group: group.due))
    ends = sorted({end for group in waiting for end in (group.due, group.last_due + 1)})
    active: list[JobGroup] = []
    ordered: list[JobGroup] = []
    for end in ends:
        # Cut off the mails of active groups that are due before this end.
        parts, rests = [], []
        for group in active:
            count = group.count if group.last_due < end else -((group.due - end) // group.step)
            head, rest = _cut(group, count)
            if head:
                parts.append(head)
            if rest:
                rests.append(rest)
        ordered += _merged(parts)
        active = rests
        while waiting and waiting[0].due == end:
            active.append(waiting.popleft())
    return ordered


def first_of(groups: Iterable[JobGroup], count: int) -> list[JobGroup]:
    """Return the first `count` mails of groups that are in the order of sending."""
    found: list[JobGroup] = []
    for group in groups:
        head, _ = _cut(group, count)
        if head is None:
            break
        found.append(head)
        count -= head.count
    return found


def _few_overlapping(groups: list[JobGroup]) -> list[JobGroup]:
    if len(groups) <= _MOST_OVERLAPPING:
        return groups
    overlapping = max(1, min(_MOST_OVERLAPPING, _MOST_MERGING // len(groups)))
    least = sorted((group.count for group in groups), reverse=True)[overlapping]
    return [
        group
        if group.mine or group.count > least
        else replace(group, due=(group.due + group.last_due) // 2, step=0)
        for group in groups
    ]


def _merged(parts: list[JobGroup]) -> list[JobGroup]:
    first = min((part.due for part in parts), default=0)
    last = max((part.last_due for part in parts), default=0)
    if first == last or len(parts) == 1:
        return parts
    count = sum(part.count for part in parts)
    expiries = [part.expire_after for part in parts if part.expire_after is not None]
    return [
        JobGroup(
            first,
            count,
            (last - first) // (count - 1),
            sum(part.mine for part in parts),
            # If only some parts expire, assume that none does.
            max(expiries) if len(expiries) == len(parts) else None,
        )
    ]


def _cut(group: JobGroup, count: int) -> tuple[JobGroup | None, JobGroup | None]:
    """Return the first `count` mails of a group, and the rest."""
    if count <= 0:
        return None, group
    if count >= group.count:
        return group, None
    mine = group.mine * count // group.count
    head = replace(group, count=count, mine=mine)
    due, left = group.due + count * group.step, group.count - count
    return head, replace(group, due=due, count=left, mine=group.mine - mine)
