"""Brings runs of waiting mail into the order of sending. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from outbox_server.shared.forecast.simulation import Run

# The most runs that are merged exactly, because the work grows with their square. If there are
# more, the mails of each of the smallest runs are assumed to be due at once.
_MOST_OVERLAPPING: Final = 300


def joined(runs: Iterable[tuple[int, Run]]) -> Iterator[Run]:
    """Join neighbours of one batch that have equal expiries and evenly spaced due times.

    Each run comes with the id of its batch.
    """
    last: Run | None = None
    last_batch = 0
    for batch, run in runs:
        alike = last and batch == last_batch and run.expire_after == last.expire_after
        if last and alike and run.count == 1 and (last.count == 1 or last.step):
            step = run.due - last.last_due
            if step and step == (last.step or step):
                last = replace(last, count=last.count + 1, step=step, mine=last.mine + run.mine)
                continue
        if last:
            yield last
        last, last_batch = run, batch
    if last:
        yield last


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Return runs ordered by due time; runs with equal due times keep their order.

    If runs overlap, their mails between two of their ends become one run with even spacing, so the
    position of a mail is exact to within one spacing.
    """
    waiting = deque(sorted(_few_overlapping(list(runs)), key=lambda run: run.due))
    ends = sorted({end for run in waiting for end in (run.due, run.last_due + 1)})
    active: list[Run] = []
    ordered: list[Run] = []
    for end in ends:
        # Cut off the mails of active runs that are due before this end.
        parts, rests = [], []
        for run in active:
            count = run.count if run.last_due < end else -((run.due - end) // run.step)
            head, rest = _cut(run, count)
            if head:
                parts.append(head)
            if rest:
                rests.append(rest)
        ordered += _merged(parts)
        active = rests
        while waiting and waiting[0].due == end:
            active.append(waiting.popleft())
    return ordered


def first_of(runs: Iterable[Run], count: int) -> list[Run]:
    """Return the first `count` mails of runs that are in the order of sending."""
    found: list[Run] = []
    for run in runs:
        head, _ = _cut(run, count)
        if head is None:
            break
        found.append(head)
        count -= head.count
    return found


def _few_overlapping(runs: list[Run]) -> list[Run]:
    if len(runs) <= _MOST_OVERLAPPING:
        return runs
    least = sorted((run.count for run in runs), reverse=True)[_MOST_OVERLAPPING]
    return [
        run
        if run.mine or run.count > least
        else replace(run, due=(run.due + run.last_due) // 2, step=0)
        for run in runs
    ]


def _merged(parts: list[Run]) -> list[Run]:
    first = min((part.due for part in parts), default=0)
    last = max((part.last_due for part in parts), default=0)
    if first == last or len(parts) == 1:
        return parts
    count = sum(part.count for part in parts)
    expiries = [part.expire_after for part in parts if part.expire_after is not None]
    return [
        Run(
            first,
            count,
            (last - first) // (count - 1),
            sum(part.mine for part in parts),
            # If only some parts expire, assume that none does.
            max(expiries) if len(expiries) == len(parts) else None,
        )
    ]


def _cut(run: Run, count: int) -> tuple[Run | None, Run | None]:
    """Return the first `count` mails of a run, and the rest."""
    if count <= 0:
        return None, run
    if count >= run.count:
        return run, None
    mine = run.mine * count // run.count
    head = replace(run, count=count, mine=mine)
    due, left = run.due + count * run.step, run.count - count
    return head, replace(run, due=due, count=left, mine=run.mine - mine)
