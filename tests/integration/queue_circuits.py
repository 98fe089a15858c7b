"""The circuits in the model of the queue: circuit.lua, and what it needs of a sender."""

from __future__ import annotations

from collections.abc import Sequence

from tests.integration.queue_state import FAILURES, CircuitModel, SenderModel, wait_of
from tests.integration.queue_users import UserLimitsModel


class CircuitsModel(UserLimitsModel):
    """The circuits of one shard, by endpoint."""

    def __init__(self, window: int, lease: int) -> None:
        super().__init__(window)
        self.lease = lease
        self.circuits: dict[str, CircuitModel] = {}
        # Circuits that opened or closed; the sender is None for an endpoint's circuit.
        self.changes: list[tuple[bool, int | None]] = []

    def circuits_of(self, s: SenderModel) -> list[CircuitModel]:
        """Return the circuits that the sender's mail needs: its endpoint's and a shared one."""
        keys = [s.endpoint, *(["relay"] if s.endpoint.startswith("relay:") else [])]
        return [self.circuits.setdefault(key, CircuitModel()) for key in keys]

    def _admits(self, s: SenderModel, now: int) -> bool:
        return all(c.admits(now) for c in self.circuits_of(s))

    def _schedule_prober(self, c: CircuitModel) -> None:
        if c.first is not None:
            self.ready[c.first] = min(self.ready.get(c.first, c.turn), c.turn)

    def _leave_waiters(self, c: CircuitModel, sender_id: int) -> None:
        if c.open and c.waiters.pop(sender_id, None) is not None:
            self._schedule_prober(c)

    def _begin_probe(self, sender_id: int, member: str, now: int) -> None:
        s = self.senders[sender_id]
        if s.open:
            s.prober = member
        for c in self.circuits_of(s):
            if c.open:
                c.probe, c.busy_until = (sender_id, member), now + self.lease
                c.waiters.pop(sender_id, None)
                self._schedule_prober(c)

    def _end_probe(self, sender_id: int, member: str, lease: int | None) -> list[CircuitModel]:
        """Return the circuits of which this was the probe."""
        ended = []
        for c in self.circuits_of(self.senders[sender_id]):
            if c.probe == (sender_id, member) and lease in (None, c.busy_until):
                c.probe, c.busy_until = None, 0
                self._schedule_prober(c)
                ended.append(c)
        return ended

    def _forget_troubles(self, sender_id: int) -> None:
        s = self.senders[sender_id]
        if s.open:
            self.changes.append((False, sender_id))
        s.troubles, s.open, s.probe, s.step, s.prober = 0, False, 0, 0, None

    def _answered(self, sender_id: int) -> None:
        self._forget_troubles(sender_id)
        for c in self.circuits_of(self.senders[sender_id]):
            self._close(c)

    def _close(self, c: CircuitModel) -> None:
        if c.open:
            self.changes.append((False, None))
        for waiter, at in c.waiters.items():
            self.ready[waiter] = min(self.ready.get(waiter, at), at)
        (key,) = (key for key, each in self.circuits.items() if each is c)
        self.circuits[key] = CircuitModel()

    def _failed(
        self,
        sender_id: int,
        member: str,
        now: int,
        backoff: Sequence[int],
        *,
        probed: list[CircuitModel],
        before_mail: bool,
    ) -> int | None:
        s = self.senders[sender_id]
        if s.open and s.prober == member:
            s.step += 1
            s.probe = now + wait_of(backoff, s.step)
        own, *shared = self.circuits_of(s)
        for c in (own, *shared):
            if not (c.open and any(each is c for each in probed)):
                continue
            if c is own or before_mail:
                c.step += 1
                c.next = now + wait_of(backoff, c.step)
                self._schedule_prober(c)
            else:
                self._close(c)
        blamed = shared[0] if shared and before_mail else own
        return self._blame(sender_id, blamed, now + backoff[0])

    def _blame(self, sender_id: int, c: CircuitModel, probe_at: int) -> int | None:
        s = self.senders[sender_id]
        if c.open or s.open:
            return None
        before = set(c.senders)
        c.failures += 1
        c.senders.add(sender_id)
        s.troubles += 1
        if c.failures >= FAILURES and len(c.senders) > 1:
            c.open, c.step, c.next = True, 1, probe_at
            self.changes.append((True, None))
            self._forget_troubles(sender_id)
            return before.pop() if len(before) == 1 else None
        if s.troubles >= FAILURES:
            s.open, s.step, s.probe = True, 1, probe_at
            self.changes.append((True, sender_id))
        return None
