"""A model of the limiter and the queue in plain Python: what the Lua scripts must decide.

The module has no I/O and follows the definitions instead of being fast: it searches all instants
for the one from which the window has room, and all senders for the next one. Times are Unix ms.

The limits of a sender are implemented here, in limits.lua (which decides), simulation.py (forecast)
and replay.py (audit), and named in explaining.py: sender_limits.py has the list.
Without Limit.SENDING_HOURS: the scripts get one opening with each load, and test_sending_hours.py
tests how they use it; the openings of a week are computed in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tests.integration.queue_circuits import CircuitsModel
from tests.integration.queue_state import (
    INFINITY,
    RECHECK,
    HeadModel,
    SenderModel,
    limiter_of,
)

# As in expire.lua and find_outdated.lua.
ASKED_AGAIN = 250
PUT_BACK = 5_000
# Sender, member, ms since the claim was allowed, whether it is the probe of a cooldown.
ClaimModel = tuple[int, str, int, bool]


class QueueModel(CircuitsModel):
    """One shard. Each method takes the time that the script would read from Redis."""

    def __init__(
        self,
        *,
        window: int,
        lease: int,
        low: int,
        patience: int,
        soon: int,
    ) -> None:
        super().__init__(window, lease)
        self.low = low
        self.patience = patience
        self.soon = soon
        self.whole = False
        # Epochs of senders that are not loaded yet but are being loaded.
        self.new_epochs: dict[int, int] = {}
        # The senders of users who had no room, by the look that they had.
        self.parked: dict[str, dict[int | str, int]] = {}
        # The users whose parked senders a claim considers.
        self.parked_users: set[str] = set()

    @property
    def first_look(self) -> int | None:
        """Return the time of the next look."""
        return min(self.ready.values(), default=None)

    # claim -----------------------------------------------------------------------------------

    def claim(
        self,
        now: int,
        want: int,
        limits: Mapping[str, tuple[int, int]] | None = None,
        everyone: tuple[int, int] = (0, 0),
    ) -> tuple[list[ClaimModel], list[int]]:
        """Return the claims and loads.

        Each claim has a lease that begins now. `limits` has two limits of users: how many jobs are
        claimed in turn, and how many if no other user's job is left.

        Senders with the same look are served in the order of their ids as texts.
        """
        self.everyone = everyone
        claims: list[ClaimModel] = []
        loads: list[int] = []

        def visit_due(room_of: Callable[[str], float]) -> None:
            while len(claims) < want:
                eligible = [(look, str(i), i) for i, look in self.ready.items() if look <= now]
                if not eligible:
                    return
                look, _, first = min(eligible, key=lambda one: one[:2])
                if isinstance(first, str):
                    self._visit_user(first.removeprefix("u:"), now, room_of, claims, loads)
                elif not (limits and self._park_unread(first, look, now, room_of)):
                    self._visit(first, now, room_of, claims, loads)

        for stage in (0, 1):

            def room_of(user: str, stage: int = stage) -> float:
                of_user = [s for s, *_ in claims if self.senders[s].user == user]
                most = (limits or {}).get(user, (INFINITY, INFINITY))[stage]
                return min(want - len(claims), most - len(of_user))

            # The same number of rounds as in the script.
            for _ in range(4):
                moved = self._unpark(room_of) if len(claims) < want else 0
                visit_due(room_of)
                if not moved:
                    break
        return claims, loads

    def _park_unread(
        self, sender_id: int, look: int, now: int, room_of: Callable[[str], float]
    ) -> bool:
        """Park a sender whose user has no room; False if it must be visited."""
        s = self.senders.get(sender_id)
        if s is None or room_of(s.user) > 0 or any(end <= now for end in s.leases.values()):
            return False
        self._park(s.user, sender_id, look, now)
        return True

    def _unpark(self, room_of: Callable[[str], float]) -> int:
        """Move parked senders back to their looks. Returns how many."""
        moved = 0
        for user in list(self.parked_users):
            parked = self.parked.setdefault(user, {})
            if room_of(user) <= 0:
                continue
            for _ in range(max(0, int(room_of(user)))):
                if parked:
                    look, _, sender_id = min(
                        ((look, str(i), i) for i, look in parked.items()), key=lambda one: one[:2]
                    )
                    del parked[sender_id]
                    moved += 1
                    if sender_id in self.ready:
                        self.ready[sender_id] = min(self.ready[sender_id], look)
            if not parked:
                self.parked_users.discard(user)
        return moved

    def _visit_user(
        self,
        user: str,
        now: int,
        room_of: Callable[[str], float],
        claims: list[ClaimModel],
        loads: list[int],
    ) -> None:
        owner = self.owner_of(user)
        if owner is None:
            del self.ready[limiter_of(user)]
            waiting = self._first_turn(user)
            if waiting is not None:
                self.ready[waiting] = min(self.ready.get(waiting, now), now)
            return
        if not self._expire(owner, now):
            self.lose_user(user, "sender")
            self.ready[limiter_of(user)] = now + ASKED_AGAIN
            return
        for _ in range(len(self.turns.get(user, {}))):
            first = self._first_turn(user)
            if room_of(user) <= 0 or first is None or not self._user_admits(owner, now):
                break
            del self.turns[user][first]
            self._visit(first, now, room_of, claims, loads, turn=True)
        self._forget_old_ends(owner, now, 2)
        self._schedule_user(user, now)
        look = self.ready.get(limiter_of(user), INFINITY)
        if room_of(user) <= 0 and look <= now:
            self._park(user, limiter_of(user), int(look), now)

    def _park(self, user: str, who: int | str, look: int, now: int) -> None:
        self.parked.setdefault(user, {})[who] = look
        self.parked_users.add(user)
        self.ready[who] = now + RECHECK

    def _forget_old_ends(self, s: SenderModel, now: int, windows: int) -> None:
        keep = max(self.window, s.gap) * windows
        s.entries = {member: end for member, end in s.entries.items() if end > now - keep}

    def _visit(
        self,
        sender_id: int,
        now: int,
        room_of: Callable[[str], float],
        claims: list[ClaimModel],
        loads: list[int],
        *,
        turn: bool = False,
    ) -> None:
        s = self.senders.get(sender_id)
        if s is None or not self.is_known(sender_id):
            loads.append(sender_id)
            self.ready[sender_id] = now + self.patience
            return
        owner = self.owner_of(s.user)
        if self._expires_restored(sender_id, s, now):
            self.ready[sender_id] = now + ASKED_AGAIN
            return
        if owner is not None:
            self._forget_old_ends(owner, now, 2)
        parks = room_of(s.user) <= 0
        limited = not s.active or not s.due or (s.gap > 0 and bool(s.leases))
        while s.active and room_of(s.user) > 0 and s.places > 0 and s.first is not None:
            due, member = s.first
            allowed = s.allowed_at(self.window)
            admitted = self._admits(s, now) and self._owner_admits(sender_id, now, turn=turn)
            if max(due, allowed) > now or not admitted:
                limited = True
                break
            del s.due[member]
            s.leases[member] = now + self.lease
            turn = False
            if owner is not None:
                self.turns.get(s.user, {}).pop(sender_id, None)
                allowed = max(allowed, owner.allowed_at(self.window))
                owner.leases[member] = now + self.lease
            self._begin_probe(sender_id, member, now)
            claims.append((sender_id, member, now - max(due, allowed), s.cool > 0))
            limited = limited or s.gap > 0
            limited = limited or (not s.due and s.places > 0 and room_of(s.user) > 0)
        # Entries are kept for this long, so that the wait of a job for which there was no room is
        # known.
        self._forget_old_ends(s, now, 1 if limited else 2)
        if s.horizon < INFINITY and len(s.due) < self.low and s.loading is None:
            s.loading = now
        if s.loading is not None and s.loading <= now:
            s.loading = now + self.patience
            loads.append(sender_id)
        self._look(sender_id, now)
        look = self.ready.get(sender_id, INFINITY)
        if parks and look <= now:
            self._park(s.user, sender_id, int(look), now)

    def _expires_restored(self, sender_id: int, s: SenderModel, now: int) -> bool:
        """End expired leases of a sender and its user. Whether the data of one was discarded."""
        owner = self.owner_of(s.user)
        if not self._expire(s, now):
            self.lose(sender_id)
            return True
        if owner is not None and not self._expire(owner, now):
            self.lose_user(s.user, "sender")
            return True
        return False

    def _expire(self, s: SenderModel, now: int) -> bool:
        """End expired leases; False if one was restored, so that the sender is discarded."""
        expired = [member for member, deadline in s.leases.items() if deadline <= now]
        if any(s.restored.get(member) == s.leases[member] for member in expired):
            return False
        for member in expired:
            entry = member + "?"
            while entry in s.entries:
                entry += "?"
            s.entries[entry] = s.leases.pop(member)
            s.last_end = max(s.last_end, s.entries[entry])
        if expired:
            s.epoch += 1
            s.loading = now
        return True

    # settle ----------------------------------------------------------------------------------

    def settle(
        self,
        now: int,
        ended: int,
        sender_id: int,
        member: str,
        kind: str,
        *,
        retry: tuple[str, int] | None = None,
        user: str,
        lease: int = 0,
        answered: bool = False,
        failed: Sequence[int] = (),
        before_mail: bool = False,
        pace: str = "",
        cooldown: int | None = None,
    ) -> bool:
        """End one claim; `ended` is rounded up. Returns whether the sender is known.

        `lease`: the end of this claim's lease; an UNUSED one releases no other lease. `failed`: the
        waits before probes, if the connection failed. `pace`: SENT or RATE. `cooldown`: the time of
        the next probe, 0 if the cooldown is over.
        """
        self._release_of_user(user, ended, member, kind, lease)
        s = self.senders.get(sender_id)
        if s is None:
            self._schedule_user(user, now)
            return False
        self._release(s, ended, member, kind, lease)
        probed = self._end_probe(sender_id, member, lease if kind == "UNUSED" else None)
        cleared = None
        if failed:
            cleared = self._failed(
                sender_id, member, now, failed, probed=probed, before_mail=before_mail
            )
        elif answered:
            self._answered(sender_id)
            self._learn_pace(s, pace)
        if cooldown is not None:
            s.cool = cooldown
            s.epoch += 1
        if retry is not None:
            s.epoch += 1
            if retry[1] <= s.horizon and retry[0] not in s.leases:
                s.due[retry[0]] = retry[1]
        elif kind == "UNUSED" and s.left_out:
            s.loading = now
        self._look(sender_id, now)
        if cleared in self.senders:
            self._forget_troubles(cleared)
            self._look(cleared, now)
        self._schedule_user(user, now)
        return True

    def _release_of_user(self, user: str, ended: int, member: str, kind: str, lease: int) -> None:
        owner = self.users.get(user)
        if owner is not None:
            self._release(owner, ended, member, kind, lease)
            restored = owner.restored.get(member)
            if kind == "UNUSED" and restored and owner.leases.get(member) == restored:
                del owner.leases[member]
        elif user in self.new_user_epochs:
            self.new_user_epochs[user] += 1

    def _learn_pace(self, s: SenderModel, pace: str) -> None:
        if pace == "SENT":
            s.speed_up()
        elif pace == "RATE":
            s.slow_down()

    def _release(self, s: SenderModel, ended: int, member: str, kind: str, lease: int) -> None:
        for entries, name in ((s.leases, member), (s.entries, member + "?")):
            if kind != "UNUSED" or entries.get(name) == lease:
                entries.pop(name, None)
        if kind == "COUNTED":
            s.entries[member] = ended
        if kind != "UNUSED":
            s.last_end = max(s.last_end, ended)

    def confirm(self, now: int, sender_id: int, member: str, lease: int) -> bool:
        """Return whether a claim still holds; if so, restore its own lease."""
        s = self.senders.get(sender_id)
        if s is None or not self.is_known(sender_id):
            return False
        owner = self.owner_of(s.user)
        held = [s] if owner is None else [s, owner]
        if any(member not in one.leases for one in held):
            return False
        if any(one.leases[member] != lease for one in held):
            if lease <= now:
                return False  # claimed again after this lease had expired
            for one in held:
                one.leases[member] = lease
            self._look(sender_id, now)
        return True

    def renew(self, now: int, sender_id: int, member: str, user: str) -> int | None:
        """Move the end of a lease and return it; None if the lease no longer exists."""
        end = now + self.lease
        owner = self.owner_of(user)
        moved = owner is not None and owner.leases.get(member, end) != end
        if owner is not None and moved:
            owner.leases[member] = end
        found = self._renew(now, sender_id, member, end)
        if moved:
            self._schedule_user(user, now)
        return found

    def _renew(self, now: int, sender_id: int, member: str, end: int) -> int | None:
        s = self.senders.get(sender_id)
        if s is None or member not in s.leases:
            return None
        if s.leases[member] != end:
            s.leases[member] = end
            own = self.circuits_of(s)[0]
            if own.probe == (sender_id, member):
                own.busy_until = end
            self._look(sender_id, now)
        return end

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
        """Replace the head of a sender; False if its epoch has changed."""
        s = self.senders.get(sender_id)
        if self._epoch(sender_id) != epoch:
            if s is not None:
                s.refused = True
            return False
        if not self.needs_limiter(limited=head.user_limited):
            self._forget_user(head.user)
        restored = {} if s is None else s.restored
        if s is None:
            s = self.senders[sender_id] = SenderModel(epoch=now * 1000)
            self.new_epochs.pop(sender_id)
            s.entries = {member: now_up - age for member, age, counted in head.ends if counted}
            s.last_end = max((now_up - age for _, age, _ in head.ends), default=0)
            s.leases = {member: now_up + left for member, left in head.leases}
            restored = dict(s.leases)
        elif (s.endpoint, s.revision) != (head.endpoint, head.revision):
            self._forget_troubles(sender_id)
            for c in self.circuits_of(s):
                self._leave_waiters(c, sender_id)
            s.pace = 0
        s.refused = False
        s.endpoint, s.revision, s.user = head.endpoint, head.revision, head.user
        s.user_limited = head.user_limited
        s.limit, s.own_gap, s.flight, s.active = head.limit, head.gap, head.flight, head.active
        s.cool = now_up + head.cooldown if head.cooldown else 0
        for member, _ in head.jobs:
            # A dispatcher gave it back after its lease was restored.
            if member in s.restored and s.leases.get(member) == s.restored[member]:
                del s.leases[member]
        s.restored = restored
        s.due = {member: due for member, due in head.jobs if member not in s.leases}
        s.left_out = len(s.due) < len(head.jobs)
        s.horizon = head.jobs[-1][1] if head.more else INFINITY
        s.loading = now + self.soon if head.more and not s.due else None
        self._look(sender_id, now)
        return True

    def add_jobs(
        self, now: int, sender_id: int, jobs: Sequence[tuple[str, int]], most: int
    ) -> bool:
        """Add committed jobs to the head of a sender; False if it must be loaded instead."""
        # The limiter of its user may be lost: a claim finds that.
        s = self.senders.get(sender_id)
        if s is None or s.refused or not s.active:
            return False
        s.epoch += 1
        added = {m: due for m, due in jobs if due <= s.horizon and m not in s.leases}
        s.due |= added
        first = sorted(s.due.items(), key=lambda job: (job[1], job[0]))[:most]
        # Jobs that were given back may have made it larger before.
        if added and len(first) < len(s.due):
            s.due = dict(first)
            s.horizon = first[-1][1]
        self._look(sender_id, now)
        return True

    def find_lost(self, now: int, sender_ids: Sequence[int]) -> list[int]:
        """Return the senders that must be loaded; each has a waiting job."""
        lost = []
        for sender_id in sender_ids:
            if self.is_known(sender_id):
                self._look(sender_id, now)
            if not self.is_known(sender_id) or (
                self.senders[sender_id].active and sender_id not in self.ready
            ):
                lost.append(sender_id)
        return lost

    def find_outdated(self, firsts: Iterable[tuple[int, str, int]]) -> list[int]:
        """Return the known senders that lack their first waiting job, or have it much later."""
        outdated = []
        for sender_id, member, due in firsts:
            if not self.is_known(sender_id):
                continue
            s = self.senders[sender_id]
            leased = s.leases.get(member)
            if member in s.due:
                if s.due[member] > due + PUT_BACK:
                    outdated.append(sender_id)
            elif leased is None or leased == s.restored.get(member):
                outdated.append(sender_id)
        return outdated

    def lose(self, sender_id: int) -> None:
        """Lose any of the keys of a sender: its other keys are no longer used."""
        self.senders.pop(sender_id, None)
        self.new_epochs.pop(sender_id, None)

    def lose_all(
        self,
        ready: Mapping[int | str, int],
        parked: Mapping[str, Mapping[int | str, int]],
        parked_users: Iterable[str],
        turns: Mapping[str, Mapping[int, int]],
        everyone: tuple[int, int],
    ) -> None:
        """Lose everything except what is valid in an old snapshot."""
        self.senders.clear()
        self.new_epochs.clear()
        self.ready = dict(ready)
        self.circuits.clear()
        self.parked = {user: dict(looks) for user, looks in parked.items()}
        self.parked_users = set(parked_users)
        self.users.clear()
        self.new_user_epochs.clear()
        self.damaged_users.clear()
        self.turns = {user: dict(turns) for user, turns in turns.items()}
        self.everyone = everyone
        self.whole = False

    def _look(self, sender_id: int, now: int) -> None:
        s = self.senders[sender_id]
        looks: list[int] = []
        if s.leases:
            looks.append(min(s.leases.values()))
        if s.loading is not None:
            looks.append(s.loading)
        sends: float = INFINITY
        # Limit.PAUSE
        if s.active and s.first is not None and s.places > 0:
            sends = max(s.first[0], s.allowed_at(self.window))
        holding = None
        for c in self.circuits_of(s):
            if sends <= now and holding is None and not c.admits(now):
                holding = c
            else:
                self._leave_waiters(c, sender_id)
        if holding is not None:
            holding.waiters[sender_id] = int(sends)
            first = holding.first == sender_id
            sends = min(now + RECHECK, holding.turn) if first else now + RECHECK
        sends = self._through_user(sender_id, sends, now)
        if sends < INFINITY:
            looks.append(int(sends))
        self._schedule_user(s.user, now)
        if looks:
            self.ready[sender_id] = min(looks)
        else:
            self.ready.pop(sender_id, None)
        s.idle = not looks and not s.due
