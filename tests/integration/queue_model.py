"""The limiter and the queue once more, in plain Python: what the Lua scripts have to decide.

Pure, and by definition rather than by speed: the instant from which the window has room is looked
for among all instants, and the next sender among all senders. Times are Unix ms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

INFINITY = float("inf")


@dataclass
class SenderModel:
    """What the queue knows of one sender."""

    epoch: int
    limit: int = 1
    gap: int = 0
    flight: int = 1
    active: bool = True
    horizon: float = INFINITY
    # A load is wanted, and is asked for again at this time.
    loading: int | None = None
    last_end: int = 0
    due: dict[str, int] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    # Ends that take a slot of the window, by job and attempt; a "?" for each that is assumed.
    slots: dict[str, int] = field(default_factory=dict)
    # Nothing waits and nothing is in flight: it is forgotten when its history is.
    idle: bool = False

    @property
    def places(self) -> int:
        """How many more sends may be in flight."""
        return min(1 if self.gap else self.flight, self.limit) - len(self.leases)

    @property
    def first(self) -> tuple[int, str] | None:
        """The next job in the order of (due, id)."""
        return min(((due, member) for member, due in self.due.items()), default=None)

    def allowed_at(self, window: int) -> int:
        """Return the earliest instant at which gap and window allow one more send."""
        room = self.limit - len(self.leases)
        ends = self.slots.values()
        instants = (0, *(end + window for end in ends))
        free = min(t for t in instants if sum(end + window > t for end in ends) < room)
        return max(free, self.last_end + self.gap if self.gap else 0)


@dataclass(frozen=True)
class HeadModel:
    """What a load brings."""

    limit: int
    gap: int
    flight: int
    active: bool
    jobs: Sequence[tuple[str, int]]
    more: bool
    # Member, ms since it ended, whether it takes a slot.
    ends: Sequence[tuple[str, int, bool]] = ()
    # Member, ms left.
    leases: Sequence[tuple[str, int]] = ()


class QueueModel:
    """One shard. Each method takes the time that the script would read from Redis."""

    def __init__(self, *, window: int, lease: int, low: int, patience: int, soon: int) -> None:
        self.window = window
        self.lease = lease
        self.low = low
        self.patience = patience
        self.soon = soon
        self.whole = False
        self.senders: dict[int, SenderModel] = {}
        # Of senders that are not known, and that somebody loads.
        self.new_epochs: dict[int, int] = {}
        self.ready: dict[int, int] = {}

    @property
    def first_look(self) -> int | None:
        """When something can be done next."""
        return min(self.ready.values(), default=None)

    # claim -----------------------------------------------------------------------------------

    def claim(self, now: int, want: int) -> tuple[list[tuple[int, str, int]], list[int]]:
        """Return the claims (sender, member, ms since allowed) and loads.

        Each is held for one lease from now on.

        Senders that share an instant come in the order of their ids as texts.
        """
        claims: list[tuple[int, str, int]] = []
        loads: list[int] = []
        while len(claims) < want:
            eligible = [(look, str(i), i) for i, look in self.ready.items() if look <= now]
            if not eligible:
                break
            self._visit(min(eligible)[2], now, want, claims, loads)
        return claims, loads

    def _visit(
        self,
        sender_id: int,
        now: int,
        want: int,
        claims: list[tuple[int, str, int]],
        loads: list[int],
    ) -> None:
        s = self.senders.get(sender_id)
        if s is None:
            loads.append(sender_id)
            self.ready[sender_id] = now + self.patience
            return
        self._expire(s, now)
        limited = not s.active or s.gap > 0 or not s.due
        while s.active and len(claims) < want and s.places > 0 and s.first is not None:
            due, member = s.first
            allowed = s.allowed_at(self.window)
            if max(due, allowed) > now:
                limited = True
                break
            del s.due[member]
            s.leases[member] = now + self.lease
            claims.append((sender_id, member, now - max(due, allowed)))
            limited = limited or (not s.due and s.places > 0 and len(claims) < want)
        # For how long it is known since when a job that is kept for want of room was allowed.
        keep = max(self.window, s.gap) * (1 if limited else 2)
        s.slots = {member: end for member, end in s.slots.items() if end > now - keep}
        if s.horizon < INFINITY and len(s.due) < self.low and s.loading is None:
            s.loading = now
        if s.loading is not None and s.loading <= now:
            s.loading = now + self.patience
            loads.append(sender_id)
        self._look(sender_id)

    def _expire(self, s: SenderModel, now: int) -> None:
        expired = [member for member, deadline in s.leases.items() if deadline <= now]
        for member in expired:
            slot = member + "?"
            while slot in s.slots:
                slot += "?"
            s.slots[slot] = s.leases.pop(member)
            s.last_end = max(s.last_end, s.slots[slot])
        if expired:
            s.epoch += 1
            s.loading = now

    # settle ----------------------------------------------------------------------------------

    def settle(
        self,
        ended: int,
        sender_id: int,
        member: str,
        kind: str,
        *,
        retry: tuple[str, int] | None = None,
        lease: int = 0,
    ) -> bool:
        """End one claim; `ended` is rounded up. Returns whether the sender is known.

        `lease`: when that of this claim runs out; an UNUSED one frees no other.
        """
        s = self.senders.get(sender_id)
        if s is None:
            return False
        for held, name in ((s.leases, member), (s.slots, member + "?")):
            if kind != "UNUSED" or held.get(name) == lease:
                held.pop(name, None)
        if kind == "COUNTED":
            s.slots[member] = ended
        if kind != "UNUSED":
            s.last_end = max(s.last_end, ended)
        if retry is not None:
            s.epoch += 1
            if retry[1] <= s.horizon and retry[0] not in s.leases:
                s.due[retry[0]] = retry[1]
        self._look(sender_id)
        return True

    def confirm(self, sender_id: int, member: str, lease: int) -> bool:
        """Say whether a claim still holds; if so, under its own lease."""
        s = self.senders.get(sender_id)
        if s is None or member not in s.leases:
            return False
        if s.leases[member] != lease:
            s.leases[member] = lease
            self._look(sender_id)
        return True

    # load ------------------------------------------------------------------------------------

    def begin_load(self, now: int, sender_id: int, *, committed: bool) -> str:
        """Return the epoch that the load must still find."""
        s = self.senders.get(sender_id)
        if s is not None:
            s.epoch += committed
        elif sender_id in self.new_epochs:
            self.new_epochs[sender_id] += committed
        else:
            self.new_epochs[sender_id] = now * 1000
        return self._epoch(sender_id)

    def _epoch(self, sender_id: int) -> str:
        s = self.senders.get(sender_id)
        return f"new:{self.new_epochs.get(sender_id)}" if s is None else str(s.epoch)

    def load_head(self, now: int, now_up: int, sender_id: int, epoch: str, head: HeadModel) -> bool:
        """Replace the head of a sender; False: its epoch has moved."""
        if self._epoch(sender_id) != epoch:
            return False
        s = self.senders.get(sender_id)
        if s is None:
            s = self.senders[sender_id] = SenderModel(epoch=now * 1000)
            self.new_epochs.pop(sender_id)
            s.slots = {member: now_up - age for member, age, counted in head.ends if counted}
            s.last_end = max((now_up - age for _, age, _ in head.ends), default=0)
            s.leases = {member: now_up + left for member, left in head.leases}
        s.limit, s.gap, s.flight, s.active = head.limit, head.gap, head.flight, head.active
        s.due = {member: due for member, due in head.jobs if member not in s.leases}
        s.horizon = head.jobs[-1][1] if head.more else INFINITY
        s.loading = now + self.soon if head.more and not s.due else None
        self._look(sender_id)
        return True

    def find_lost(self, sender_ids: Sequence[int]) -> list[int]:
        """Return the senders that must be loaded; something waits for each."""
        lost = []
        for sender_id in sender_ids:
            s = self.senders.get(sender_id)
            if s is not None:
                self._look(sender_id)
            if s is None or (s.active and sender_id not in self.ready):
                lost.append(sender_id)
        return lost

    def lose(self, sender_id: int) -> None:
        """Lose any of the keys of a sender: the rest of them is not believed."""
        self.senders.pop(sender_id, None)
        self.new_epochs.pop(sender_id, None)

    def lose_all(self, ready: Mapping[int, int]) -> None:
        """Lose everything, but for an old `ready` of a snapshot."""
        self.senders.clear()
        self.new_epochs.clear()
        self.ready = dict(ready)
        self.whole = False

    def _look(self, sender_id: int) -> None:
        s = self.senders[sender_id]
        looks: list[int] = []
        if s.leases:
            looks.append(min(s.leases.values()))
        if s.loading is not None:
            looks.append(s.loading)
        if s.active and s.first is not None and s.places > 0:
            looks.append(max(s.first[0], s.allowed_at(self.window)))
        if looks:
            self.ready[sender_id] = min(looks)
        else:
            self.ready.pop(sender_id, None)
        s.idle = not looks and not s.due
