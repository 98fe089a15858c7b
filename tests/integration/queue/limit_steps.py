"""Steps of the model for limits learned from replies, and for renewed leases."""

from __future__ import annotations

from enum import Enum, auto

from outbox_server.shared.queue.keys import member_of
from outbox_server.shared.queue.records import Contact, LimitUse
from tests.integration.queue.steps import QueueSteps
from tests.integration.queue.under_way import ClaimUnderWay, Step


class Answers(Enum):
    """The steps of a renewal that succeed: PostgreSQL is asked first, then Redis."""

    BOTH = auto()
    # PostgreSQL extended the lease, but its answer was lost.
    POSTGRES_LOST = auto()
    # PostgreSQL extended the lease; Redis is unreachable.
    REDIS_AWAY = auto()
    # Both extended the lease, but the answer of Redis was lost.
    REDIS_LOST = auto()


class LimitSteps(QueueSteps):
    async def _renew(self, holding: ClaimUnderWay, answers: Answers) -> None:
        claim = holding.claim
        holding.known = False
        end = self.world.renew(claim.job, self.now)
        if answers is Answers.POSTGRES_LOST:
            return
        if end is None:
            # Another process has ended the attempt: the send stops at once.
            self._hold_until(holding, min(holding.deadline, self.now))
            return
        holding.lease_until = end
        if answers is Answers.REDIS_AWAY:
            return
        (found,) = await self.queue.renew([(claim.sender_id, claim.job, claim.user)])
        member = member_of(claim.job)
        assert found == self.model.renew(self.now_ms, claim.sender_id, member, claim.user)
        if answers is Answers.BOTH and found is not None:
            holding.renewed(found)
            self._hold_until(holding, found * 1000)

    def _hold_until(self, holding: ClaimUnderWay, deadline: int) -> None:
        assert holding.send is not None
        holding.deadline = holding.send.deadline = deadline

    async def _linger(self, sender_id: int, pauses: list[tuple[int, Answers]]) -> None:
        """Send a sender's mail slowly, renewing its leases after each pause (us)."""
        await self._advance((self.model.first_look or 0) * 1000)
        await self._claim(3)
        for holding in self._of(sender_id):
            await self._until_begun(holding)
        for pause, answers in pauses:
            await self._advance(self.now + pause)
            for holding in self._of(sender_id):
                if holding.step is Step.BEGUN and self.now < holding.deadline:
                    await self._renew(holding, answers)
            # A renewed job is not taken for an abandoned one.
            await self._compare()
            await self._claim(1)

    def _of(self, sender_id: int) -> list[ClaimUnderWay]:
        return [holding for holding in self.holdings if holding.claim.sender_id == sender_id]

    async def _until_begun(self, holding: ClaimUnderWay) -> None:
        while holding in self.holdings and holding.step in (
            Step.CLAIMED,
            Step.MARKED,
            Step.CONFIRMED,
        ):
            await self._advance_claim(holding)

    async def _teach(self, sender_id: int, rounds: int, **how: object) -> None:
        """End each mail of a sender with this result; mails of other senders are not changed."""
        for _ in range(rounds):
            await self._advance((self.model.first_look or 0) * 1000)
            await self._claim(3)
            for holding in self._of(sender_id):
                await self._until_begun(holding)
                if holding in self.holdings and holding.step is Step.BEGUN:
                    await self._advance_claim(holding, **how)

    async def _throttle(self, sender_id: int, rounds: int) -> None:
        await self._teach(sender_id, rounds, use=LimitUse.BEGUN, contact=Contact.TOO_FAST, retry=0)

    async def _refuse(self, sender_id: int, rounds: int, cools: int) -> None:
        await self._teach(
            sender_id, rounds, use=LimitUse.BEGUN, contact=Contact.ANSWERED, retry=0, cools=cools
        )
