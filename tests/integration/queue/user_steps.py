"""Steps of the model for the limits that a user has for all its senders together."""

from __future__ import annotations

from typing import Any

from hypothesis.stateful import RuleBasedStateMachine

from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import brings_history
from tests.integration.queue.shard import START_MS, Shard, scores
from tests.integration.queue.under_way import LimitHistory, UserLoadUnderWay
from tests.integration.queue.world import ModelledInstallation
from tests.integration.queue_model import QueueModel
from tests.integration.queue_state import INFINITY

# The users of the senders.
USERS = {9: "a", 10: "b", 11: "a"}
WINDOW = 10_000


class UserSteps(RuleBasedStateMachine):
    """The limits of users; `QueueSteps` has the rest of a shard."""

    shard: Shard
    queue: Queue
    model: QueueModel
    world: ModelledInstallation
    lossy: bool

    def __init__(self) -> None:
        super().__init__()
        self.user_loads: list[UserLoadUnderWay] = []
        # The limits in the settings of the dispatchers, of users without limits of their own.
        self.everyone = (0, 0)
        self.user_limits = {user: LimitHistory() for user in USERS.values()}

    @property
    def now(self) -> int:
        return self.shard.now_us

    @property
    def now_ms(self) -> int:
        return self.now // 1000

    @property
    def now_up(self) -> int:
        return -(-self.now // 1000)

    async def _advance(self, time: int) -> None:
        await self.shard.at(max(0, time, self.now) / 1000 - START_MS)

    async def _load(self, sender_id: int, *, committed: bool, waits: bool = False) -> None:
        raise NotImplementedError

    def _note_user_limits(self) -> None:
        for user, history in self.user_limits.items():
            owner = self.model.owner_of(user)
            history.changes.append((self.now, INFINITY if owner is None else owner.limit))

    async def _load_user(self, user: str, *, committed: bool, waits: bool = False) -> None:
        epochs = await self.queue.begin_user_loads([user], committed=committed)
        epoch = self.model.begin_user_load(self.now_ms, user, committed=committed)
        assert epochs == {user: epoch}
        head, model = self.world.read_user(user, self.now, fresh=brings_history(epoch))
        load = UserLoadUnderWay(user, epoch, head, model)
        if waits:
            self.user_loads.append(load)
        else:
            await self._apply_user(load)

    async def _apply_user(self, load: UserLoadUnderWay) -> None:
        again = await self.queue.load_users([load.head], {load.user: load.epoch})
        applied = self.model.load_user(self.now_ms, self.now_up, load.user, load.epoch, load.model)
        assert again == ([] if applied else [load.user])
        self._note_user_limits()
        if not applied:
            await self._load_user(load.user, committed=False)

    async def _set_user(
        self, user: str, limits: tuple[int | None, int | None], *, waits: bool
    ) -> None:
        """Set the limits of a user, as UpdateUser does."""
        self.world.users[user] = limits
        for sender_id in self.world.senders_of(user):
            self.world.mark_stale(sender_id)
        await self._load_user(user, committed=True, waits=waits)
        for sender_id in self.world.senders_of(user):
            await self._load(sender_id, committed=True, waits=waits)

    async def _lose_user(self, user: str, kind: str) -> None:
        self.lossy = True
        if kind == "ready":
            await self.shard.redis.zrem(self.shard.prefix + "ready", f"u:{user}")
            self.model.ready.pop(f"u:{user}", None)
        elif await self.shard.redis.delete(f"{self.shard.prefix}{kind}:u:{user}"):
            self.model.lose_user(user, kind)
            self._note_user_limits()
            await self._advance(self.now + 1000)

    async def _compare_users(self) -> None:
        for user in sorted(set(USERS.values())):
            turns = await scores(self.shard.redis, f"{self.shard.prefix}turns:{user}")
            assert turns == {str(s): at for s, at in self.model.turns.get(user, {}).items()}
            owner = self.model.owner_of(user)
            if owner is None:
                continue
            (found,) = await self.shard.senders([f"u:{user}"])
            assert after_start(owner.leases) == found.leases
            oldest = self.shard.now - WINDOW
            assert after_start(owner.entries, oldest) == after_start(found.window, oldest, start=0)
            assert found.settings["epoch"] == str(owner.epoch)
            assert found.settings["end"] == str(owner.last_end)
            assert found.settings_expire is owner.idle


def after_start(
    times: dict[Any, int], after: float = -INFINITY, *, start: int = START_MS
) -> dict[Any, int]:
    return {member: time - start for member, time in times.items() if time - start > after}
