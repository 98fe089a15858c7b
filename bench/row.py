"""A row of the table: the measure, the systems that are measured, and the target."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.bench import Bench
from bench.results import Figures, RatioTarget
from bench.size import BenchSize

# Measures one round; the second argument is its number, from 0.
Measure = Callable[[Bench, int], Awaitable[Figures]]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Its contenders are measured in turns, so that other work on the machine hits all of them."""

    name: str
    what: str
    contenders: Mapping[str, Measure]
    targets: tuple[RatioTarget, ...]
    size: Callable[[BenchSize], str]
    notes: tuple[str, ...] = ()
