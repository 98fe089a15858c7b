"""The limits of users in the model of the queue: turns.lua, user.lua and load_user.lua."""

from __future__ import annotations

from tests.integration.queue_state import (
    RECHECK,
    SenderModel,
    UserHeadModel,
    UserModel,
    limiter_of,
)


class UserLimitsModel:
    """The limiters of the users of one shard."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.senders: dict[int, SenderModel] = {}
        # By sender, or by the limiter of a user.
        self.ready: dict[int | str, int] = {}
        # The limits of users without limits of their own: sends in a window, and gap.
        self.everyone = (0, 0)
        # The limiters of users that Redis knows; the epochs of those that are being loaded; and the
        # users whose limiter has lost some of its keys.
        self.users: dict[str, UserModel] = {}
        self.new_user_epochs: dict[str, int] = {}
        self.damaged_users: set[str] = set()
        # The senders of a user that wait for their turn, by the time of arrival.
        self.turns: dict[str, dict[int, int]] = {}

    def owner_of(self, user: str) -> UserModel | None:
        """Return the limiter of a user; None if there is none, or if it is lost."""
        owner = self.users.get(user)
        if owner is not None:
            owner.apply(self.everyone)
        return owner

    def is_known(self, sender_id: int) -> bool:
        """Whether Redis knows a sender, and the limiter that its user must have."""
        s = self.senders.get(sender_id)
        if s is None:
            return False
        if s.user in self.new_user_epochs or s.user in self.damaged_users:
            return False
        return s.user in self.users or not self.needs_limiter(limited=s.user_limited)

    def needs_limiter(self, *, limited: bool) -> bool:
        return limited or any(self.everyone)

    def _user_admits(self, owner: UserModel, now: int) -> bool:
        return owner.places > 0 and owner.allowed_at(self.window) <= now

    def _first_turn(self, user: str) -> int | None:
        turns = self.turns.get(user, {})
        return min(((at, str(s), s) for s, at in turns.items()), default=(0, "", None))[2]

    def _owner_admits(self, sender_id: int, now: int, *, turn: bool = False) -> bool:
        user = self.senders[sender_id].user
        owner = self.owner_of(user)
        if owner is None:
            return True
        return (turn or self._first_turn(user) in (None, sender_id)) and self._user_admits(
            owner, now
        )

    def _through_user(self, sender_id: int, at: float, now: int) -> float:
        user = self.senders[sender_id].user
        if self.owner_of(user) is None:
            return at
        turns = self.turns.setdefault(user, {})
        if at > now:
            turns.pop(sender_id, None)
            return at
        if sender_id not in turns:
            if self._owner_admits(sender_id, now):
                return at
            turns[sender_id] = max(now, *(last + 1 for last in turns.values()), 0)
        return now + RECHECK

    def _schedule_user(self, user: str, now: int) -> None:
        owner = self.owner_of(user)
        if owner is None:
            return
        looks: list[int] = [min(owner.leases.values())] if owner.leases else []
        first = self._first_turn(user)
        if first is not None and owner.places > 0:
            since = min(now, self.turns[user][first])
            looks.append(max(since, owner.allowed_at(self.window)))
        if looks:
            self.ready[limiter_of(user)] = min(looks)
        else:
            self.ready.pop(limiter_of(user), None)
        owner.idle = not owner.leases and first is None

    def _forget_user(self, user: str) -> None:
        self.lose_user(user, "sender")
        self.turns.pop(user, None)
        self.ready.pop(limiter_of(user), None)

    def lose_user(self, user: str, kind: str) -> None:
        """Lose one of the keys of a user's limiter, which exists."""
        known = self.users.pop(user, None) is not None
        if kind == "sender":
            self.new_user_epochs.pop(user, None)
            self.damaged_users.discard(user)
        elif known:
            self.damaged_users.add(user)

    def begin_user_load(self, now: int, user: str, *, committed: bool) -> str:
        """Return the epoch that the load of a user's limits must still find."""
        owner = self.users.get(user)
        if owner is not None:
            owner.epoch += committed
        elif user in self.new_user_epochs:
            self.new_user_epochs[user] += committed
        else:
            self.damaged_users.discard(user)
            self.new_user_epochs[user] = now * 1000
        return self._user_epoch(user)

    def _user_epoch(self, user: str) -> str:
        owner = self.users.get(user)
        return str(owner.epoch) if owner else f"new:{self.new_user_epochs.get(user, '')}"

    def load_user(self, now: int, now_up: int, user: str, epoch: str, head: UserHeadModel) -> bool:
        """Store the limits of a user; False if the epoch of its limiter has changed."""
        if self._user_epoch(user) != epoch:
            return False
        own = (head.limit, head.gap)
        owner = self.users.get(user)
        if owner is None:
            owner = self.users[user] = UserModel(epoch=now * 1000)
            self.new_user_epochs.pop(user)
            owner.entries = {member: now_up - age for member, age, counted in head.ends if counted}
            owner.last_end = max((now_up - age for _, age, _ in head.ends), default=0)
            owner.leases = {member: now_up + left for member, left in head.leases}
            owner.restored = dict(owner.leases)
        elif owner.own != own:
            owner.epoch += 1
        owner.own = own
        self._schedule_user(user, now)
        return True
