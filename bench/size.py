"""How much is measured: one number for the backlog and one for the mails that are sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BenchSize:
    """The sizes of all rows. The defaults are those that the targets are about."""

    jobs: int = 10_000_000
    mails: int = 20_000
    rounds: int = 3

    @property
    def is_full(self) -> bool:
        """Whether these are the sizes that the targets are about."""
        default = BenchSize()
        return self.jobs >= default.jobs and self.mails >= default.mails and self.rounds >= 3

    @property
    def tenth(self) -> int:
        """A tenth of the backlog: the million of the rows that are about one."""
        return self.jobs // 10

    @property
    def hundredth(self) -> int:
        """A hundredth of the backlog: the 100,000 of the rows that are about as many."""
        return self.jobs // 100

    @property
    def senders(self) -> int:
        """Senders of the mails that are sent: each has 20."""
        return max(10, self.mails // 20)

    @property
    def held_mails(self) -> int:
        """The mails that are sent while a transaction is open."""
        return max(self.mails, self.jobs * 3 // 100)

    @property
    def seconds(self) -> int:
        """How long the rows last that send at a steady rate."""
        return 20 if self.mails >= BenchSize().mails else 8

    @property
    def calls(self) -> int:
        """Calls whose times are measured."""
        return 2_000 if self.mails >= BenchSize().mails else 400


SHORT = BenchSize(jobs=100_000, mails=4_000)
