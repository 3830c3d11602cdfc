"""Seconds of calls that take turns, on one and the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TURNS = 30
"""Of each call."""
TURN_SECONDS = 0.02
"""Of a turn, after as long to warm up; three calls each at least, or 0.2 s of them."""
MOST_SECONDS = 60.0
"""In all, beyond which no round begins from the sixth on."""
_FEWEST, _FEWEST_TURNS, _SLOW = 3, 5, 0.2
Call = Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """Seconds of a call, the median of each turn; in round i each file has its turn i."""

    medians: tuple[float, ...]

    def over(self, other: Turns) -> float:
        """The median ratio of turns of the same round."""
        return statistics.median(a / b for a, b in zip(self.medians, other.medians, strict=True))

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first, the median and the last."""
        low, middle, high = statistics.quantiles(self.medians, n=4, method="inclusive")
        return low, middle, high


def in_turns(
    calls: Mapping[str, Call], *, turns: int = TURNS, seconds: float = TURN_SECONDS, most: float = MOST_SECONDS
) -> dict[str, Turns]:
    """By name the times of calls that take turns, warm in each: the order goes round, so that none is always first.

    Fewer turns where they take more than `most` seconds in all.
    """
    began = time.perf_counter()
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        if turn >= _FEWEST_TURNS and time.perf_counter() - began > most:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _timed(calls[name], seconds)
            found[name].append(statistics.median(_timed(calls[name], seconds)))
    return {name: Turns(tuple(medians)) for name, medians in found.items()}


def _timed(call: Call, seconds: float) -> list[float]:
    """Seconds of single calls, for about so long in all."""
    times: list[float] = []
    began = time.perf_counter()
    spent = 0.0
    while not times or spent < seconds or (len(times) < _FEWEST and spent < _SLOW):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        spent = time.perf_counter() - began
    return times
