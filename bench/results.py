"""The results of a run: rounds, medians, spreads, and the ratios that the targets are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

# The figures of one round of one contender, such as {"mails_per_s": 1200.0}.
Figures = Mapping[str, float]
# A contender and one of its figures.
Source = tuple[str, str]

OUTBOX: Final = "Outbox"


@dataclass(frozen=True, slots=True)
class RatioTarget:
    """The least or the most of a ratio of medians.

    The ratio is the figure `of` divided by `to`: a number, or the highest of several figures.
    """

    of: Source
    to: float | tuple[Source, ...]
    least: float | None = None
    most: float | None = None

    def ratio(self, medians: Mapping[Source, float]) -> float | None:
        """Return the ratio, or None if a figure is missing."""
        if self.of not in medians:
            return None
        if isinstance(self.to, tuple):
            found = [medians[one] for one in self.to if one in medians]
            against = max(found, default=0.0)
        else:
            against = self.to
        return medians[self.of] / against if against else None

    def is_met(self, ratio: float) -> bool:
        """Return whether a ratio is good enough."""
        return (self.least is None or ratio >= self.least) and (
            self.most is None or ratio <= self.most
        )

    @property
    def text(self) -> str:
        """Say what the ratio should be, such as `mails_per_s >= 3 x BullMQ`."""
        sign, bound = (">=", self.least) if self.least is not None else ("<=", self.most)
        if isinstance(self.to, float):
            return f"{self.of[1]} {sign} {self.to * (bound or 0):g}"
        others = " and ".join(
            label if name == self.of[1] else name if label == self.of[0] else f"{label}'s {name}"
            for label, name in self.to
        )
        return f"{self.of[1]} {sign} {bound:g} x {others}"


@dataclass(slots=True)
class RowResult:
    """All rounds of a row, by contender."""

    name: str
    what: str
    targets: Sequence[RatioTarget]
    notes: Sequence[str]
    size: str
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    # Why it could not be measured; empty if it was.
    error: str = ""

    def add(self, contender: str, figures: Figures) -> None:
        """Add one round of one contender."""
        self.rounds.setdefault(contender, []).append(dict(figures))

    def medians(self) -> dict[Source, float]:
        """Return the median of each figure of each contender."""
        return {
            (label, name): median(one[name] for one in rounds if name in one)
            for label, rounds in self.rounds.items()
            for name in rounds[0]
        }

    def as_json(self) -> dict[str, Any]:
        """Return the row as it stands in bench.json. `ratio` is that of the first target."""
        medians = self.medians()
        targets = []
        for target in self.targets:
            ratio = target.ratio(medians)
            targets.append(
                {
                    "target": target.text,
                    "ratio": ratio,
                    "least": target.least,
                    "most": target.most,
                    "met": None if ratio is None else target.is_met(ratio),
                }
            )
        return {
            "what": self.what,
            "size": self.size,
            "ratio": targets[0]["ratio"] if targets else None,
            "met": all(one["met"] for one in targets) and not self.error,
            "targets": targets,
            "contenders": {
                label: {
                    name: {
                        "rounds": [one[name] for one in rounds if name in one],
                        "median": medians[label, name],
                        "spread": [
                            min(one[name] for one in rounds if name in one),
                            max(one[name] for one in rounds if name in one),
                        ],
                    }
                    for name in rounds[0]
                }
                for label, rounds in self.rounds.items()
            },
            "notes": list(self.notes),
            "error": self.error,
        }
